"""Run one protocol: `python -m benchmarks.growth p1`. Figures go to `benchmarks/growth/results/`."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.growth import page
from benchmarks.growth.arms import PROTOCOLS, run_arms, show, write

OTHERS = {"p4": "adaptation", "p6": "lab", "p7": "planted"}


def main() -> None:
    """Parse, run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("protocol", choices=[*sorted([*PROTOCOLS, *OTHERS]), "page"])
    parser.add_argument("--folder", type=Path, default=Path("runs/growth"), help="where runs are kept and resumed from")
    parser.add_argument("--seeds", type=int, default=None, help="other than the protocol's own number")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    if args.protocol == "page":
        print("written to", page.write())
        return
    torch.set_num_threads(1)
    about = {
        "protocol": args.protocol,
        "command": f"python -m benchmarks.growth {args.protocol}" + (f" --seeds {args.seeds}" if args.seeds else ""),
        "machine": f"{_processor()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if args.protocol in PROTOCOLS:
        result = run_arms(args.protocol, args.folder, args.seeds, args.workers)
        show(result)
    else:
        module = import_module(f"benchmarks.growth.{OTHERS[args.protocol]}")
        result = module.run(args.folder / args.protocol, args.seeds, args.workers)
    print("written to", write(args.protocol, result, about))


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
