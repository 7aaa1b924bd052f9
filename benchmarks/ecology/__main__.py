"""Run one protocol: `python -m benchmarks.ecology planted --workers 16`. It goes on where it was stopped.

Runs go to `FOLDER/PROTOCOL.jsonl`, one line each; figures to `FOLDER/PROTOCOL.json`, and they are printed.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.ecology.rows import run_rows, stop_after
from esper_core.storage.tensor_file import write_json_file

PROTOCOLS = ("planted", "fading", "bloat", "lattice", "long", "organ")


def main() -> None:
    """Parse, run, judge, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/ecology"), help="where rows are kept and resumed from"
    )
    parser.add_argument("--seeds", type=int, default=None, help="other than the protocol's own number")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds; what is not done by then is done next time")
    parser.add_argument("--small", action="store_true", help="short runs, to see that it works")
    args = parser.parse_args()
    protocol = import_module(f"benchmarks.ecology.{args.protocol}")
    stem = args.folder / (args.protocol + ("-small" if args.small else ""))
    if args.limit:
        stop_after(args.limit)
    rows = run_rows(stem.with_suffix(".jsonl"), protocol.jobs(args.seeds, args.small), protocol.work, args.workers)
    result = protocol.judge(rows)
    about = {
        "command": f"python -m benchmarks.ecology {args.protocol}",
        "seeds": args.seeds, "small": args.small, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    write_json_file(stem.with_suffix(".json"), {**about, **result})
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['value']}")
    print("written to", stem.with_suffix(".json"))


if __name__ == "__main__":
    main()
