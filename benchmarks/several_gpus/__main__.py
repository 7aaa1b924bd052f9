"""Runs the pieces one after the other, each under its own limit of time; what fails does not stop the others.

Run: python -m benchmarks.several_gpus [--pieces NAME,…] [--processes 2] [--seconds 560] [--quick]
     [--out FOLDER] [--archive FILE]
It starts its processes itself and needs no installation and no network. Every piece prints one JSON object a line as it
goes; FOLDER gets these lines and what went to stderr, and FILE all of it in one archive, renewed every few seconds.
`--quick` is a dry run of tiny models. Seconds and memory are those of process 0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Final

import attrs

ROOT: Final = Path(__file__).resolve().parent.parent.parent


@attrs.frozen
class Piece:
    """One piece: its module, how long it may take in seconds, and whether it starts its processes itself."""

    module: str
    seconds: float
    alone: bool = False


PIECES: Final = {
    "links": Piece("links", 70),
    "agreement": Piece("agreement", 100, alone=True),
    "scaling": Piece("scaling", 150),
    "billion": Piece("billion", 260),
    "simic": Piece("simic", 175, alone=True),
}


def main() -> None:
    """Run all pieces, or be one process of one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", default=",".join(PIECES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=560.0, help="of all pieces together")
    parser.add_argument("--out", default="several-gpus")
    parser.add_argument("--archive", default="several-gpus.tar.gz")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--piece", default="", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.piece:
        return be_one(asked)
    wanted = asked.pieces.split(",")
    unknown = [name for name in wanted if name not in PIECES]
    if unknown:
        parser.error(f"no piece {unknown[0]!r}; there are {', '.join(PIECES)}")
    out, until = Path(asked.out), time.monotonic() + asked.seconds
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in wanted:
        left = until - time.monotonic()
        if left < 10:
            print(f"# {name}: left out, no time", flush=True)
            failed.append(name)
            continue
        began = time.monotonic()
        codes = run_piece(name, asked, out, min(left, PIECES[name].seconds * (4 if asked.quick else 1)))
        print(f"# {name}: exit codes {codes}, {time.monotonic() - began:.0f} s", flush=True)
        failed += [name] if any(codes) else []
        pack(out, Path(asked.archive))
    sys.exit(bool(failed))


def be_one(asked: argparse.Namespace) -> None:
    """One process of a piece."""
    module = importlib.import_module(f"benchmarks.several_gpus.{PIECES[asked.piece].module}")
    function = getattr(module, asked.piece)
    if PIECES[asked.piece].alone:
        return function(asked.limit, asked.quick, asked.processes)  # type: ignore[no-any-return]
    import torch.distributed as dist

    try:
        function(asked.limit, asked.quick)
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:  # else it would wait for the others
            dist.barrier()
            dist.destroy_process_group()


def run_piece(name: str, asked: argparse.Namespace, out: Path, limit: float) -> list[int]:
    """Start the processes of one piece and wait for them, at most `limit` seconds; their exit codes."""
    count = 1 if PIECES[name].alone else asked.processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = "1" if asked.quick else str(max(1, (os.cpu_count() or 2) // asked.processes - 1))
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads,
              "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "PYTHONUNBUFFERED": "1",
              "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.several_gpus", "--piece", name, "--limit", str(limit * 0.95),
               "--processes", str(asked.processes), *(["--quick"] if asked.quick else [])]  # fmt: skip
    began, told = time.monotonic(), 0
    lines = out / f"{name}.jsonl"
    processes = []
    for rank in range(count):
        own = {} if PIECES[name].alone else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        with (
            (lines if rank == 0 else Path(os.devnull)).open("wb") as text,
            (out / f"{name}.{rank}.err").open("wb") as errors,
        ):
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=shared | own, stdout=text, stderr=errors, start_new_session=True
                )
            )
    packed = ended = 0.0
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        now = time.monotonic()
        if not ended and any(process.poll() for process in processes):
            ended = now  # one has failed, and the others may wait for it
        if now - began > limit or (ended and now - ended > 10):
            break
        told = echo(lines, told)
        if now - packed > 15:
            pack(out, Path(asked.archive))
            packed = now
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    echo(lines, told)
    return [process.returncode for process in processes]


def echo(lines: Path, told: int) -> int:
    """Print what a piece has told since, each line cut short; how much it has told."""
    data = lines.read_bytes()
    whole = data.rfind(b"\n") + 1
    for line in data[told:whole].decode(errors="replace").splitlines():
        print(line[:600], flush=True)
    return max(told, whole)


def pack(out: Path, target: Path) -> None:
    """Put everything into one archive."""
    partial = out / "archive.tmp"
    with tarfile.open(partial, "w:gz") as archive:
        for file in sorted(out.iterdir()):
            if file.suffix in (".jsonl", ".err"):
                archive.add(file, file.name)
    shutil.copyfile(partial, target)


if __name__ == "__main__":
    main()
