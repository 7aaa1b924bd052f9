"""P7: a planted useless blueprint and a planted essential one: how often is each culled, how often kept?

`useless` is a whole convolution behind a tanh that lets through a thousandth: it learns, pays for its parameters, and
cannot matter. `essential` is the convolution without which a host of two channels cannot tell ten digits apart. The
controller is the heuristic with Emrakul around it, who also withers what is well above its rent, so that an essential
seed must survive a real audit to be kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlueprintSpec
from esper_core.registry import load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import start_run
from esper_core.trials.jobs import map_jobs

SEEDS = 20


class Whisper(nn.Module):
    """0.001·tanh of a 3×3 convolution: C²·9 parameters for next to nothing."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(point.channels, point.channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """(N, C, H, W) to a delta of that shape."""
        return 1e-3 * torch.tanh(self.conv(h))


class Wide(nn.Module):
    """3×3 up to 16 channels, SiLU, 3×3 back; the last layer starts at zero."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(point.channels, 16, 3, padding=1), nn.Conv2d(16, point.channels, 3, padding=1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, h: Tensor) -> Tensor:
        """(N, C, H, W) to a delta of that shape."""
        return self.down(nn.functional.silu(self.up(h)))


def estimate_whisper(point: InjectionSpec) -> tuple[int, int]:
    """Parameters and FLOPs."""
    weights = 9 * point.channels**2
    return weights + point.channels, 2 * weights * point.positions


def estimate_wide(point: InjectionSpec) -> tuple[int, int]:
    """Parameters and FLOPs."""
    weights = 2 * 16 * point.channels * 9
    return weights + 16 + point.channels, 2 * weights * point.positions


def _spec(name: str, factory: str, estimate: str) -> BlueprintSpec:
    return BlueprintSpec(
        name=name, summary=f"planted: {name}", family="convolution", layouts=("NCHW",), sensors=("gradient_norm",),
        factory=f"{__name__}:{factory}", estimate=f"{__name__}:{estimate}",
    )  # fmt: skip


class _Plugin:
    @staticmethod
    @hookimpl
    def esper_blueprints() -> list[BlueprintSpec]:
        """The two planted blueprints."""
        return [
            _spec("planted-useless", "Whisper", "estimate_whisper"),
            _spec("planted-essential", "Wide", "estimate_wide"),
        ]


def run_one(job: tuple[Path, str, int]) -> dict[str, Any]:
    """One run with one planted blueprint; what became of every seed."""
    folder, name, seed = job
    file = folder / f"{name}-{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    registry = load_registry()
    registry.register(_Plugin(), name="planted", distribution="benchmarks", version="1")
    config = RunConfig(
        host="cnn", task="digits", blueprints=(f"planted-{name}",), budget_params="", overseers=("emrakul",),
        slots=("block1",),
        epochs=16, learning_rate=0.02, seed=seed, decisions_per_epoch=3, decision_examples=0,
        settings={"cnn.widths": "2,6", "cnn.pool": "stride", "emrakul.everyone": True, "emrakul.cooldown": 10},
    )  # fmt: skip
    watch = _FateRecorder()
    result = start_run(config, {"watch": watch}, registry=registry, keep=False)
    found = {
        "blueprint": name, "seed": seed, "fates": watch.fates(), "verdicts": watch.verdicts, "reasons": watch.reasons,
        "test_score": result.test_score,
    }  # fmt: skip
    file.write_text(json.dumps(found))
    return found


class _FateRecorder:
    """A sink that follows every seed to its end."""

    inline = True

    def __init__(self) -> None:
        self.living: dict[str, str] = {}
        self.ended: list[str] = []
        self.verdicts: list[str] = []
        self.reasons: list[str] = []

    def write(self, event: Any) -> None:
        if event.kind == "stage_changed":
            if event.source != "plane":
                self.reasons.append(f"{event.step} {event.before} to {event.after}: {event.reason}")
            if event.after == "culled":
                self.living.pop(event.slot, None)
                self.ended.append("culled")
            elif event.after not in ("dormant",):
                self.living[event.slot] = event.after
        elif event.kind == "audited":
            self.verdicts.append(event.verdict)

    def fates(self) -> list[str]:
        """`culled`, `fossilized`, or the stage in which the run's end found it."""
        return [*self.ended, *self.living.values()]

    def flush(self) -> None: ...

    def close(self) -> None: ...


def share_interval(right: int, count: int) -> tuple[float, float]:
    """Exact 95% interval of a share (Clopper & Pearson 1934)."""
    low, high = binomtest(right, count).proportion_ci(0.95)
    return float(low), float(high)


def run(folder: Path, seeds: int | None, workers: int) -> dict[str, Any]:
    """Every seed of both blueprints."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, name, seed) for seed in range(seeds or SEEDS) for name in ("useless", "essential")]
    rows = map_jobs(jobs, run_one, workers)
    tally = {}
    for name, good in (("useless", "culled"), ("essential", "fossilized")):
        mine = [row for row in rows if row["blueprint"] == name]
        fates = [fate for row in mine for fate in row["fates"]]
        right = fates.count(good)
        tally[name] = SimpleNamespace(
            seeds=len(fates), right=right, share=right / max(1, len(fates)),
            interval=share_interval(right, len(fates)),
            audits=sum(len(row["verdicts"]) for row in mine),
            fates={fate: fates.count(fate) for fate in sorted(set(fates))},
        ).__dict__  # fmt: skip
        print(name, tally[name], flush=True)
    bars = [
        {"bar": f"planted {n} {w} in at least 95%", "value": 100 * tally[n]["share"], "met": tally[n]["share"] >= 0.95}
        for n, w in (("useless", "culled"), ("essential", "kept"))
    ]
    return {"tally": tally, "bars": bars, "runs": rows}
