"""The stacked engine computes what separate runs compute; its code path is the same on CPU and GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import EsperError, IllegalCommand
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import Op, Stage
from esper_core.registry import load_registry
from esper_core.simic.gym.cuda_engine import StackedPopulation
from esper_core.simic.gym.stacks import StackedSGD
from esper_plugins.objectives.classes import Classification

from .lab import RATE, Alone, batches, difference, grow, make_plane

JUDGE = Classification(outputs=None)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
COUNT = 5


def population(
    device: str = "cpu", rule: str = "adamw", dtype: torch.dtype = torch.float32, **options: object
) -> tuple[StackedPopulation, list[Alone]]:
    registry = load_registry()
    planes = [make_plane(registry, seed=k) for k in range(COUNT)]
    for plane in planes:
        plane.host.module.to(dtype)
    alone = [Alone(copy.deepcopy(plane), optimizer=rule) for plane in planes]
    return StackedPopulation(planes, JUDGE, device=device, bucket=2, **options), alone  # type: ignore[arg-type]


def advance(plane: Plane, path: str, blend: str = "") -> None:
    plane.apply(Command(Op.ADVANCE, path, blend=blend), gated=False)


LIVES = (
    (0, "block1", "conv"), (1, "block1", "depthwise"), (2, "block1", "conv"), (2, "block3", "norm"),
    (3, "block2", "attention"), (4, "block1", "conv"),
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rule", "dtype", "options"),
    [
        ("adamw", torch.float32, {"convolution": "grouped"}),
        ("adamw", torch.float32, {"convolution": "patches"}),
        ("adamw", torch.float64, {}),
        ("sgd", torch.float32, {"optimizer": StackedSGD()}),
    ],
)
def test_mixed_lives_agree_with_separate_runs(
    device: str, rule: str, dtype: torch.dtype, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds germinate, blend, wither and are culled, of several blueprints and blends, each at its own time."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which torch allows for convolutions by default
    stacked, alone = population(device, rule, dtype, **options)
    bar = 1e-5 if dtype is torch.float32 else 1e-10
    everyone = [(stacked.planes[k], alone[k].plane) for k in range(COUNT)]
    for step, batch in enumerate(batches(24, dtype=dtype)):
        for i, (k, path, blueprint) in enumerate(LIVES):
            if step == 1 + i:
                stacked.apply(k, grow(path, blueprint))
                alone[k].plane.apply(grow(path, blueprint))
            if step == 6 + i:
                stacked.synchronise()
                for plane in everyone[k]:
                    advance(plane, path, blend=("residual:cosine", "gated:linear", "lerp:linear")[i % 3])
                stacked.synchronise()
            if step == 16 and i % 2:
                stacked.synchronise()
                for plane in everyone[k]:
                    plane.wither(path)
                stacked.synchronise()
        stacked.step(batch, RATE)
        for one in alone:
            one.step(batch)
    for k, one in enumerate(alone):
        pulled = stacked.pull(k)
        assert [g.stage for g in pulled.growths.values()] == [g.stage for g in one.plane.growths.values()]
        assert difference(pulled, one.plane) <= bar
    losses = stacked.losses[:24].double().cpu()
    expected = torch.tensor([one.losses for one in alone], dtype=torch.float64).T
    assert (losses - expected).abs().max() <= 1e-5


def test_isolated_seeds_leave_the_hosts_alone_even_when_one_is_not_finite() -> None:
    stacked, alone = population()
    for k in range(COUNT):
        stacked.apply(k, grow("block2", "conv"))
    bucket, lane = stacked.lanes[1, "block2"]
    with torch.no_grad():
        next(iter(bucket.stack.params.values()))[lane] = float("nan")
    for batch in batches(5):
        stacked.step(batch, RATE)
        for one in alone:
            one.step(batch)
    for k, one in enumerate(alone):
        plane = stacked.pull(k)
        for name, tensor in plane.host.module.state_dict().items():
            assert torch.allclose(tensor, one.plane.host.module.state_dict()[name], atol=1e-6), (k, name)
    assert torch.isfinite(stacked.losses[:5]).all()


def test_an_environment_is_the_same_alone_as_among_others() -> None:
    many, _ = population()
    one = StackedPopulation([make_plane(seed=2)], JUDGE, device="cpu", bucket=2)
    for engine, k in ((many, 2), (one, 0)):
        engine.apply(k, grow("block1", "depthwise"))
        for batch in batches(6):
            engine.step(batch, RATE)
    many.apply(0, grow("block1", "depthwise"))
    assert difference(many.pull(2), one.pull(0)) <= 1e-6


def test_evaluation_agrees_and_muting_takes_a_slot_out() -> None:
    stacked, alone = population()
    for k in (0, 3):
        stacked.apply(k, grow("block2", "conv"))
        alone[k].plane.apply(grow("block2", "conv"))
    for batch in batches(12):
        stacked.step(batch, RATE)
        for one in alone:
            one.step(batch)
    stacked.synchronise()
    for k in (0, 3):
        for plane in (stacked.planes[k], alone[k].plane):
            advance(plane, "block2")
    stacked.synchronise()
    for batch in batches(10):
        stacked.step(batch, RATE)
        for one in alone:
            one.step(batch)
    held_out = batches(2, seed=9)
    losses, hits = stacked.evaluate(held_out)
    muted, _ = stacked.evaluate(held_out, muted="block2")
    assert losses.shape == hits.shape == (COUNT, 16)
    assert (losses != muted).any(1).tolist() == [True, False, False, True, False]
    for k, one in enumerate(alone):
        one.plane.host.module.eval()
        with torch.no_grad():
            logits = torch.cat([one.plane.host.forward_with_slots(b.inputs) for b in held_out])
        expected = torch.nn.functional.cross_entropy(logits, torch.cat([b.targets for b in held_out]), reduction="none")
        assert torch.allclose(losses[k], expected, atol=1e-4)


def test_evaluation_keeps_what_is_not_finite_to_its_own_environment() -> None:
    """A host of NaN scores nothing, a seed of NaN shows only where it is not muted, and an error leaves no traces."""
    stacked, alone = population()
    for k in (0, 1):
        stacked.apply(k, grow("block2", "conv"))
    for step, batch in enumerate(batches(22)):
        if step == 12:
            stacked.synchronise()
            for k in (0, 1):
                advance(stacked.planes[k], "block2")
            stacked.synchronise()
        stacked.step(batch, RATE)
        for one in alone:
            one.step(batch)
    bucket, lane = stacked.lanes[1, "block2"]
    with torch.no_grad():
        for parameter in bucket.stack.params.values():
            parameter[lane] = float("nan")
        for parameter in stacked.hosts.params.values():
            parameter[2] = float("nan")
    held_out = batches(2, seed=9)
    losses, hits = stacked.evaluate(held_out)
    assert losses.isfinite().all(1).tolist() == [True, False, False, True, True]
    assert hits[1].sum() == hits[2].sum() == 0
    muted, _ = stacked.evaluate(held_out, muted="block2")
    assert muted.isfinite().all(1).tolist() == [True, True, False, True, True]
    for k in (3, 4):
        alone[k].plane.host.module.eval()
        with torch.no_grad():
            logits = torch.cat([alone[k].plane.host.forward_with_slots(b.inputs) for b in held_out])
        expected = torch.nn.functional.cross_entropy(logits, torch.cat([b.targets for b in held_out]), reduction="none")
        assert torch.allclose(losses[k], expected, atol=1e-4)
    with pytest.raises(RuntimeError):
        stacked.evaluate([Batch(held_out[0].inputs[..., :1, :1, :].repeat(1, 2, 1, 1), held_out[0].targets)], "block2")
    assert stacked.points["block2"].muted is False and all(s.template.training for s in stacked.arena.stacks)


def test_decisions_carry_the_seeds_own_losses_to_the_gate() -> None:
    stacked, _ = population()
    stacked.apply(0, grow("block2", "conv"))
    batch = batches(1)[0]
    for _ in range(20):
        stacked.step(Batch(batch.inputs, batch.targets), RATE)
    stacked.decide()
    plane = stacked.planes[0]
    assert plane.growths["block2"].stage is Stage.TRAINING
    assert plane.growths["block2"].readings["proxy_progress"] > 0
    stacked.apply(0, Command(Op.ADVANCE, "block2"))
    assert plane.growths["block2"].stage is Stage.BLENDING


def test_refusals_change_nothing_and_foreign_hosts_are_refused() -> None:
    stacked, _ = population()
    with pytest.raises(IllegalCommand):
        stacked.apply(0, Command(Op.CULL, "block1"))
    assert not stacked.lanes
    with pytest.raises(EsperError, match="different host structure"):
        StackedPopulation([make_plane(), make_plane(widths="4,6,10")], JUDGE, device="cpu")
