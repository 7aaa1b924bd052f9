"""Interleaved timing: every round times each contender once, so that a drifting machine drifts for all alike."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 3,
    repeats: int = 1,
    shuffled: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    around: Mapping[str, Callable[[], AbstractContextManager[object]]] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    Args:
        contenders: name to what is timed.
        rounds: how often each is timed.
        warmup: rounds that are not counted.
        repeats: calls within one timing; the answer is seconds for one call.
        shuffled: whether a round's order is drawn, instead of beginning with another contender each time.
        clock: `time.process_time` leaves out what other processes did meanwhile.
        around: name to a context in which the contender is timed; entering and leaving it are not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    generator = random.Random(0)
    for number in range(warmup + rounds):
        first = number % len(order)  # who comes after whom matters to the caches, so each round begins elsewhere
        turn = generator.sample(order, len(order)) if shuffled else [*order[first:], *order[:first]]
        for name, run in turn:
            with around.get(name, nullcontext)():
                start = clock()
                for _ in range(repeats):
                    run()
                took = clock() - start
            if number >= warmup:
                seconds[name].append(took / repeats)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, baseline: str) -> float:
    """Median over rounds of `name`'s time over `baseline`'s time in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[baseline], strict=True))


def interval(seconds: Mapping[str, list[float]], name: str, baseline: str) -> tuple[float, float]:
    """The 95% interval of `ratio`: of its value over rounds drawn again and again from those measured."""
    pairs = [a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(pairs, k=len(pairs))) for _ in range(1000))
    return medians[25], medians[974]


def run_program(about: str, measure: Callable[[Any, int], dict[str, Any]], cases: Iterable[Any]) -> None:
    """What a benchmark of several cases does as a program: measure on one thread, print, write with `--json`.

    Args:
        about: the program's docstring. measure: takes a case and a number of rounds.
    """
    import torch

    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, args.rounds) for case in cases]
    for row in rows:
        print(row)
    if args.json:
        told = {"machine": machine(), "rounds": args.rounds, "rows": rows}
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
