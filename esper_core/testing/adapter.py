"""Conformance of adapters: subclass, set `spec`, and pytest checks them on a small core."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from esper_core.leyline.errors import BadFile
from esper_core.tamiyo.adapter import Adapter, build_adapter, load_adapter, merge_adapter
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tamiyo.observation import ObservationBatch, collate, observe
from esper_core.testing.base import Conformance
from esper_core.testing.cases import installed
from esper_core.testing.controller import run_view, small_plane

_BLENDS = ((0.15, 0.5, 0.85, 0.0, 0.0), (0.25, 0.5, 0.75, 1.0, 1.0))


def observations() -> ObservationBatch:
    """Two views of a small plane."""
    plane = small_plane(("residual:cosine", "gated:linear"))
    return collate([observe(run_view(plane, decision), _BLENDS) for decision in (0, 5)])


def decision_tensors(core: TamiyoCore) -> list[Tensor]:
    """What the core decides on two views: actions, value, log-probability."""
    decision = core.decide(observations(), core.initial(2))
    return [decision.actions, decision.value, decision.log_prob]


def same_tensors(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two answers are equal, bit for bit."""
    return all(map(torch.equal, left, right))


class AdapterConformance(Conformance):
    """The invariants of a kind of adapter.

    Attributes:
        options: options to build it with, beside their defaults.
        mergeable: it implements `weight_delta`.
    """

    kind = "adapter"
    options: ClassVar[Any] = MappingProxyType({})
    mergeable: ClassVar[bool] = True

    def core(self, seed: int = 0) -> TamiyoCore:
        """A small core."""
        return TamiyoCore(CoreConfig(width=32, layers=1, heads=2), seed=seed)

    def build(self, core: TamiyoCore) -> Adapter:
        """A fresh adapter on `core`."""
        return build_adapter(core, self.spec, "test", registry=installed(), options=dict(self.options))

    def shaken(self, core: TamiyoCore) -> Adapter:
        """An adapter as if trained."""
        adapter, generator = self.build(core), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return adapter

    def test_a_fresh_adapter_changes_nothing(self) -> None:
        core = self.core().requires_grad_(False)  # as with an adapter: torch takes other kernels for weights that learn
        before = decision_tensors(core)
        core.attach(self.build(core))
        assert same_tensors(before, decision_tensors(core))

    def test_it_speaks_while_attached_and_detaching_restores_every_bit(self) -> None:
        core = self.core()
        before = decision_tensors(core)
        core.attach(self.shaken(core))
        assert not same_tensors(before, decision_tensors(core)), "an adapter that cannot change a decision is none"
        core.detach()
        assert same_tensors(before, decision_tensors(core))

    def test_its_parameters_train_and_the_core_is_frozen(self) -> None:
        core = self.core()
        adapter = core.attach(self.shaken(core))
        decision = core.decide(observations(), core.initial(2))
        (decision.value.sum() + decision.log_prob.sum()).backward()  # type: ignore[no-untyped-call]
        assert any(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters())
        assert not any(p.requires_grad for name, p in core.named_parameters() if not name.startswith("adapters."))

    def test_a_file_brings_it_back(self, tmp_path: Path) -> None:
        core = self.core()
        adapter = self.shaken(core)
        adapter.save(tmp_path / "adapter.safetensors")
        core.attach(adapter)
        spoken, other = decision_tensors(core), self.core()
        other.attach(load_adapter(tmp_path / "adapter.safetensors").build(other, installed()))
        assert same_tensors(spoken, decision_tensors(other))

    def test_another_core_is_refused(self, tmp_path: Path) -> None:
        core, other = self.core(), self.core(seed=1)
        self.build(core).save(tmp_path / "adapter.safetensors")
        with pytest.raises(BadFile):
            load_adapter(tmp_path / "adapter.safetensors").build(other, installed())

    def test_merging_is_the_same_core(self) -> None:
        if not self.mergeable:
            return
        core = self.core()
        core.attach(self.shaken(core), "test")
        merged = merge_adapter(core, "test")
        assert merged.fingerprint != core.fingerprint
        pairs = zip(decision_tensors(core)[1:], decision_tensors(merged)[1:], strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
