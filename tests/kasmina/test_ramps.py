"""Alphas written together are those written one by one; a copy of the plane writes only its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.ramps import FEW, AlphaWriter, Shares
from esper_core.kasmina.slot import SeedSlot
from esper_core.leyline.injection import InjectionSpec
from esper_core.registry import load_registry

COUNT = 3 * FEW


def many_slots(curve: str = "cosine") -> Plane:
    specs = {f"l{i}": (str(i), InjectionSpec(f"l{i}", 4, "NLD", i, (3, 4))) for i in range(COUNT)}
    host = ModuleHost(nn.Sequential(*(nn.Linear(4, 4) for _ in range(COUNT))), specs)
    return Plane(host, load_registry(), blends=(f"residual:{curve}",), ramp_steps=7)


def blend_all(plane: Plane) -> None:
    for path in plane.slots:
        plane.germinate(path, "norm")
    plane.step()
    for path in plane.slots:
        plane.advance(path, gated=False)


@pytest.mark.parametrize("curve", ["linear", "cosine", "sigmoid"])
def test_alphas_are_to_the_bit_those_of_one_slot(curve: str) -> None:
    plane = many_slots(curve)
    blend_all(plane)
    build = plane.registry.build("blend", curve)
    for done in range(1, 7):
        plane.step()
        expected = build(done / 7)
        assert {growth.alpha for growth in plane.growths.values()} == {expected}
        assert all(torch.equal(slot.alpha, torch.zeros(()).fill_(expected)) for slot in plane.slots.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_writing_together_rounds_as_writing_alone(dtype: torch.dtype) -> None:
    spec = InjectionSpec("point", 4, "NLD", 0, (3, 4))
    together = [SeedSlot(str(i), spec).to(dtype) for i in range(COUNT)]
    alone = [SeedSlot(str(i), spec).to(dtype) for i in range(COUNT)]
    writer = AlphaWriter()
    for shift in (0.0, 0.1):  # the second time into elements that are there already
        values = [(i + shift) / COUNT for i in range(COUNT)]
        writer.write(together, values)
        for slot, value in zip(alone, values, strict=True):
            slot.set_alpha(value)
        assert all(torch.equal(a.alpha, b.alpha) for a, b in zip(together, alone, strict=True))
        assert together[0].alpha.dtype is dtype


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda writer: pickle.loads(pickle.dumps(writer))])
def test_a_copied_writer_writes_its_own_values(clone) -> None:
    spec = InjectionSpec("point", 4, "NLD", 0, (3, 4))
    ours, theirs = ([SeedSlot(str(i), spec) for i in range(COUNT)] for _ in range(2))
    writer = AlphaWriter()
    writer.write(ours, [0.25] * COUNT)
    clone(writer).write(theirs, [0.75] * COUNT)
    assert {float(slot.alpha) for slot in ours} == {0.25} and {float(slot.alpha) for slot in theirs} == {0.75}


def test_a_copied_plane_goes_its_own_way() -> None:
    plane = many_slots()
    blend_all(plane)
    plane.step()
    twin = copy.deepcopy(plane)
    before = [float(slot.alpha) for slot in plane.slots.values()]
    twin.step()
    assert [float(slot.alpha) for slot in plane.slots.values()] == before
    assert all(float(slot.alpha) > before[0] for slot in twin.slots.values())
    plane.step()
    assert [float(s.alpha) for s in plane.slots.values()] == [float(s.alpha) for s in twin.slots.values()]


def test_a_new_length_of_ramp_is_a_new_table() -> None:
    plane = many_slots()
    blend_all(plane)
    plane.step()
    for growth in plane.growths.values():
        growth.ramp_steps = 70
    plane.step()
    expected = plane.registry.build("blend", "cosine")(2 / 70)
    assert all(growth.alpha == expected for growth in plane.growths.values())


def test_shares_ask_the_curve_once_a_step() -> None:
    asked = []
    shares = Shares(lambda progress: asked.append(progress) or progress, 4)
    assert [shares[1], shares[2], shares[1]] == [0.25, 0.5, 0.25]
    assert asked == [0.25, 0.5]


@pytest.mark.parametrize("together", [True, False])
def test_the_cheaper_way_at_one_is_taken_only_at_one(together: bool) -> None:
    plane = many_slots()
    blend_all(plane)
    for _ in range(8):
        plane.step()
    slot, h = plane.slots["l0"], torch.randn(2, 3, 4)
    assert float(slot.alpha) == 1 and slot.at_full
    with torch.no_grad():
        s = slot.seed(h)
        assert torch.equal(slot(h), h + s)
        plane.wither("l0")
        plane.step()
        plane.revive("l0")
        assert 0 < float(slot.alpha) < 1 and not slot.at_full
        torch.testing.assert_close(slot(h), h + slot.alpha * s)
        if together:
            for _ in range(8):
                plane.step()
        else:
            slot.set_alpha(1.0)
            assert slot.at_full
        assert torch.equal(slot(h), h + s)
