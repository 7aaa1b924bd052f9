"""Every reading against the same quantity worked out by hand with autograd."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.nn import functional as F

from esper_core.leyline.errors import BadOption
from esper_core.leyline.sensors import READINGS
from esper_core.leyline.stages import Stage
from esper_core.nissa.sensors import SensorArray
from tests.kasmina.small import batch, small_plane

PATH = "block1"


def step(plane, sensors=None, number: int = 0, optimizer=None, scale: float = 1.0, train: bool = True) -> None:
    """One training step of host and seeds."""
    plane.host.module.train(train)
    torch.manual_seed(number)
    parameters = [*plane.host.module.parameters(), *(p for g in plane.seed_groups().values() for p in g)]
    optimizer = optimizer or torch.optim.SGD(parameters, 0.1)
    optimizer.zero_grad()
    x, y = batch(number)
    (F.cross_entropy(plane.host.forward_with_slots(x), y) * scale).backward()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= scale
    if sensors is not None:
        sensors.after_backward(scale)
    if scale == 1.0:
        optimizer.step()
        if sensors is not None:
            sensors.after_step()
    plane.step()


def by_hand(plane, number: int) -> dict[str, float]:
    """Readings of the slot at PATH for one batch, from captured tensors and torch.autograd.grad."""
    caught: dict[str, torch.Tensor] = {}
    slot = plane.slots[PATH]
    slot.probe = lambda slot, h, s, out: caught.update(h=h.detach().clone(), s=s, out=out)
    plane.host.module.train()
    torch.manual_seed(number)
    x, y = batch(number)
    loss = F.cross_entropy(plane.host.forward_with_slots(x), y)
    seed = plane.seed_groups().get(PATH, [])
    host = list(plane.host.module.parameters())
    (g,) = torch.autograd.grad(loss, caught["out"], retain_graph=True)
    slot.probe = None
    h, s = caught["h"], None if caught["s"] is None else caught["s"].detach()
    found = {
        "host_gradient_norm": g.pow(2).sum().sqrt(),
        "need": (g.flatten(1).norm(dim=1) * h.flatten(1).norm(dim=1)).sum(),
    }
    if s is not None:
        gradients = torch.autograd.grad(loss, seed, retain_graph=True)
        host_gradients = torch.autograd.grad(loss, host)
        flat, host_flat = (torch.cat([t.flatten() for t in ts]) for ts in (gradients, host_gradients))
        found |= {
            "delta_norm": s.norm() / h.norm(),
            "activation_mean": s.mean(),
            "activation_std": s.std(correction=0),
            "proxy_loss": (g * s).sum(),
            "gradient_norm": flat.norm(),
            "gradient_ratio": flat.square().mean().sqrt() / host_flat.square().mean().sqrt(),
        }
    return {name: float(value) for name, value in found.items()}


def grown(alpha: float | None = None):
    """A plane whose seed at PATH has left zero behind; blended in to `alpha` if that is given."""
    plane = small_plane(blueprints=["poly"], ramp_steps=10)
    plane.germinate(PATH, "poly")
    with torch.no_grad():
        for p in plane.seed_groups()[PATH]:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    if alpha is not None:
        plane.step()
        plane.advance(PATH, gated=False)
        while plane.growths[PATH].alpha < alpha:
            plane.step()
    return plane


@pytest.mark.parametrize(
    "make", [grown, lambda: grown(0.5), lambda: grown(1.0), small_plane], ids=["grown", "half", "whole", "seedless"]
)
def test_readings_equal_what_autograd_says(make) -> None:
    expected_from, plane = make(), make()
    expected = by_hand(expected_from, 5)
    sensors = SensorArray(plane, every=1)
    sensors.attach()
    step(plane, sensors, 5)
    got = sensors.read()[PATH]
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-4, abs=1e-7), name
    unforeseen = got.keys() - expected.keys() - {"update_ratio"}
    assert not unforeseen


def test_an_interval_is_the_mean_of_its_batches() -> None:
    plane, sensors = grown(), None
    sensors = SensorArray(plane, every=1)
    sensors.attach()
    expected = []
    for number in range(6):
        expected.append(by_hand(copy.deepcopy(plane), number))
        step(plane, sensors, number)
    got = sensors.read()[PATH]
    for name in expected[0]:
        mean = sum(e[name] for e in expected) / 6
        assert got[name] == pytest.approx(mean, rel=1e-3, abs=1e-6), name
    proxies = torch.tensor([e["proxy_loss"] for e in expected])
    assert got["proxy_error"] == pytest.approx(float(proxies.std() / math.sqrt(6)), rel=1e-2)
    assert got["proxy_progress"] == pytest.approx(float(proxies[0] - proxies[1:].mean()), rel=1e-2)
    assert sensors.read()[PATH] == {}, "read once"


def test_update_ratio_is_one_step_over_the_weights() -> None:
    plane = grown()
    before = torch.cat([p.detach().flatten().clone() for p in plane.seed_groups()[PATH]])
    sensors = SensorArray(plane, every=1)
    sensors.attach()
    step(plane, sensors, 0)
    after = torch.cat([p.detach().flatten() for p in plane.seed_groups()[PATH]])
    expected = float((after - before).norm() / before.norm())
    assert sensors.read()[PATH]["update_ratio"] == pytest.approx(expected, rel=1e-4)


def test_proxy_progress_is_positive_when_an_isolated_seed_learns() -> None:
    """The isolated seed starts at zero output, so that whatever it gains to first order it has learnt."""
    plane = small_plane(blueprints=["poly"])
    plane.germinate(PATH, "poly")
    sensors = SensorArray(plane, every=1)
    sensors.attach()
    for number in range(30):
        step(plane, sensors, number % 3)
    reading = sensors.read()[PATH]
    assert plane.growths[PATH].stage is Stage.TRAINING
    assert reading["proxy_loss"] < 0 and reading["proxy_progress"] > 0


def test_predicted_change_is_the_change_of_the_loss() -> None:
    """To first order: adding a small share of the seed's output changes the loss by that share of proxy_loss."""
    plane = grown()
    predicted = by_hand(plane, 0)["proxy_loss"]
    x, y = batch(0)

    def loss(share: float) -> float:
        plane.slots[PATH].seed.double()
        plane.host.module.double().train()
        torch.manual_seed(0)
        handle = plane.slots[PATH].register_forward_hook(lambda m, i, out: out + share * m.seed(i[0].detach()).detach())
        with torch.enable_grad():
            value = float(F.cross_entropy(plane.host.forward_with_slots(x.double()), y).detach())
        handle.remove()
        return value

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert slope == pytest.approx(predicted, rel=2e-2)


def test_the_loss_scale_is_taken_out() -> None:
    readings = []
    for scale in (1.0, 1024.0):
        plane = grown()
        sensors = SensorArray(plane, READINGS.keys() - {"update_ratio"}, every=1)
        sensors.attach()
        step(plane, sensors, 0, scale=scale)
        readings.append(sensors.read()[PATH])
    assert readings[0].keys() == readings[1].keys()
    for name, value in readings[0].items():
        assert readings[1][name] == pytest.approx(value, rel=1e-4), name


def test_sensors_change_no_bit_of_training() -> None:
    states = []
    for watched in (False, True):
        plane = grown(0.5)
        sensors = SensorArray(plane, every=1) if watched else None
        if sensors:
            sensors.attach()
        for number in range(5):
            step(plane, sensors, number)
        states.append({**plane.host.module.state_dict(), **plane.module.state_dict()})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_not_wanted_not_there() -> None:
    plane = grown()
    sensors = SensorArray(plane, (), every=1)
    sensors.attach()
    assert all(slot.probe is None for slot in plane.slots.values())
    step(plane, sensors, 0)
    assert set(sensors.read()) <= set(plane.slots) and not any(sensors.read().values())
    watched = SensorArray(plane, ("need",), every=1)
    watched.attach()
    step(plane, watched, 0)
    assert set(watched.read()[PATH]) == {"need"}
    watched.detach()
    assert all(slot.probe is None for slot in plane.slots.values())
    step(plane, watched, 1)
    assert watched.read()[PATH] == {}


def test_an_unknown_reading_is_refused() -> None:
    with pytest.raises(BadOption, match="proxy_loss"):
        SensorArray(small_plane(), ("proxy_los",))


def test_an_exploding_seed_is_seen_and_spoils_no_other_slot() -> None:
    plane = small_plane(blueprints=["poly", "explosive"])
    plane.germinate(PATH, "explosive")
    plane.germinate("block2", "poly")
    sensors = SensorArray(plane, every=1)
    sensors.attach()
    for number in range(6):
        step(plane, sensors, number)
    readings = sensors.read()
    assert readings[PATH]["not_finite"] > 0
    assert "not_finite" not in readings["block2"] and "not_finite" not in readings["block0"]
    assert all(math.isfinite(v) for r in readings.values() for v in r.values())


def test_only_every_nth_batch_is_sampled() -> None:
    plane = grown()
    sensors = SensorArray(plane, every=3)
    sensors.attach()
    expected = []
    for number in range(7):
        if number % 3 == 0:
            expected.append(by_hand(copy.deepcopy(plane), number)["need"])
        assert (plane.slots[PATH].probe is not None) is (number % 3 == 0)
        step(plane, sensors, number)
    assert sensors.read()[PATH]["need"] == pytest.approx(sum(expected) / 3, rel=1e-3)
    assert plane.slots[PATH].probe is not None, "the first batch after a reading is sampled, wherever it falls"


def test_a_resumed_run_reads_the_same_bits() -> None:
    whole, cut = grown(), grown()
    a, b = SensorArray(whole, every=2), SensorArray(cut, every=2)
    a.attach()
    b.attach()
    for number in range(9):
        step(whole, a, number)
        step(cut, b, number)
        if number == 4:
            saved = json.loads(json.dumps(b.state_dict()))
            b.detach()
            b = SensorArray(cut, every=2)
            b.attach()
            b.load_state_dict(saved)
    assert a.read() == b.read()


def test_a_new_seed_starts_its_own_record() -> None:
    plane = small_plane(blueprints=["poly"], embargo=0)
    sensors = SensorArray(plane, every=1)
    sensors.attach()
    plane.germinate(PATH, "poly")
    for number in range(4):
        step(plane, sensors, number)
    plane.cull(PATH)
    assert "proxy_loss" not in sensors.read()[PATH]
    plane.decide()
    plane.germinate(PATH, "poly")
    step(plane, sensors, 9)
    reading = sensors.read()[PATH]
    assert reading["proxy_loss"] == 0 and "proxy_progress" not in reading, "a seed of zero output, seen once"


def test_copies_of_a_plane_report_to_nobody() -> None:
    plane = grown()
    sensors = SensorArray(plane, every=1)
    sensors.attach()
    twin = copy.deepcopy(plane)
    step(twin, None, 0)
    assert all(slot.probe is None for slot in twin.slots.values())
    assert sensors.read()[PATH] == {}


def test_hosts_with_no_gradient_at_the_slot_are_unmeasured_not_zero() -> None:
    plane = small_plane()
    for p in plane.host.module.parameters():
        p.requires_grad_(False)
    plane.host.module.head.requires_grad_(True)
    sensors = SensorArray(plane, every=1)
    sensors.attach()
    step(plane, sensors, 0)
    assert sensors.read()[PATH] == {}
