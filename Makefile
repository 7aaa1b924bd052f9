# Every target installs what it needs; only Python 3.11+ and a compiler-free machine are assumed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types arrows docs gallery site faults kills test-slow conformance sweep-timm sweep-transformers system clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Esper needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "uv>=0.5,<1"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[dev]"
	@touch $@

install: $(INSTALLED) ## install Esper and its tools into .venv

system: ## fetch what tests use beyond Python, where that can be done: Fashion-MNIST files and a browser
	@.ci/system-packages

demo: $(INSTALLED) ## grow a small GPT beside its host and the static network of its final size, at equal FLOPs; report
	@rm -rf runs/demo
	$(BIN)/esper run --config examples/demo.toml --out runs/demo
	$(BIN)/esper compare runs/demo --arms host@FLOPs,static@FLOPs --seeds 3 --workers $(WORKERS)
	@echo
	@echo "the report: runs/demo/report.html"

test: $(INSTALLED) system lint types arrows ## everything that must hold, within fifteen minutes on two cores
	$(BIN)/pytest -n $(WORKERS) -m "not slow"

lint: $(INSTALLED) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy, strict on the core
	$(BIN)/mypy

arrows: $(INSTALLED) ## the dependency arrows
	$(BIN)/lint-imports

test-slow: $(INSTALLED) system ## the kill test, the hostile files and all else that takes long
	$(BIN)/pytest -n $(WORKERS) -m slow

faults: $(INSTALLED) ## every part that can fail, at every moment, in every way; and every hostile folder
	$(BIN)/pytest -n $(WORKERS) tests/tolaria/test_fault_matrix.py tests/tolaria/test_hostile_folders.py

kills: $(INSTALLED) ## 200 random kills over 14 configurations; resumable; writes runs/kills/kills.jsonl
	$(BIN)/python -m benchmarks.kills

conformance: $(INSTALLED) ## every conformance case of every registered plugin
	$(BIN)/pytest -n $(WORKERS) --conformance=all tests/blueprints tests/blends tests/hosts tests/tasks tests/rewards tests/kasmina

sweep-timm: $(INSTALLED) ## every architecture of timm as a host; resumable; writes docs/sweep-timm.md
	$(BIN)/python -m benchmarks.sweep_timm

sweep-transformers: $(INSTALLED) ## every transformers architecture as a host; resumable; writes docs/sweep-transformers.md
	$(BIN)/python -m benchmarks.sweep_transformers

docs: $(INSTALLED) ## write again the pages that are made from code
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/pictures/draw.py

gallery: $(INSTALLED) ## train the runs of the gallery again, five runs with their controls
	$(BIN)/python docs/gallery/gallery.py
	$(BIN)/python docs/generate.py

site: docs ## the documentation as a site in build/site; needs nothing from outside when it is read
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[docs]"
	$(BIN)/mkdocs build --strict --quiet

clean: ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
