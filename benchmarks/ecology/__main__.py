"""Run protocols: `python -m benchmarks.ecology planted long --workers 16`. The same command goes on where it stopped.

Runs go to `FOLDER/PROTOCOL.jsonl`, one line each; figures to `FOLDER/PROTOCOL.json`, and they are printed. Several
protocols share the workers, in the order given.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
from importlib import import_module
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.ecology.rows import Queued, key_of, read_rows, run_rows, stop_after
from esper_core.storage.tensor_file import write_json_file

PROTOCOLS: Final = ("planted", "fading", "bloat", "lattice", "long", "organ")


def main() -> None:
    """Parse, run, judge, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("protocols", choices=PROTOCOLS, nargs="+", metavar="PROTOCOL", help=", ".join(PROTOCOLS))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/ecology"), help="where rows are kept and resumed from"
    )
    parser.add_argument("--seeds", type=int, default=None, help="other than the protocol's own number")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds; what is not done by then is done next time")
    parser.add_argument("--only", default="", help="KEY=VALUE: of jobs that have this key, those with this value")
    parser.add_argument("--small", action="store_true", help="short runs, to see that it works")
    parser.add_argument("--found", action="store_true", help="run nothing; judge the runs that there are")
    args = parser.parse_args()
    protocols = {name: import_module(f"benchmarks.ecology.{name}") for name in dict.fromkeys(args.protocols)}
    files = {name: args.folder / f"{name}{'-small' if args.small else ''}.jsonl" for name in protocols}
    key, _, value = args.only.partition("=")
    jobs = {
        name: [job for job in protocol.jobs(args.seeds, args.small) if not key or str(job.get(key, value)) == value]
        for name, protocol in protocols.items()
    }
    if not args.found:
        if args.limit:
            stop_after(args.limit)
        queue = [Queued(files[name], job, protocols[name].work) for name in protocols for job in jobs[name]]
        run_rows(queue, args.workers)
    about = {
        "seeds": args.seeds, "small": args.small, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    for name, protocol in protocols.items():
        rows = read_rows(files[name])
        mine = [row for job in jobs[name] if (row := rows.get(key_of(job))) is not None]
        result: dict[str, Any] = protocol.judge(mine)
        report = files[name].with_suffix(".json")
        command = f"python -m benchmarks.ecology {name}"
        found = {"command": command, **about, "runs": len(mine), "of": len(jobs[name]), **result}
        write_json_file(report, _plain(found))
        print(f"{name}: {len(mine)} of {len(jobs[name])} runs")
        for bar in result["bars"]:
            print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['value']}")
        print("written to", report)


def _plain(value: Any) -> Any:
    """`value` with null for what is not finite, such as the interval of a single pair: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
