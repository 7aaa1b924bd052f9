"""What of growing by copies it is that pays: one thing changed at a time, at P9's budget, on validation text.

A GPT of two blocks of width 48 doubles its depth once when a fifth of 5e12 FLOP is spent: by copies as a stack, with
the optimizer's moments, at once. Beside it the static networks of both sizes. One rate for all, and paired seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

import attrs

from benchmarks.growth.frontier.protocols import STDLIB, WARM
from esper_core.leyline.pairs import FEWEST
from esper_core.trials.frontier.job import Job
from esper_core.trials.intervals import paired_interval

BASE: Final = STDLIB
SEEDS: Final = 3
_STEPS: Final = 2192
"""Of the host alone at this budget, of which a ramp is a share."""

_REFERENCE: Final = Job(
    arm="copies",
    budget=5e12,
    size={"layers": 2, "width": 48},
    rate=0.008,
    grow=((0.2, 2),),
    slot="blocks.1",
    config=WARM,
)


def _ramp(steps: int) -> Job:
    return attrs.evolve(
        _REFERENCE, arm=f"blended in over {steps} steps", tempo="standard", settings={"plane.ramp": steps / _STEPS}
    )


VARIANTS: Final = (
    _REFERENCE,
    attrs.evolve(_REFERENCE, arm="without moments", moments=False),
    attrs.evolve(_REFERENCE, arm="interleaved", order="interleave"),
    attrs.evolve(_REFERENCE, arm="zero output", birth="zero"),
    attrs.evolve(_REFERENCE, arm="random weights", birth="random"),
    *map(_ramp, (30, 100, 500)),
    *(attrs.evolve(_REFERENCE, arm=f"at {share:g} of the budget", grow=((share, 2),)) for share in (0.1, 0.3, 0.45)),
    attrs.evolve(_REFERENCE, arm="static 2x48", grow=(), slot=""),
    attrs.evolve(_REFERENCE, arm="static 4x48", grow=(), slot="", size={"layers": 4, "width": 48}),
)


def plan(rows: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
    """Every variant, seed by seed."""
    for seed in range(SEEDS):
        for job in VARIANTS:
            yield attrs.evolve(job, seed=seed)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Validation losses by variant, and the paired difference from the first, as a share."""
    found = {row["key"]: row["loss"] for row in rows}
    losses = {
        job.arm: {s: found[key] for s in range(SEEDS) if (key := attrs.evolve(job, seed=s).key) in found}
        for job in VARIANTS
    }
    arms = []
    for name, by_seed in losses.items():
        both = [seed for seed in by_seed if seed in losses["copies"]]
        shares = [by_seed[seed] / losses["copies"][seed] - 1 for seed in both]
        mean, low, high = paired_interval(shares, [0.0] * len(shares)) if len(shares) >= FEWEST else (None, None, None)
        arms.append({"name": name, "loss": list(by_seed.values()), "share": mean, "low": low, "high": high})
    return {"name": "ablation", "arms": arms}


def show(summary: Mapping[str, Any]) -> str:
    """The summary as text."""
    lines = ["== what pays: validation loss, and the difference from copies in percent"]
    for arm in sorted((arm for arm in summary["arms"] if arm["loss"]), key=lambda arm: fmean(arm["loss"])):
        told = ""
        if arm["share"] is not None:
            told = f"{100 * arm['share']:+.2f}% [{100 * arm['low']:+.2f}, {100 * arm['high']:+.2f}]"
        lines.append(f"  {arm['name']:28s} {fmean(arm['loss']):.4f} {told} ({len(arm['loss'])} seeds)")
    return "\n".join(lines)
