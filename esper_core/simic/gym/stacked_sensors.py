"""Sensor readings of the slots of a stacked population, as `nissa.sensors` has them for one model.

Shapes: N environments, P points, L lanes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper_core.kasmina.ledger import count_parameters
from esper_core.leyline.sensors import READINGS
from esper_core.nissa.readings import COLUMN, FLOW, SUMS, Counts, flow_readings, summarise_readings

if TYPE_CHECKING:
    from esper_core.simic.gym.cuda_engine import StackedPopulation

_COUNTS = ("calls", "seeded", "first", "gradients", "updates")


class StackedSensors:
    """Sensors at every slot of a stacked population. `fold` and `moved` run inside its step and wait for nothing.

    Attributes:
        mask: (N,) who samples the coming step.
        sums: (N, P, readings) as in `SensorArray`. counts: (N, P, 5) of `nissa.readings.Counts`. known: (N, P).
    """

    def __init__(self, population: StackedPopulation) -> None:
        self.population = population
        shape, device = population.rows.shape, population.device
        self.mask = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.sums = torch.zeros(*shape, len(SUMS), device=device)
        self.counts = torch.zeros(*shape, len(_COUNTS), device=device)
        self.known = torch.zeros(shape, dtype=torch.bool, device=device)
        self._felt = torch.zeros(0, device=device)
        self._roots: dict[tuple[float, ...], Tensor] = {}
        host = population.planes[0].host.module
        self._host_size = sum(p.numel() for p in host.parameters() if p.requires_grad)
        self._mask = [False] * shape[0]
        population.sensors = self
        self.resize()

    def resize(self) -> None:
        """Follow the population, whose lanes are others now."""
        stacks, device = self.population.arena.stacks, self.population.device
        sizes, seed, own = [], [], []
        for stack in stacks:
            size = math.sqrt(count_parameters(stack.template) / max(1, self._host_size))
            sizes += [size] * stack.lanes
            seed += [any(name.startswith("seed.") for name in stack.shapes)] * stack.lanes
            own += [bool(stack.shapes)] * stack.lanes
        self._sizes = torch.tensor([1.0, *sizes], device=device)
        self._seed = torch.tensor([False, *seed], device=device)
        self._own = torch.tensor([False, *own], device=device)

    def sample(self, who: Sequence[bool]) -> bool:
        """Let these environments sample the coming step; whether there is one."""
        if list(who) != self._mask:
            self._mask = list(who)
            self.mask.copy_(torch.tensor(self._mask))
        return any(who)

    def forget(self, k: int, point: int) -> None:
        """Another seed grows in environment k."""
        self.known[k, point] = False
        self.sums[k, point] = 0.0
        self.counts[k, point] = 0.0

    @torch.no_grad()
    def fold(self, norms: Tensor) -> None:
        """Take in the batch whose gradients have the norms (L,) by lane."""
        population = self.population
        rows, flags, points = population.rows, population.flags, population.points.values()
        seeded, mask = rows > 0, self.mask[:, None]
        felt = torch.stack([p.felt for p in points], 1)  # (N, P, 3)
        said = _padded(flags.said)[rows]  # (N, P, 2)
        met = _padded(flags.met)[rows]
        key = tuple(p.root for p in points)
        if key not in self._roots:  # known before a graph is captured, in which nothing may come from the host
            self._roots[key] = torch.tensor(key, device=rows.device)
        roots = self._roots[key]
        calls = torch.stack([felt[..., 0], said[..., 0], said[..., 1], felt[..., 1], met, felt[..., 2]], -1)
        flow = flow_readings(calls.flatten(0, 1), (roots * seeded).flatten(), 1.0).reshape(*rows.shape, -1)
        live = mask & seeded
        fresh = live & ~self.known
        self.sums[..., : len(FLOW)] += torch.where(mask[..., None], flow, 0.0)
        first = self.sums[..., COLUMN["first_proxy"]]
        first.copy_(torch.where(fresh, flow[..., FLOW.index("proxy_loss")], first))
        self.known |= fresh
        isolated = _padded(flags.isolated)[rows]
        taught = live & torch.where(isolated, self._seed[rows], self._own[rows])
        norm, hosts = _padded(norms)[rows], norms[: len(rows), None]
        ratio = norm / self._sizes[rows] / hosts.clamp_min(1e-30)
        for name, value in (("gradient_norm", norm), ("gradient_ratio", ratio)):
            self.sums[..., COLUMN[name]] += torch.where(taught, value, 0.0)
        counted = (mask.expand_as(live), live, fresh, taught, taught)
        self.counts += torch.stack([c.float() for c in counted], -1)
        self._felt = taught

    @torch.no_grad()
    def moved(self, steps: Tensor, sizes: Tensor) -> None:
        """Take in how far the optimizer moved each lane (L,), and how long its weights were."""
        rows = self.population.rows
        ratio = _padded(steps)[rows] / _padded(sizes)[rows].clamp_min(1e-12)
        self.sums[..., COLUMN["update_ratio"]] += torch.where(self._felt, ratio, 0.0)

    def read(self) -> list[dict[str, dict[str, float]]]:
        """Readings of each environment by slot since the last call. Waits for the device."""
        population = self.population
        table = torch.cat([self.sums, self.counts], -1).tolist()
        readings = []
        for k, plane in enumerate(population.planes):
            mine = {}
            for p, path in enumerate(population.points):
                row = table[k][p]
                counts = Counts(**dict(zip(_COUNTS, map(int, row[len(SUMS) :]), strict=True)))
                occupied = plane.slots[path].seed is not None
                mine[path] = summarise_readings(row[: len(SUMS)], counts, occupied, READINGS.keys())
            readings.append(mine)
        self.sums[..., : COLUMN["first_proxy"]] = 0.0
        self.counts.zero_()
        return readings

    def clear(self, k: int) -> None:
        """Forget what environment k gathered since the last reading, as after a rollback."""
        self.sums[k, :, : COLUMN["first_proxy"]] = 0.0
        self.counts[k] = 0.0


def _padded(lanes: Tensor) -> Tensor:
    """(L, …) → (L + 1, …), where 0 stands for no lane."""
    return torch.cat([lanes.new_zeros(1, *lanes.shape[1:]), lanes])
