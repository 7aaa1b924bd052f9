"""What features read of a view, against what real runs deliver."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from esper_core.leyline.sensors import SENSORS
from esper_core.leyline.stages import EMPTY, Op, Stage
from esper_core.leyline.tags import AROUND_TAGS, LAYOUT_TAGS, TAGS
from esper_core.leyline.view import RunView
from esper_core.registry import load_registry
from esper_core.tamiyo import features
from esper_core.tamiyo.advice import Adviser
from esper_core.tamiyo.blend_probe import BlendProbe
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tamiyo.learned import load_agent
from esper_core.tamiyo.observation import collate, observe
from tests.recorded import RUNS, plain, recorded_views
from tests.recorded.record import record
from tests.tolaria import ground

_POINT_TAGS = {"causal", *LAYOUT_TAGS.values()}
_SEED_TAGS = {"learned"}

SILENT = {
    # A seed leaves these stages at its first batch and at the measurement that opens a decision.
    **dict.fromkeys(f"{kind}.{name}_{stage}" for stage in (Stage.GERMINATED, Stage.SHADOWING)
                    for kind, name in (("slots", "stage"), ("run", "share"))),
    # Tags that no point of these hosts and no shipped blueprint carries; a third party's may.
    **dict.fromkeys(f"slots.tag_{tag}" for tag in TAGS.keys() - _POINT_TAGS),
    **dict.fromkeys(f"slots.seed_tag_{tag}" for tag in TAGS.keys() - _SEED_TAGS),
    **dict.fromkeys(f"blueprints.tag_{tag}" for tag in TAGS.keys() - _SEED_TAGS),
    # Roles of other hosts: timm's stages, an MLP's layers.
    "slots.role_stage": None, "slots.role_layer": None,
    # The heuristic revives nothing, and of what these runs offer it plants no such family; advice is always there.
    "slots.advised_revive": None, "run.advised": None,
    **dict.fromkeys(f"slots.advised_family_{family}" for family in ("adapter", "routing", "identity")),
}  # fmt: skip
"""Features that do not vary in the recorded runs, with the reason above each."""


@functools.cache
def seen() -> dict[str, set[float | None]]:
    """The values of every feature in the recorded runs; None where it was unknown."""
    values: dict[str, set[float | None]] = defaultdict(set)

    def take(kind: str, *view: Any) -> None:
        table = features.TABLES[kind]
        for feature, value in zip(table, features.read_features(table, *view), strict=True):
            values[f"{kind}.{feature.name}"].add(value if value == value else None)

    probe = BlendProbe(load_registry())
    advisers = {name: Adviser() for name in RUNS}
    for view in (advisers[name].advise(view) for name in RUNS for view in recorded_views(name)):
        take("run", view)
        for slot in view.slots:
            take("slots", slot, view)
            for blueprint in slot.blueprints:
                take("blueprints", blueprint, slot, view)
        for descriptor in probe.descriptors(view.blends):
            take("blends", descriptor)
    return values


YOUNGER = {"run.steps", "run.horizon", "run.tokens_per_param", "run.flops_budget_left"}
"""Features of fields that views did not have when the runs were recorded; a run of today delivers them below."""


@pytest.mark.parametrize("name", [name for name in features.schema() if name not in YOUNGER])
def test_every_feature_is_delivered_and_varies(name: str) -> None:
    known = seen()[name] - {None}
    assert known, "no recorded view delivers it"
    assert (len(known) == 1) == (name in SILENT), sorted(known)[:5]


def test_every_reading_that_a_view_shows_is_a_sensor() -> None:
    shown = {key for name in RUNS for view in recorded_views(name) for slot in view.slots for key in slot.readings}
    assert shown - {"probation_count", "rent"} <= SENSORS.keys()
    assert {"need", "layer_loss", "attention_entropy"} <= shown


@pytest.mark.parametrize("run", RUNS)
def test_a_view_says_what_grows_in_a_slot(run: str) -> None:
    registry = ground.registry()
    for slot in (slot for view in recorded_views(run) for slot in view.slots):
        if slot.stage.spec.occupied:
            spec: Any = registry.find("blueprint", slot.blueprint).spec
            known = spec.capabilities - AROUND_TAGS.keys()  # which are younger than the recording
            assert (slot.seed_family, slot.seed_tags) == (spec.family, known)
        else:
            assert (slot.seed_family, slot.seed_tags) == ("", frozenset())


def test_a_run_of_today_delivers_what_the_recorded_one_did(tmp_path: Path) -> None:
    """So that a recording cannot hide what the code no longer delivers."""
    plan = [{"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "plain"},
            {"decision": 0, "op": "germinate", "slot": "block2", "blueprint": "depthwise"},
            {"decision": 2, "op": "cull", "slot": "block1"}]  # fmt: skip
    config = ground.config(
        tmp_path / "run", epochs=2, blueprints=("plain", "depthwise"),
        controller=ground.schedule(tmp_path / "plan.json", *plan, advance=False),
    )  # fmt: skip
    views = record(config, ground.registry())
    recorded = recorded_views("maps")

    def fields(view: Any) -> set[str]:
        return set(plain(view))

    assert fields(views[0]) == fields(recorded[0]) and fields(views[0].slots[0]) == fields(recorded[0].slots[0])
    grown = next(view.slots[0] for view in views if view.slots[0].stage is Stage.TRAINING)
    like = next(s for view in recorded for s in view.slots if s.stage is Stage.TRAINING)
    assert grown.readings.keys() == like.readings.keys()
    assert (grown.seed_family, grown.seed_tags) == ("convolution", frozenset())
    assert views[-1].slots[1].seed_tags == frozenset({"learned"})
    last = views[-1].slots[0]
    assert last.stage is Stage.CULLED and last.culled == {"plain": 1} and views[0].slots[0].culled == {}


@pytest.mark.parametrize("budget", ["", "2e9"])
def test_a_view_says_how_far_the_run_is_and_how_long_it_will_be(tmp_path: Path, budget: str) -> None:
    config = ground.config(tmp_path / "run", epochs=2, decisions_per_epoch=3, controller="wait", budget_total=budget)
    views = record(config, ground.registry())
    steps = [view.step for view in views]
    assert steps == sorted(set(steps)) and steps[0] > 0
    assert all(view.targets == view.step * config.batch_size for view in views)
    for view in views:
        told = dict(zip((f.name for f in features.GLOBAL_FEATURES),
                        features.read_features(features.GLOBAL_FEATURES, view), strict=True))  # fmt: skip
        assert told["steps"] == pytest.approx(np.log10(view.step))
        assert told["horizon"] == pytest.approx(np.log10(steps[-1] / views[-1].share), abs=0.02)
        assert told["tokens_per_param"] == pytest.approx(np.log10(view.targets / view.host_params))
        left = told["flops_budget_left"]
        assert left == pytest.approx(max(0.0, 1 - view.share)) if budget else np.isnan(left)
    if budget:
        assert views[0].share < 0.8 < views[-1].share


def _row(view: RunView, name: str) -> np.ndarray[Any, Any]:
    column = next(i for i, feature in enumerate(features.SLOT_FEATURES) if feature.name == name)
    return observe(view, ()).slots[:, column]


def test_a_core_trained_before_seed_family_was_delivered_goes_on_reading_nothing_there() -> None:
    view = next(v for v in recorded_views("maps") if sum(s.stage.spec.occupied for s in v.slots) >= 4)
    blind = attrs.evolve(view, slots=tuple(attrs.evolve(s, seed_family="", seed_tags=frozenset()) for s in view.slots))
    blends = BlendProbe(load_registry()).descriptors(view.blends)
    assert _row(view, "seed_family_convolution").any() and not _row(blind, "seed_family_convolution").any()
    for core, same in ((load_agent("core_v1"), True), (TamiyoCore(CoreConfig(32, 1, 2), seed=0), False)):
        core.eval()
        with torch.no_grad():
            one, two = (core.decide(collate([observe(v, blends)]), core.initial(1)).value for v in (view, blind))
        assert torch.equal(one, two) is same


def test_empty_slots_offer_blueprints_by_their_cost() -> None:
    for view in (view for name in RUNS for view in recorded_views(name)):
        for slot in view.slots:
            assert bool(slot.blueprints) <= (slot.stage is EMPTY)
            assert (Op.GERMINATE in slot.legal) <= bool(slot.blueprints)
            assert all(b.flops >= 0 and (view.params_left is None or b.params <= view.params_left)
                       for b in slot.blueprints)  # fmt: skip
