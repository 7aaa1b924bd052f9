"""Every architecture that timm lists, at the smallest input it takes: points, identity, a seed that trains.

python -m benchmarks.sweep_timm --workers 16
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.host_check import check_host, fast_initialisation, quiet_forever, ready_registry, stage
from benchmarks.sweeping import arguments, markdown, sweep
from esper_core.kasmina.module_host import host_from_module
from esper_hosts.timm import build_empty, choose_size

HUGE = 3_000_000_000
"""Parameters from which on a model is built in bfloat16, so that it fits into 24 GB."""

ROWS, PAGE = "benchmarks/results/sweep-timm.jsonl", "docs/sweep-timm.md"


def check(name: str) -> dict[str, Any]:
    """Build one model with random weights and run the whole check on it."""
    with stage("build"):
        empty = build_empty(name)
        size = choose_size(name, empty, (3, 1, 1))
        if sum(p.numel() for p in empty.parameters()) > HUGE:
            torch.set_default_dtype(torch.bfloat16)
        torch.manual_seed(0)
        model = timm.create_model(name, **size.arguments)
    with stage("points"):
        host = host_from_module(model, example=torch.randn(1, 3, size.size, size.size))
    return {"size": size.size, **check_host(host, torch.randn(2, 3, size.size, size.size))}


def main() -> int:
    """Sweep and write the table."""
    options = arguments(__doc__.splitlines()[0], ROWS, PAGE).parse_args()
    quiet_forever()
    ready_registry()
    fast_initialisation()
    names = timm.list_models()
    results = sweep(names, check, options)
    notes = [
        f"Every architecture of `timm.list_models()` in timm {timm.__version__} with torch {torch.__version__}: built",
        "with random weights for the smallest input that it takes, at least one point found, output bit-identical with",
        "dormant slots and with an isolated seed, the seed trained for one step. Weights that start at zero get small",
        "noise first, since no gradient passes through them before the host's own first step.",
    ]
    page = markdown("timm sweep", "make sweep-timm", results, notes, names)
    if options.table != "-":
        Path(options.table).write_text(page)
    print("\n".join(page.splitlines()[4:60]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
