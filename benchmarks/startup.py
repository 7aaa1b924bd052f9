"""How long `esper` takes to answer, beside importing the three libraries that it stands on.

    python -m benchmarks.startup [--runs 15] [--json]

Every command runs once in turn, over and over, so that a busy moment of the machine slows all of them alike; compiled
bytecode is cached, as on every call but the first. The ratio of medians must be at most 1.6.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

BAR = 1.6
BASE = "import click, pluggy, attrs"
COMMANDS: Mapping[str, Sequence[str]] = {
    BASE: ("-c", BASE),
    "esper --help": ("-m", "esper_core", "--help"),
    "esper --version": ("-m", "esper_core", "--version"),
    "esper plugins list --json": ("-m", "esper_core", "plugins", "list", "--json"),
}


def measure(
    commands: Mapping[str, Sequence[str]], runs: int, environments: Sequence[Mapping[str, str]] = ({},)
) -> list[dict[str, list[float]]]:
    """Seconds of each run of each command in each environment, one run of everything in turn.

    The first round writes the bytecode and is not counted.
    """
    seconds: list[dict[str, list[float]]] = [{name: [] for name in commands} for _ in environments]
    with tempfile.TemporaryDirectory() as bytecode:
        base = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        base["PYTHONPYCACHEPREFIX"] = bytecode
        for index in range(runs + 1):
            for environment, times in zip(environments, seconds, strict=True):
                for name, arguments in commands.items():
                    environ = {**base, **environment}
                    started = time.perf_counter()
                    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, env=environ)
                    if index:
                        times[name].append(time.perf_counter() - started)
    return seconds


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}


def main() -> int:
    """Measure, print, and return 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    (seconds,) = measure(COMMANDS, arguments.runs)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median / medians[BASE] for name, median in medians.items()}
    met = all(ratio <= BAR for ratio in ratios.values())
    if arguments.json:
        answer = {"machine": machine(), "runs": arguments.runs, "bar": BAR, "seconds": medians, "ratios": ratios}
        print(json.dumps({**answer, "met": met}, indent=2))
    else:
        for name, median in medians.items():
            print(f"{name:<30} {1000 * median:7.1f} ms   × {ratios[name]:.2f}")
        print(f"bar × {BAR}: {'met' if met else 'MISSED'} (medians of {arguments.runs} interleaved runs)")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
