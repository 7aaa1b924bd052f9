"""Sensors of slots during training, accumulated on the device and read at decisions.

Only `read` synchronises with the device. Names and meanings of the readings are in `leyline.sensors`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.plane import Plane
from esper_core.kasmina.ranks import local
from esper_core.kasmina.slot import SeedSlot
from esper_core.leyline.errors import BadOption, did_you_mean
from esper_core.leyline.sensors import READINGS
from esper_core.leyline.stages import STAGES
from esper_core.nissa.readings import COLUMN, FLOW, SUMS, Counts, flow_readings, of_all_ranks, summarise_readings


class SensorArray:
    """Sensors at every slot of a plane.

    Use: `attach()`; after each `backward()` call `after_backward()`, after each optimizer step `after_step()`; at a
    decision `read()`. What is read is the mean over the sampled batches since the last reading, so readings depend
    on the run alone; `state_dict` lets a run resume between two readings.

    Args:
        plane: whose slots are watched, those that come later included.
        names: the readings wanted; none: attaching does nothing and nothing is paid.
        every: sample one batch in so many, the first after a reading among them.
        parts: passes whose gradients make one step; each pass's loss is divided by it.

    Raises:
        BadOption: a name that is no reading.
    """

    def __init__(self, plane: Plane, names: Iterable[str] = tuple(READINGS), *, every: int = 4, parts: int = 1) -> None:
        self.plane, self.names, self.every, self.parts = plane, frozenset(names), max(1, every), parts
        for name in sorted(self.names - READINGS.keys()):
            raise BadOption(f"no reading {name!r}", ", ".join(READINGS), did_you_mean(name, READINGS))
        self._attached = self._sampling = self._newcomers = False
        self._batch = 0
        self._rows: dict[str, int] = {}
        self._counts: dict[str, Counts] = {}
        self._calls: list[tuple[str, int, list[Tensor]]] = []
        self._before: dict[str, Tensor] = {}
        self._host = [p for p in plane.host.module.parameters() if p.requires_grad]
        self._host_size = sum(p.numel() for p in self._host)
        self._device = self._host[0].device if self._host else torch.device("cpu")
        self._zero = torch.zeros((), device=self._device)
        self._sums = torch.zeros(0, len(SUMS), device=self._device)
        self._constants: dict[tuple[object, ...], Tensor] = {}

    # In the training loop ---------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Start to measure."""
        if self.names and not self._attached:
            self._attached = True
            self._sync_rows()
            self._sample(self._batch % self.every == 0)

    def detach(self) -> None:
        """Remove the sensors; slots compute the same without them."""
        self._attached = False
        self._sample(False)

    def after_backward(self, loss_scale: float | Tensor = 1.0) -> None:
        """Take in the batch whose gradients are now in the parameters.

        Args:
            loss_scale: what the loss was multiplied by before `backward`; gradients of parameters are unscaled already.
        """
        if not self._attached:
            return
        if self._sampling:
            self._fold(loss_scale)
        self._batch += 1
        self._sync_rows()
        self._sample(self._batch % self.every == 0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Accumulate the optimizer's update of each seed."""
        if not self._before:
            return
        groups, moved = self.plane.seed_groups(), []
        for path, before in self._before.items():
            now = _flat(groups.get(path, []))
            if path in self._rows and now.shape == before.shape:
                moved.append((path, [_length(now - before), _length(before)]))
                self._counts[path].updates += 1
        if moved:
            norms = torch.stack([norm for _, pair in moved for norm in pair])
            step, size = self.plane.ranks.add_up_norms(norms).view(-1, 2).unbind(1)
            self._sums[:, COLUMN["update_ratio"]].index_add_(
                0, self._index([path for path, _ in moved]), step / size.clamp_min(1e-12)
            )
        self._before = {}

    # At a decision ----------------------------------------------------------------------------------------------

    def read(self) -> dict[str, dict[str, float]]:
        """Readings by slot since the last call; a missing key is unmeasured. Synchronises with the device."""
        table: list[list[float]] = self._sums.tolist()
        growths = self.plane.growths
        readings = {
            path: summarise_readings(table[row], self._counts[path], STAGES[growths[path].stage].occupied, self.names)
            for path, row in self._rows.items()
            if path in growths
        }
        self._begin_interval()
        return readings

    def forget_batch(self) -> None:
        """Discard the measurements of a batch whose pass was aborted."""
        self._calls.clear()

    def clear(self) -> None:
        """Discard all measurements since the last reading, as after a rollback."""
        self._newcomers = True
        self._begin_interval()

    def state_dict(self) -> dict[str, Any]:
        """JSON-compatible data; a resumed run continues from it bit for bit."""
        table: list[list[float]] = self._sums.tolist()
        slots = {
            path: {"sums": [repr(v) for v in table[row]], **attrs.asdict(self._counts[path])}
            for path, row in self._rows.items()
        }
        return {"batch": self._batch, "slots": slots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`'s answer, on a plane with the same slots.

        A slot that came after the latest sampling has no row yet, and gets it when the next batch is over, as it would
        have done without the stop.
        """
        self._sync_rows(among=state["slots"])
        self._newcomers = True  # the plane was rebuilt, and no slot has its probe
        self._batch = int(state["batch"])
        for path, saved in state["slots"].items():
            if path in self._rows:
                values = [float(v) for v in saved["sums"]]
                self._sums[self._rows[path]] = torch.tensor(values, device=self._device)
                self._counts[path] = Counts(**{k: int(v) for k, v in saved.items() if k != "sums"})
        if self._attached:
            self._sample(self._batch % self.every == 0)

    # Inside -----------------------------------------------------------------------------------------------------

    def _sample(self, on: bool) -> None:
        """Put probes into the slots, or take them out."""
        self._calls.clear()
        if on is not self._sampling or self._newcomers:
            probe = _SlotReader(self) if on else None
            for path, slot in self.plane.slots.items():
                slot.probe = probe if path in self._rows else None
        self._sampling, self._newcomers = on, False

    def _sync_rows(self, among: Container[str] | None = None) -> None:
        """Follow the plane: slots that are stacked or nested come and go. `among`: paths that may have a row."""
        slots = [path for path in self.plane.slots if among is None or path in among]
        if len(slots) == len(self._rows) and all(path in self._rows for path in slots):
            return
        sums = torch.zeros(len(slots), len(SUMS), device=self._device)
        for row, path in enumerate(slots):
            if path in self._rows:
                sums[row] = self._sums[self._rows[path]]
        self._counts = {path: self._counts.get(path) or Counts() for path in slots}
        self._rows, self._sums = {path: row for row, path in enumerate(slots)}, sums
        self._newcomers = True
        self._constants.clear()

    @torch.no_grad()
    def _forward(self, slot: SeedSlot, h: Tensor, s: Tensor | None, out: Tensor) -> None:
        if not out.requires_grad or slot.path not in self._rows:
            return
        axes = tuple(range(1, h.dim()))
        sizes = _length(h, axes)  # ‖h_i‖, (N,)
        seen = [torch.linalg.vector_norm(sizes), self._zero, self._zero]
        if s is not None:
            s = s.detach().float()
            variance, mean = torch.var_mean(s, correction=0)
            seen[1:] = mean, variance
        path, elements = slot.path, 0 if s is None else s.numel()

        def backward(g: Tensor) -> None:
            pulls = _length(g, axes)  # ‖g_i‖, (N,)
            met = self._zero if s is None else (g.float() * s).sum()
            felt = [*seen, torch.linalg.vector_norm(pulls), met, torch.dot(pulls, sizes)]
            self._calls.append((path, elements, felt))

        out.register_hook(backward)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _fold(self, loss_scale: float | Tensor) -> None:
        """Compute the readings of the batch and add them up."""
        groups = {path: group for path, group in self.plane.seed_groups().items() if path in self._rows}
        for path in groups:
            births = self.plane.growths[path].births
            if births != self._counts[path].births:
                self._counts[path] = Counts(births=births)
                self._sums[self._rows[path]].zero_()
        paths = [path for path, _, _ in self._calls]
        if paths:
            felt = torch.stack([value for _, _, values in self._calls for value in values]).view(len(paths), -1)
            roots = self._roots([n for _, n, _ in self._calls])
            if self.plane.ranks.size > 1:
                felt, roots = of_all_ranks(felt, roots, self.plane.ranks)
            flow = flow_readings(felt, roots, self.parts / loss_scale, self.parts)
            if not isinstance(loss_scale, float) or loss_scale != 1.0:
                flow = torch.nan_to_num(flow, 0.0, 0.0, 0.0)  # float16 gradients that overflowed tell nothing
            self._sums[:, : len(FLOW)].index_add_(0, self._index(paths), flow)
            for number, (path, elements, _) in enumerate(self._calls):
                self._count(path, elements > 0, flow[number, FLOW.index("proxy_loss")])
        self._take_gradients(groups)
        self._calls.clear()

    def _count(self, path: str, seeded: bool, proxy: Tensor) -> None:
        counts = self._counts[path]
        counts.calls += 1
        counts.seeded += seeded
        if seeded and not counts.known:
            counts.known = counts.first = 1
            self._sums[self._rows[path], COLUMN["first_proxy"]] = proxy

    def _take_gradients(self, groups: Mapping[str, list[nn.Parameter]]) -> None:
        """Norms of the seeds' gradients, also against the host's."""
        if not self.names & {"gradient_norm", "gradient_ratio", "update_ratio"}:
            return
        norms, paths, sizes = [], [], []
        for path, parameters in groups.items():
            gradients = _gradients(parameters)
            if gradients:
                norms.append(_norm(gradients))
                paths.append(path)
                sizes.append(math.sqrt(sum(p.numel() for p in parameters) / max(1, self._host_size)))
                self._counts[path].gradients += 1
                if "update_ratio" in self.names:
                    self._before[path] = _flat(parameters)
        if not paths:
            return
        host = _gradients(self._host) if "gradient_ratio" in self.names else []
        found = self.plane.ranks.add_up_norms(torch.stack([*norms, _norm(host)] if host else norms))
        rows, whole, found = self._index(paths), found[-1], found[: len(paths)]
        self._sums[:, COLUMN["gradient_norm"]].index_add_(0, rows, found)
        ratio = found / self._constant("sizes", sizes) / whole.clamp_min(1e-30) if host else found * math.nan
        self._sums[:, COLUMN["gradient_ratio"]].index_add_(0, rows, ratio)

    def _index(self, paths: Sequence[str]) -> Tensor:
        return self._constant("rows", [self._rows[path] for path in paths])

    def _roots(self, elements: Sequence[int]) -> Tensor:
        return self._constant("roots", [math.sqrt(n) for n in elements])

    def _constant(self, kind: str, values: Sequence[float] | Sequence[int]) -> Tensor:
        """`values` on the device; copied there once for as long as the plane's slots stay."""
        key = (kind, *values)
        if key not in self._constants:
            self._constants[key] = torch.tensor(values, device=self._device)
        return self._constants[key]

    def _begin_interval(self) -> None:
        self._sums[:, : COLUMN["first_proxy"]].zero_()
        for counts in self._counts.values():
            counts.begin_interval()
        self._before, self._batch = {}, 0
        if self._attached:
            self._sync_rows()
            self._sample(True)


class _SlotReader:
    """Connects a slot to its sensors. Copies of a slot have none, since they would report to the original's."""

    def __init__(self, array: SensorArray) -> None:
        self._array = array

    def __call__(self, slot: SeedSlot, h: Tensor, s: Tensor | None, out: Tensor) -> None:
        self._array._forward(slot, h, s, out)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [local(p.grad) for p in parameters if p.grad is not None]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors as one vector, 0-dim and float32, without waiting."""
    norms = [norm.float() for norm in torch._foreach_norm(list(tensors))]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _length(value: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
    """The norm over `axes`, all of them if None, in float32 for any dtype of the model."""
    exact = torch.promote_types(value.dtype, torch.float32)  # torch narrows none: a float64 is summed as it is
    return torch.linalg.vector_norm(value, dim=axes, dtype=exact).float()  # type: ignore[no-any-return]


def _flat(parameters: Iterable[nn.Parameter]) -> Tensor:
    parts = [local(p.detach()).flatten() for p in parameters]
    return torch.cat(parts) if parts else torch.zeros(0)
