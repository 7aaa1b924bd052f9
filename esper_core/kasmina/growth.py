"""The state of each slot: plain data for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs
from torch import nn

from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.stages import EMPTY, Gate, Stage
from esper_core.leyline.view import Interval


@attrs.define
class Growth:
    """The state of a slot. Steps are optimizer steps, ages are decision steps.

    Attributes:
        stage: where the seed stands; `resume_stage` is where REVIVE would return to.
        blueprint, blend, tempo, options: what grows here and how it blends.
        direct: the seed learns nothing in isolation, and begins to blend as soon as it is born.
        origins: the points behind whose blocks the clones in the seed come from.
        merged: the seed is part of its layer's weight; params and flops are 0 then.
        culled: blueprint to how many seeds of it were culled here.
        barren: family to decision steps for which no seed of it may germinate here, since one was culled as useless.
        births: seeds that have germinated here; with the plane's seed it fixes the next one's initial weights.
        params, flops: of the seed and its blend; flops of one example's forward pass.
        age, stage_age, stage_steps: since birth and since the stage began.
        alpha, ramp_start, ramp_target, ramp_steps, ramp_done: the current ramp.
        embargo_left: decision steps until the slot may germinate.
        loss, accuracy: the latest counterfactual; None when unmeasured.
        counterfactual_count: counterfactuals measured in the current stage.
        probation_count: of these, consecutive ones that exceeded the rent.
        readings: the latest sensor readings.
    """

    stage: Stage = EMPTY
    resume_stage: Stage | None = None
    blueprint: str = ""
    blend: str = ""
    tempo: Tempo = Tempo.STANDARD
    options: dict[str, Any] = attrs.Factory(dict)
    direct: bool = False
    origins: list[str] = attrs.Factory(list)
    merged: bool = False
    culled: dict[str, int] = attrs.Factory(dict)
    barren: dict[str, int] = attrs.Factory(dict)
    births: int = 0
    params: int = 0
    flops: int = 0
    age: int = 0
    stage_age: int = 0
    stage_steps: int = 0
    alpha: float = 0.0
    ramp_start: float = 0.0
    ramp_target: float = 0.0
    ramp_steps: int = 0
    ramp_done: int = 0
    embargo_left: int = 0
    loss: Interval | None = None
    accuracy: Interval | None = None
    counterfactual_count: int = 0
    probation_count: int = 0
    readings: dict[str, float] = attrs.Factory(dict)

    def enter(self, stage: Stage) -> None:
        """Begin `stage` with the counters of a stage at zero."""
        self.stage = stage
        self.stage_age = self.stage_steps = 0
        self.counterfactual_count = self.probation_count = 0

    def clear(self) -> None:
        """Forget the seed; births, losses and embargo stay."""
        fresh = Growth(
            culled=self.culled, barren=self.barren, births=self.births, embargo_left=self.embargo_left, stage=self.stage
        )
        for field in attrs.fields(Growth):
            setattr(self, field.name, getattr(fresh, field.name))

    def start_ramp(self, target: float, steps: int) -> None:
        """Move alpha from where it is to `target` within `steps` optimizer steps."""
        self.ramp_start, self.ramp_target = self.alpha, target
        self.ramp_steps, self.ramp_done = max(1, steps), 0

    @property
    def ramping(self) -> bool:
        """Whether alpha still moves."""
        return self.ramp_done < self.ramp_steps

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible data."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Growth:
        """The inverse of `to_dict`."""
        values = dict(data)
        values["stage"] = Stage(values["stage"])
        values["resume_stage"] = Stage(values["resume_stage"]) if values["resume_stage"] else None
        values["tempo"] = Tempo(values["tempo"])
        for key in ("loss", "accuracy"):
            values[key] = Interval(**values[key]) if values[key] else None
        return cls(**values)


_Z: Final = 1.959963984540054


def _progress_high(growth: Growth, rent: float) -> float | None:
    """Upper end of the 95% interval of `proxy_progress`, which is noisy from batch to batch."""
    progress = growth.readings.get("proxy_progress")
    return None if progress is None else progress + _Z * growth.readings.get("proxy_error", 0.0)


_MEASURES: Final[Mapping[str, Callable[[Growth, float], float | None]]] = MappingProxyType(
    {
        "proxy_progress_high": _progress_high,
        "direct": lambda growth, rent: float(growth.direct),
        "stage_steps": lambda growth, rent: growth.stage_steps,
        "alpha": lambda growth, rent: growth.alpha,
        "alpha_progress": lambda growth, rent: growth.ramp_done / growth.ramp_steps if growth.ramp_steps else None,
        "counterfactual_count": lambda growth, rent: growth.counterfactual_count,
        "probation_count": lambda growth, rent: growth.probation_count,
        "net_contribution": lambda growth, rent: growth.loss.mean - rent if growth.loss else None,
        "embargo_left": lambda growth, rent: growth.embargo_left,
    }
)


def gate_value(gate: Gate, growth: Growth, rent: float) -> float | None:
    """The quantity that `gate` tests, or None when it is unmeasured.

    Args:
        rent: what the slot's seed pays, in nats.
    """
    measure = _MEASURES.get(gate.measure)
    return measure(growth, rent) if measure else growth.readings.get(gate.measure)


@attrs.frozen
class StageChange:
    """A slot moved.

    Attributes:
        slot: its path. before, after: stages. command: the cause.
        blueprint, blend: of the seed that moved (also of one that is gone now).
        added, removed: parameters that came to life or left the model.
        inherits: each of the added that is a copy, with the parameter that it is a copy of.
        deepens: the seed is made of the host's own blocks.
    """

    slot: str
    before: Stage
    after: Stage
    command: Command
    blueprint: str
    blend: str
    added: tuple[nn.Parameter, ...] = ()
    removed: tuple[nn.Parameter, ...] = ()
    inherits: tuple[tuple[nn.Parameter, nn.Parameter], ...] = ()
    deepens: bool = False
