"""Run a frontier protocol: `python -m benchmarks.growth.frontier p9`. Cut off anywhere, it goes on where it stopped.

Rows go to `benchmarks/growth/results/NAME.jsonl`, the summary to `NAME.json` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth.frontier import ablation, anytime
from benchmarks.growth.frontier.protocols import PROTOCOLS
from esper_core.trials.frontier.job import Job
from esper_core.trials.frontier.plan import Frontier
from esper_core.trials.frontier.queue import read_rows, run_queue
from esper_core.trials.frontier.table import equal_loss, show_frontier, summarise_frontier

LISTS = {"p10": anytime, "ablation": ablation}
"""Protocols that are lists of runs, without tuning."""
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Parse, run, summarise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("protocol", choices=sorted([*PROTOCOLS, *LISTS]))
    parser.add_argument("--rows", type=Path, default=None, help="JSONL of finished jobs (results/NAME.jsonl)")
    parser.add_argument("--data", default=None, help="P8: prefix of the three text files, such as text/english")
    parser.add_argument("--cuda", type=int, default=0, help="processes on the GPU")
    parser.add_argument("--cpu", type=int, default=0, help="processes of one thread each")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no job is begun")
    parser.add_argument(
        "--jobs", type=Path, default=None, help="JSON list of jobs to run in place of the protocol's plan, in its order"
    )
    parser.add_argument("--only", default="", help="budgets by name, with commas, such as p8,p8-1e15")
    parser.add_argument("--show", action="store_true", help="only summarise the rows there are")
    parser.add_argument(
        "--refresh", action="store_true", help="write the summary of the rows again; it was measured where it was"
    )
    args = parser.parse_args()
    began = time.monotonic()
    rows = args.rows or RESULTS / f"{args.protocol}.jsonl"
    workers = {kind: count for kind, count in (("cuda", args.cuda), ("cpu", args.cpu)) if count} or {"cpu": 2}
    told: dict[str, Any] = {
        "protocol": args.protocol,
        "command": f"python -m benchmarks.growth.frontier {args.protocol}",
        "machine": f"{os.cpu_count()} cores, {torch.cuda.get_device_name() if args.cuda else 'CPU'}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if args.refresh:
        before = json.loads(rows.with_suffix(".json").read_text(encoding="utf-8"))
        told |= {key: before[key] for key in ("machine", "versions")}
    idle = args.show or args.refresh
    if args.jobs is not None:
        jobs = [Job.from_mapping(told) for told in json.loads(args.jobs.read_text(encoding="utf-8"))]
        base = _base(args.protocol, args.data)
        done = run_queue(lambda rows: jobs, base, rows, workers=workers, limit=args.limit, notify=_say)
        print("every job is done" if done else f"not every job is done; the rows so far are in {rows}")
        return
    if args.protocol in LISTS:
        module = LISTS[args.protocol]
        if not idle:
            run_queue(module.plan, module.BASE, rows, workers=workers, limit=args.limit, notify=_say)
        found = read_rows(rows)
        summary = module.summarise(found)
        print(module.show(summary))
        _end({**told, "whole": _is_whole([module.plan], found), **summary}, rows, args.show)
        return
    frontiers = _frontiers(args.protocol, args.data)
    if args.only:
        frontiers = [f for f in frontiers if f.name in args.only.split(",")]
    for frontier in frontiers if not idle else ():
        left = args.limit - (time.monotonic() - began)
        run_queue(frontier.plan, frontier.base, rows, workers=workers, limit=left, notify=_say)
    found = read_rows(rows)
    whole = _is_whole([frontier.plan for frontier in frontiers], found)
    summaries = [summarise_frontier(frontier, found) for frontier in frontiers]
    for summary in summaries:
        print(show_frontier(summary))
    _end({**told, "whole": whole, "summaries": summaries, "equal_loss": equal_loss(summaries)}, rows, args.show)


def _frontiers(protocol: str, data: str | None) -> Sequence[Frontier]:
    return PROTOCOLS[protocol](**({"data": data} if data else {}))


def _base(protocol: str, data: str | None) -> Mapping[str, Any]:
    """Configuration that all runs of a protocol share; jobs hold what differs."""
    return LISTS[protocol].BASE if protocol in LISTS else _frontiers(protocol, data)[0].base


def _is_whole(plans: Iterable[Callable[[Any], Iterable[Any]]], rows: list[dict[str, Any]]) -> bool:
    done = {row["key"] for row in rows}
    return all(job.key in done for plan in plans for job in plan(rows))


def _say(text: str) -> None:
    print(text, flush=True)


def _end(told: dict[str, Any], rows: Path, only_show: bool) -> None:
    if not only_show:
        rows.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print("everything is done" if told["whole"] else f"not everything is done; the rows so far are in {rows}")


if __name__ == "__main__":
    main()
