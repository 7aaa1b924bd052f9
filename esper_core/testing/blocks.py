"""A host with two blocks that map a feature to one of the same shape, for blueprints that want the host's blocks."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.copies import BlockRun
from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.sources import run_at
from esper_core.leyline.injection import InjectionSpec
from esper_core.testing.cases import feature, installed


class PlainBlock(nn.Module):
    """h + W₂·tanh(W₁·h), position by position; any layout.

    Args:
        point: whose features it takes.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.first_channels = point.layout == "NCHW"
        self.first, self.last = (nn.Linear(point.channels, point.channels) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        """Feature in, feature of the same shape out."""
        x = h.movedim(1, -1) if self.first_channels else h
        x = x + self.last(torch.tanh(self.first(x)))
        out: Tensor = x.movedim(-1, 1) if self.first_channels else x
        return out


def block_host(point: InjectionSpec) -> ModuleHost:
    """Two blocks, `0` and `1`, one after the other, with features as at `point`; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(PlainBlock(point), PlainBlock(point))
    points = {name: (name, attrs.evolve(point, name=name, order=int(name))) for name in ("0", "1")}
    host = ModuleHost(model, points, to_logits=lambda output: output.flatten(1))
    host.example = feature(point, batch=1)
    return host


def run_for(point: InjectionSpec) -> BlockRun:
    """The run of two blocks in such a host."""
    return run_at(Plane(block_host(point), installed(), blueprints=["noop"]), "1")
