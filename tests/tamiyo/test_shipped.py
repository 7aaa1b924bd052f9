"""The core and the adapters that come with the package: whole, of known descent, and at home on any host."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import attrs
import pytest
import torch
from click.testing import CliRunner

from esper_core.cli.main import cli
from esper_core.leyline.errors import BadOption
from esper_core.leyline.stages import Op, Stage
from esper_core.leyline.view import BlueprintView
from esper_core.tamiyo.adapter import load_adapter, merge_adapter
from esper_core.tamiyo.core import TamiyoCore
from esper_core.tamiyo.learned import (
    ADAPTED_CORE,
    SHIPPED,
    SHIPPED_ADAPTERS,
    SHIPPED_CORES,
    LearnedController,
    load_agent,
)
from esper_core.tamiyo.observation import OPS

from .views import make_view

FOLDER = Path(str(files("esper_core.tamiyo")))
ADAPTERS = sorted(path for path in FOLDER.glob("*.safetensors") if path.stem not in SHIPPED_CORES)


def test_the_shipped_core_says_where_it_comes_from_and_is_small() -> None:
    core = load_agent("")
    assert {"command", "seed", "curriculum_sha256", "episodes", "worlds", "imitation"} <= core.lineage.keys()
    assert core.lineage["command"].startswith("esper tamiyo train --curriculum differing --seed")
    assert sum(p.numel() for p in core.parameters()) <= 400_000
    assert (FOLDER / SHIPPED).stat().st_size < 2_000_000


@pytest.mark.parametrize("name", SHIPPED_CORES)
def test_a_shipped_core_goes_by_its_name(name: str) -> None:
    core = load_agent(name)
    assert core.fingerprint == TamiyoCore.load(FOLDER / f"{name}.safetensors").fingerprint
    assert core.lineage["environment_steps"] > 0 and (FOLDER / f"{name}.safetensors").stat().st_size < 2_000_000
    answer = CliRunner().invoke(cli, ["tamiyo", "show", name], prog_name="esper")
    assert answer.exit_code == 0 and core.fingerprint[:20] in answer.stdout


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_shipped_adapters_belong_to_it_and_leave_no_trace(path: Path) -> None:
    core, file = load_agent(ADAPTED_CORE), load_adapter(path)
    before = core.fingerprint
    adapter = core.attach(file)
    assert adapter.domain == path.stem and sum(p.numel() for p in adapter.parameters()) <= 0.02 * sum(
        p.numel() for p in core.parameters()
    )
    core.detach()
    assert core.fingerprint == before and file.base == before


def test_a_shipped_adapter_merges_into_its_core() -> None:
    core = load_agent(ADAPTED_CORE)
    core.attach(load_adapter(ADAPTERS[0]))
    merged = merge_adapter(core, ADAPTERS[0].stem)
    assert merged.features == core.features and merged.fingerprint != core.fingerprint


def test_a_shipped_adapter_goes_by_its_domain() -> None:
    assert {path.stem for path in ADAPTERS} == set(SHIPPED_ADAPTERS)
    controller = LearnedController(adapter="language")  # with the core that it belongs to
    assert list(controller.core.adapters) == ["language"]
    assert controller.core.fingerprint == load_agent(ADAPTED_CORE).fingerprint
    with pytest.raises(BadOption, match=r"no adapter 'visoin'.*language, vision; did you mean vision"):
        LearnedController(adapter="visoin")
    with pytest.raises(BadOption, match="no adapter 'core_v1'"):
        LearnedController(adapter="core_v1")


@pytest.mark.parametrize("slots", [1, 3, 16, 64])
def test_it_acts_on_any_number_of_slots_and_only_as_is_legal(slots: int) -> None:
    controller, acted = LearnedController(), 0
    for key in range(8 if slots > 1 else 40):
        view = make_view(key, slots, key % 8)
        taken = set()
        for command in controller.decide(view):
            slot = next(s for s in view.slots if s.path == command.slot)
            assert command.op in slot.legal and command.slot not in taken
            assert not command.blueprint or command.blueprint in {b.name for b in slot.blueprints}
            taken.add(command.slot)
            acted += 1
    assert acted


def test_it_may_choose_a_blueprint_of_a_family_that_nobody_knew() -> None:
    """Where there is nothing else, what is strange is grown; it is not barred for being strange."""
    chosen = 0
    for key in range(12):
        view = make_view(key, 3, 0, (Stage.DORMANT,) * 3)
        strange = [BlueprintView("stranger", "crystals", frozenset({"spatial", "learned"}), 90, 9_000)]
        slots = tuple(attrs.evolve(s, blueprints=tuple(strange)) for s in view.slots)
        chosen += any(c.blueprint == "stranger" for c in LearnedController().decide(attrs.evolve(view, slots=slots)))
    assert chosen


def test_a_run_of_the_core_that_shipped_before_is_resumed_with_it() -> None:
    first, later = LearnedController("core_v1"), LearnedController()
    first.decide(make_view(0, 4, 0))
    later.load_state_dict(first.state_dict())
    view = make_view(1, 4, 1)
    assert later.core.fingerprint == first.core.fingerprint and later.decide(view) == first.decide(view)
    with pytest.raises(BadOption, match="was decided by core"):
        LearnedController("core_v2").load_state_dict(first.state_dict())


def test_show_without_a_file_shows_the_shipped_core() -> None:
    answer = CliRunner().invoke(cli, ["tamiyo", "show"], prog_name="esper")
    assert answer.exit_code == 0 and load_agent("").fingerprint[:20] in answer.stdout


def test_sixty_four_slots_are_all_acted_on_within_the_first_third_of_a_run() -> None:
    eager = TamiyoCore(seed=0)
    with torch.no_grad():
        eager.op_head.bias[OPS.index(Op.GERMINATE)] = 9.0
    controller, decisions = LearnedController(core=eager), 14
    view = attrs.evolve(make_view(0, 64, 0, (Stage.DORMANT,) * 64), decisions=decisions)
    acted: set[str] = set()
    for decision in range(decisions // 3):
        slots = tuple(
            attrs.evolve(s, stage=Stage.GERMINATED, legal=frozenset({Op.WAIT})) if s.path in acted else s
            for s in view.slots
        )
        acted |= {c.slot for c in controller.decide(attrs.evolve(view, slots=slots, decision=decision))}
    assert acted == {s.path for s in view.slots if Op.GERMINATE in s.legal} and len(acted) > 40
