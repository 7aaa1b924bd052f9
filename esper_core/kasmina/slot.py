"""A slot: a point of the plane that is the identity until a seed grows in it.

Shapes: `h` is the host's feature, `s` the seed's output of the same shape; NCHW, NHWC or NLD alike.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn

from esper_core.kasmina.calls import Call
from esper_core.kasmina.random_states import random_states, set_random_states
from esper_core.kasmina.straight_through import silent_at_zero, straight_through
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.stages import EMPTY, STAGES, Stage


class Mode(Enum):
    """What a slot computes; derived from the stage, so that compiled code guards on one value."""

    IDENTITY = "identity"
    ISOLATED = "isolated"
    RAMPING = "ramping"
    ATTACHED = "attached"


def mode_of(stage: Stage) -> Mode:
    """The mode that the lifecycle table implies for `stage`."""
    properties = STAGES[stage]
    if not properties.occupied:
        return Mode.IDENTITY
    if properties.isolated:
        return Mode.ISOLATED
    return Mode.RAMPING if properties.ramping else Mode.ATTACHED


def is_evaluated(stage: Stage) -> bool:
    """Whether a seed in `stage` is computed without gradients, as on the validation split."""
    return mode_of(stage) in (Mode.RAMPING, Mode.ATTACHED)


class Probe(Protocol):
    """A sensor's place in the forward pass; see `nissa.sensors`."""

    def __call__(self, slot: SeedSlot, h: Tensor, s: Tensor | None, out: Tensor) -> None:
        """Look at one forward pass. `out` carries the gradient that the seed is taught; `s` is None without a seed."""


def at_one(combination: nn.Module, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
    """The output of a seed that is no longer blended in: at an `alpha`, 0-dim and of the dtype of `h`, that is 1.

    A combination may have a method `at_one` of these arguments, which answers the same bits with less work.
    """
    cheaper = getattr(type(combination), "at_one", None)
    return combination(h, s, alpha) if cheaper is None else cheaper(combination, h, s, alpha)  # type: ignore[no-any-return]


class Interpolation(nn.Module):
    """(1 − α)·h + α·s: a plain blend for a seed that returns a feature; exact at both ends."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """The output, of the shape of `h`."""
        return torch.lerp(h, s, alpha)

    def at_one(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """`s` itself: nothing of the host is left."""
        return s


class OfDelta(nn.Module):
    """Wraps a combination for a seed that returns a feature: its delta is s − h.

    Args:
        combination: maps (h, delta, alpha) to the output.
    """

    def __init__(self, combination: nn.Module) -> None:
        super().__init__()
        self.combination = combination

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """The output, of the shape of `h`."""
        return self.combination(h, s - h, alpha)  # type: ignore[no-any-return]

    def at_one(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """The output at an alpha of 1."""
        return at_one(self.combination, h, s - h, alpha)


class SeedSlot(nn.Module):
    """One slot. The plane moves it through the lifecycle; the slot only computes.

    Attributes:
        path: its address on the plane.
        spec: the injection point that it stands at.
        alpha: 0-dim float buffer in [0, 1], so that a change needs no recompilation.
        seed: the module that maps `h` to `s`, or None.
        combination: the blend's module that maps (h, s, alpha) to the output, or None.
        at_full: attached since alpha was 1; not where a revived seed's alpha rises in an attached stage.
        whole: the seed returns a feature, not a delta.
        wants_call: the seed also takes the call of the host's block.
        writes: the seed writes to its input in place, so that it is given a copy.
        draws: the seed may draw random numbers in training; compiled code is cut around it then.
        muted: the output is `h` in every stage; for counterfactuals.
        fold: of a seed that was merged into its layer, the factors of the layer's outputs, (outputs,); else None.
        probe: called with (slot, h, s, out) while gradients are on; None costs nothing.
        tracer: called with the slot whenever it computes; None costs nothing.
        add_up_norms: see `straight_through`; None where one process trains.
    """

    alpha: Tensor
    fold: Tensor | None

    def __init__(self, path: str, spec: InjectionSpec) -> None:
        super().__init__()
        self.path = path
        self.spec = spec
        self.stage = EMPTY
        self.mode = Mode.IDENTITY
        self.blueprint = ""
        self.blend = ""
        self.at_full = False
        self.whole = False
        self.wants_call = False
        self.writes = False
        self.draws = True
        self.muted = False
        self.probe: Probe | None = None
        self.tracer: Callable[[SeedSlot], None] | None = None
        self.add_up_norms: Callable[[Tensor], Tensor] | None = None
        self.seed: nn.Module | None = None
        self.combination: nn.Module | None = None
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("fold", None)

    @property
    def merged(self) -> bool:
        """Whether the seed is part of its layer's weight, and the slot the identity."""
        return self.fold is not None

    def merge(self, fold: Tensor) -> None:
        """Be the identity: the seed is in its layer's weight, whose rows were multiplied by `fold`."""
        self.fold, self.mode = fold, Mode.IDENTITY
        assert self.seed is not None
        self.seed.requires_grad_(False)
        for parameter in self.seed.parameters():
            parameter.grad = None

    def unmerge(self) -> None:
        """Compute again what the stage says; the seed is out of its layer's weight."""
        self.fold = None
        self.set_stage(self.stage)
        assert self.seed is not None
        self.seed.requires_grad_(True)

    def set_stage(self, stage: Stage) -> None:
        """Enter `stage`; the plane has checked that the table allows it."""
        self.stage = stage
        self.mode = mode_of(stage) if self.fold is None else Mode.IDENTITY
        # read here, since alphas of many slots are written together, past `set_alpha`
        self.at_full = self.mode is Mode.ATTACHED and not self.alpha.is_meta and self.alpha.item() == 1.0

    def set_alpha(self, value: float) -> None:
        """Fill `alpha` with `value`, in place."""
        alpha = self._buffers["alpha"]  # looked up past nn.Module, since a plane may move a thousand in a step
        assert alpha is not None
        alpha.fill_(value)
        self.at_full = self.mode is Mode.ATTACHED and value == 1.0

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """The feature that is passed on to the host: same shape, dtype and device as `h`.

        Args:
            h: the host's feature. call: of the host's block that gave it, for seeds that want it.
        """
        if self.tracer is not None:
            self.tracer(self)
        if self.mode is Mode.IDENTITY or self.muted:
            if self.probe is not None and torch.is_grad_enabled():
                out = h.clone()  # its own tensor: a host that passes a view to its slots needs a new one
                self.probe(self, h, None, out)
                return out
            return h
        assert self.seed is not None and self.combination is not None
        if self.mode is Mode.ISOLATED:
            if not torch.is_grad_enabled():
                return h
            s = self._ask_apart(h.detach(), call.detached() if call is not None else None).to(h.dtype)
            out = straight_through(h, s - h.detach() if self.whole else s, self.add_up_norms)
        else:
            given = h
            if self.mode is Mode.RAMPING:
                given = silent_at_zero(h, self.alpha)
                if call is not None and self.spec.layer is not None:
                    call = call.mapped(self._silent)
            s = self._ask(given, call).to(h.dtype)
            alpha = self.alpha.to(h.dtype)
            out = at_one(self.combination, h, s, alpha) if self.at_full else self.combination(h, s, alpha)
            out = out.to(h.dtype)
            if self.mode is Mode.RAMPING:
                # alpha may be exactly zero, where even an infinite seed must not show
                out = torch.where(self.alpha == 0, h, out)
        if self.probe is not None and torch.is_grad_enabled():
            self.probe(self, h, s - h if self.whole else s, out)
        return out

    def _silent(self, tensor: Tensor) -> Tensor:
        return silent_at_zero(tensor, self.alpha) if tensor.is_floating_point() else tensor

    def _ask(self, h: Tensor, call: Call | None) -> Tensor:
        """The seed's output for `h`, which must not be changed, as the host uses it.

        Raises:
            RuntimeError: the seed has written to `h`, or returned another shape, unlike when it was born.
        """
        assert self.seed is not None
        if self.writes:
            h = h.clone()
        # neither compiled code nor inference tensors keep count of writes
        watched = not (self.writes or torch.compiler.is_compiling() or h.is_inference())
        before = h._version if watched else 0
        s: Tensor = self.seed(h, call) if self.wants_call else self.seed(h)
        if watched and h._version != before:
            self.writes = True
            raise RuntimeError(f"the seed of {self.blueprint or 'a blueprint'} writes to its input")
        if s.shape != h.shape:  # it would be broadcast, and mix examples or positions
            raise RuntimeError(f"the seed maps {tuple(h.shape)} to {tuple(s.shape)}")
        return s

    def _ask_apart(self, h: Tensor, call: Call | None) -> Tensor:
        """Run the seed and restore the random generators, so that the host draws the same numbers as without it."""
        if torch.compiler.is_compiling():
            if not self.draws:
                return self._ask(h, call)
            before = random_states(h.device)
            s = self._ask(h, call)
            set_random_states(h.device, before)
            return s
        if h.is_cuda and torch.cuda.is_current_stream_capturing():  # a captured graph has generators of its own
            return self._ask(h, call)
        before = random_states(h.device)
        try:
            return self._ask(h, call)
        finally:
            set_random_states(h.device, before)

    def extra_repr(self) -> str:
        return f"{self.path!r}, {self.stage.value}" + (f", {self.blueprint}" if self.blueprint else "")


class SlotStack(nn.Module):
    """The slots at one injection point, one upon the other; the first is the oldest."""

    def __init__(self, first: SeedSlot) -> None:
        super().__init__()
        self.slots = nn.ModuleList([first])

    @property
    def wants_call(self) -> bool:
        """Whether a seed in it wants the call of the host's block."""
        return any(slot.wants_call for slot in self.slots)

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """Feature in, feature of the same shape out."""
        for slot in self.slots:
            h = slot(h, call)
        return h
