"""Commands against the lifecycle table: what is legal happens, what is not changes nothing."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.kasmina.ledger import Limits, count_parameters
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption, EsperError, IllegalCommand, IncompatibleSeed, UnknownName
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.stages import STAGES, TRANSITIONS, Op, Stage
from esper_core.leyline.view import Interval
from esper_core.tolaria.ending import resolve
from tests.kasmina.small import batch, small_host, small_plane, small_registry

GOOD = Interval(1.0, 0.9, 1.1, 100)


def fossilise(plane: Plane, path: str, blueprint: str = "poly") -> None:
    plane.germinate(path, blueprint)
    plane.step()
    plane.record(path, readings={"proxy_progress": 0.5})
    plane.advance(path)
    for _ in range(plane.ramp_steps):
        plane.step()
    plane.record(path, loss=GOOD, accuracy=GOOD)
    plane.decide()
    for _ in range(2):
        plane.record(path, loss=GOOD, accuracy=GOOD)
    plane.advance(path)


def test_a_life_from_germination_to_fossil() -> None:
    plane = small_plane(ramp_steps=4)
    seen: list[tuple[Stage, Stage]] = []
    plane.on_change(lambda change: seen.append((change.before, change.after)))
    fossilise(plane, "block1")
    order = [
        Stage.DORMANT,
        Stage.GERMINATED,
        Stage.TRAINING,
        Stage.BLENDING,
        Stage.SHADOWING,
        Stage.PROBATIONARY,
        Stage.FOSSILIZED,
    ]
    assert seen == list(pairwise(order))
    assert plane.growths["block1"].alpha == 1.0
    assert plane.ledger.seed_params == count_parameters(plane.module) > 0


@pytest.mark.parametrize("gate", ["proxy", "counterfactual", "window", "rent"])
def test_gates_refuse_what_was_not_measured_or_did_not_pass(gate: str) -> None:
    plane = small_plane(ramp_steps=1)
    plane.germinate("block0", "poly")
    plane.step()
    if gate == "proxy":
        with pytest.raises(IllegalCommand, match="unmeasured"):
            plane.advance("block0")
        plane.record("block0", readings={"proxy_progress": -0.1})
        with pytest.raises(IllegalCommand, match="proxy_progress_high"):
            plane.advance("block0")
        plane.record("block0", readings={"proxy_progress": -0.1, "proxy_error": 0.04})
        with pytest.raises(IllegalCommand, match="proxy_progress_high"):
            plane.advance("block0")
        plane.record("block0", readings={"proxy_progress": -0.1, "proxy_error": 0.06})  # chance explains the rise
        plane.advance("block0")
        return
    plane.record("block0", readings={"proxy_progress": 0.1})
    plane.advance("block0")
    plane.step()
    plane.decide()
    assert plane.growths["block0"].stage is Stage.SHADOWING, "no counterfactual was measured"
    if gate == "counterfactual":
        with pytest.raises(IllegalCommand):
            plane.advance("block0")
        return
    plane.record("block0", loss=GOOD, accuracy=GOOD)
    plane.decide()
    plane.record("block0", loss=GOOD, accuracy=GOOD)
    if gate == "window":
        with pytest.raises(IllegalCommand, match="probation_count"):
            plane.advance("block0")
        return
    poor = Interval(plane.rent_of("block0") / 2, 0.0, 1.0, 100)
    for _ in range(2):
        plane.record("block0", loss=poor, accuracy=poor)
    with pytest.raises(IllegalCommand):
        plane.advance("block0")


def test_withering_culls_or_revives_and_the_embargo_holds() -> None:
    plane = small_plane(ramp_steps=2, embargo=2)
    fossilise(plane, "block1")
    with pytest.raises(IllegalCommand, match="Emrakul"):
        plane.wither("block1")
    plane.wither("block1", source="emrakul")
    with pytest.raises(IllegalCommand, match="alpha"):
        plane.cull("block1")
    plane.step()
    assert 0 < plane.growths["block1"].alpha < 1
    plane.revive("block1")
    for _ in range(2):
        plane.step()
    assert plane.growths["block1"].stage is Stage.FOSSILIZED and plane.growths["block1"].alpha == 1.0
    plane.wither("block1", source="emrakul")
    for _ in range(2):
        plane.step()
    change = plane.cull("block1")
    assert len(change.removed) == 4 and plane.growths["block1"].stage is Stage.CULLED
    for _ in range(2):
        with pytest.raises(IllegalCommand):
            plane.germinate("block1", "poly")
        plane.decide()
    plane.germinate("block1", "poly")


@pytest.mark.parametrize(
    ("command", "error", "says"),
    [
        (Command(Op.GERMINATE, "blok1", "poly"), UnknownName, "block1"),
        (Command(Op.GERMINATE, "block1", "poli"), UnknownName, "poly"),
        (Command(Op.GERMINATE, "block1"), BadOption, "blueprint"),
        (Command(Op.GERMINATE, "block1", "poly", "gatet"), UnknownName, "gated"),
        (Command(Op.GERMINATE, "block1", "poly", "gated:residual"), BadOption, "two"),
        (Command(Op.GERMINATE, "block1", "tokens-only"), IllegalCommand, "NLD"),
        (Command(Op.GERMINATE, "block1", "wrong-shape"), IncompatibleSeed, "2, 1, 8, 8"),
        (Command(Op.GERMINATE, "block0", "poly"), IllegalCommand, "germinated"),
        (Command(Op.CULL, "block1"), IllegalCommand, "dormant"),
        (Command(Op.REVIVE, "block0"), IllegalCommand, "germinated"),
    ],
)
@torch.no_grad()
def test_a_refused_command_changes_nothing(command: Command, error: type[EsperError], says: str) -> None:
    plane = small_plane()
    plane.germinate("block0", "poly")
    plane.host.module.eval()
    x, _ = batch()
    rng = torch.get_rng_state()
    before = copy.deepcopy((plane.structure(), plane.module.state_dict(), plane.host.forward_with_slots(x)))
    with pytest.raises(error, match=says) as caught:
        plane.apply(command)
    assert "\n" not in str(caught.value)
    after = (plane.structure(), plane.module.state_dict(), plane.host.forward_with_slots(x))
    assert before[0] == after[0] and list(before[1]) == list(after[1]) and torch.equal(before[2], after[2])
    assert torch.equal(rng, torch.get_rng_state())


def test_budgets_refuse_what_would_exceed_them() -> None:
    plane = small_plane(limits=Limits(params=15))
    plane.germinate("block0", "poly")
    assert not next(v for v in plane.views() if v.path == "block1").blueprints
    with pytest.raises(IllegalCommand, match="parameters"):
        plane.germinate("block1", "poly")


def test_a_host_without_points_is_refused() -> None:
    host = small_host()
    empty = type("Empty", (), {"injection_specs": {}, "module": host.module})()
    with pytest.raises(EsperError, match="no injection point"):
        Plane(empty, small_registry())


def test_blueprints_of_which_none_fits_are_refused() -> None:
    with pytest.raises(IllegalCommand, match="none of tokens-only can grow in this host: it serves NLD, and block0"):
        small_plane(blueprints=["tokens-only"])
    plane = small_plane(blueprints=["tokens-only", "poly"])
    assert all([b.name for b in view.blueprints] == ["poly"] for view in plane.views())


class Guard:
    """A plugin whose veto fails for one slot and speaks for another."""

    @hookimpl
    def esper_veto(self, command: Command, plane: Plane) -> str | None:
        if command.slot == "block0":
            raise KeyError("block0")
        return "not here" if command.slot == "block1" else None


def test_a_veto_refuses_by_speaking_and_by_failing() -> None:
    plane = small_plane()
    plane.registry.register(Guard(), name="guard", distribution="mine", version="1")
    with pytest.raises(
        IllegalCommand, match=r"germinate at block0 was vetoed: the veto of plugin mine/guard failed with KeyError"
    ):
        plane.germinate("block0", "poly")
    with pytest.raises(IllegalCommand, match="germinate at block1 was vetoed: not here"):
        plane.germinate("block1", "poly")
    plane.germinate("block2", "poly")
    assert [path for path, growth in plane.growths.items() if growth.blueprint] == ["block2"]


def test_stacking_is_explicit_in_the_path() -> None:
    plane = small_plane(ramp_steps=1, max_stack=2)
    fossilise(plane, "block1")
    assert list(plane.slots) == ["block0", "block1", "block1+1", "block2"]
    fossilise(plane, "block1+1")
    assert list(plane.slots) == ["block0", "block1", "block1+1", "block2"]
    assert plane.ledger.seed_params == count_parameters(plane.module)


def test_seeds_nest_and_go_with_the_seed_that_they_grew_in() -> None:
    plane = small_plane(ramp_steps=1)
    plane.germinate("block1", "test-organ")
    assert list(plane.slots) == ["block0", "block1", "block1/slot0", "block2"]
    plane.germinate("block1/slot0", "poly")
    assert plane.ledger.seed_params == count_parameters(plane.module)
    told = []
    plane.on_change(told.append)
    plane.cull("block1")
    assert [(c.slot, c.after, len(c.removed)) for c in told] == [
        ("block1/slot0", Stage.CULLED, 4), ("block1", Stage.CULLED, 4),
    ]  # fmt: skip
    assert list(plane.slots) == ["block0", "block1", "block2"] and not list(plane.module.parameters())


def test_an_organ_pays_for_its_tree_and_what_is_inside_shows_only_with_it() -> None:
    plane = small_plane(ramp_steps=1)
    plane.germinate("block1", "test-organ")
    plane.germinate("block1/slot0", "poly")
    own = {path: plane.rent * plane.growths[path].params / plane.host_params for path in ("block1", "block1/slot0")}
    assert plane.rent_of("block1/slot0") == pytest.approx(own["block1/slot0"])
    assert plane.rent_of("block1") == pytest.approx(sum(own.values()))
    view = {v.path: v for v in plane.views()}["block1"]
    assert view.tree_params == plane.ledger.seed_params and view.params == plane.growths["block1"].params
    plane.step()
    plane.advance("block1/slot0", gated=False)
    plane.step()
    assert plane.contributing() == []
    plane.advance("block1", gated=False)
    plane.step()
    assert plane.contributing() == ["block1", "block1/slot0"]


def test_initial_weights_depend_on_seed_path_and_birth_only() -> None:
    a, b = small_plane(), small_plane()
    b.germinate("block2", "poly")
    torch.manual_seed(99)
    for plane in (a, b):
        plane.germinate("block0", "poly")
    assert torch.equal(a.slots["block0"].seed.first.weight, b.slots["block0"].seed.first.weight)
    first = a.slots["block0"].seed.first.weight.clone()
    a.cull("block0")
    a.decide(), a.decide(), a.decide()
    a.germinate("block0", "poly")
    assert not torch.equal(first, a.slots["block0"].seed.first.weight)


commands = st.tuples(
    st.sampled_from(sorted(Op)),
    st.sampled_from(["block0", "block1", "block1/slot0", "block1+1"]),
    st.sampled_from(["poly", "test-organ"]),
    st.sampled_from(["user", "emrakul"]),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(commands, max_size=25))
def test_any_sequence_of_commands_keeps_the_books(sequence) -> None:
    """Whatever is asked, the table is kept, the ledger is right, and the structure rebuilds to the same model."""
    plane = small_plane(ramp_steps=2, max_stack=2, embargo=1)
    legal_steps = {(t.source, t.target) for t in TRANSITIONS}

    def check(change) -> None:
        went_along = "which held it" in change.command.reason and change.after is Stage.CULLED
        assert (change.before, change.after) in legal_steps or change.before is Stage.WITHERING or went_along

    plane.on_change(check)
    for op, path, blueprint, source, gated in sequence:
        with suppress(EsperError):
            plane.apply(Command(op, path, blueprint if op is Op.GERMINATE else "", source=source), gated=gated)
        plane.step()
        plane.decide()
        for slot_path, slot in plane.slots.items():
            growth = plane.growths[slot_path]
            assert growth.stage is slot.stage
            assert (slot.seed is not None) == STAGES[slot.stage].occupied
            assert growth.alpha == pytest.approx(float(slot.alpha))
            assert not (STAGES[slot.stage].isolated and growth.alpha)
    twin = small_plane(ramp_steps=2, max_stack=2, embargo=1)
    twin.rebuild(json.loads(json.dumps(plane.structure())))
    twin.module.load_state_dict(plane.module.state_dict())
    assert twin.structure() == plane.structure() and list(twin.slots) == list(plane.slots)
    x, _ = batch()
    plane.host.module.eval(), twin.host.module.eval()
    assert torch.equal(plane.host.forward_with_slots(x.clone()), twin.host.forward_with_slots(x.clone()))


@settings(max_examples=60, deadline=None)
@given(st.lists(commands, min_size=1, max_size=25))
def test_whatever_was_asked_no_seed_ends_condemned_or_isolated(sequence) -> None:
    """The end of a run leaves no seed that withers or never took part, keeps fossils, and tells if the output moved."""
    plane = small_plane(ramp_steps=2, max_stack=2, embargo=1)
    for op, path, blueprint, source, gated in sequence:
        with suppress(EsperError):
            plane.apply(Command(op, path, blueprint if op is Op.GERMINATE else "", source=source), gated=gated)
        plane.step()
    x, _ = batch()
    plane.host.module.eval(), plane.module.eval()
    before = plane.host.forward_with_slots(x.clone())
    fossils = {path for path, growth in plane.growths.items() if growth.stage.spec.permanent}
    audited = {p for p, g in plane.growths.items() if g.resume_stage is not None and g.resume_stage.spec.permanent}
    condemned = {p for p, g in plane.growths.items() if g.stage.spec.leaving} - audited
    changed = resolve(plane)
    stages = {path: growth.stage.spec for path, growth in plane.growths.items()}
    assert not any(stage.leaving or stage.isolated for stage in stages.values())
    kept = {path for path in fossils | audited if not any(path.startswith(f"{held}/") for held in condemned)}
    assert all(stages[path].permanent for path in kept)
    assert changed or torch.equal(before, plane.host.forward_with_slots(x.clone()))
    assert changed == bool(condemned) and not resolve(plane)
