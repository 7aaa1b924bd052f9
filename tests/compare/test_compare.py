"""The arms of a comparison are what they say: paired, equal in FLOPs, resumable, and within budgets."""

from __future__ import annotations

import json
import random
from pathlib import Path

import attrs
import pytest

from esper_core.leyline.errors import BadFile, BadOption
from esper_core.leyline.stages import Stage
from esper_core.registry import load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.model_file import load_plane
from esper_core.tolaria.run import start_run
from esper_core.tolaria.setup import set_up
from esper_core.trials.compare import ARMS, CompareConfig, compare_run, draw_organs, training_flops
from esper_core.trials.static import StaticSeed, implant, organs_of, train_static

CONFIG = RunConfig(
    host="cnn", task="digits", blueprints=("conv", "depthwise"), budget_params="200%", epochs=4, batch_size=64,
    learning_rate=0.02, decisions_per_epoch=3, decision_examples=64,
    settings={"cnn.widths": "4,8", "cnn.pool": "stride", "plane.ramp": 0.02},
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "run"
    result = start_run(attrs.evolve(CONFIG, out=str(folder)))
    assert result.fossilized
    return folder


def test_a_static_host_is_the_waiting_run_bit_for_bit(tmp_path: Path) -> None:
    config = attrs.evolve(CONFIG, controller="wait", decision_examples=0)
    waited = start_run(attrs.evolve(config, out=str(tmp_path / "wait")))
    ground = set_up(config, load_registry())
    static = train_static(ground, ground.timetable.steps)
    assert static.test_loss == waited.test_loss
    assert static.validation_loss == waited.validation_loss
    assert static.params == waited.params


def test_implanted_seeds_are_whole_trained_and_counted() -> None:
    ground = set_up(CONFIG, load_registry())
    organs = (StaticSeed("block1", "conv", "residual:cosine"), StaticSeed("block2", "depthwise", "residual:cosine"))
    implant(ground.plane, organs)
    assert organs_of(ground.plane.structure()) == organs
    assert {g.stage for g in ground.plane.growths.values()} == {Stage.FOSSILIZED}
    assert all(float(slot.alpha) == 1.0 for slot in ground.plane.slots.values())
    before = {name: value.clone() for name, value in ground.plane.module.state_dict().items()}
    result = train_static(ground, 5, test=False)
    assert result.test_loss is None and result.steps == 5
    assert result.params == ground.plane.host_params + ground.plane.ledger.seed_params
    moved = [n for n, value in ground.plane.module.state_dict().items() if not value.equal(before[n])]
    assert any("block1" in name for name in moved) and any("block2" in name for name in moved)


def test_random_architectures_keep_to_the_budget_and_differ() -> None:
    registry = load_registry()
    config = attrs.evolve(CONFIG, budget_params="80%")
    drawn = set()
    for index in range(6):
        ground = set_up(config, registry)
        drawn.add(draw_organs(ground, random.Random(index)))
        assert 0 < ground.plane.ledger.excess_params_ratio <= 0.8
    assert len(drawn) > 2


def test_every_arm_is_run_once_and_the_table_is_paired(run: Path) -> None:
    said: list[str] = []
    table = compare_run(run, CompareConfig(seeds=2, workers=1, candidates=2), notify=said.append)
    assert json.loads((run / "compare.json").read_text()) == table
    arms = {arm["name"]: arm for arm in table["arms"]}
    assert tuple(arms) == ARMS
    assert all(arm["seeds"] == [0, 1] and len(arm["accuracy"]) == 2 for arm in table["arms"])
    assert said[0].startswith(f"comparing: {2 * len(ARMS) - 1} more trainings")  # the run is the grown arm of its seed
    assert len(said) == 2 * len(ARMS)
    units = {name: [json.loads((run / "compare" / f"{name}-{s}.json").read_text()) for s in (0, 1)]
             for name in ("grown", "static", "static-at-FLOPs", "random-search", "host")}  # fmt: skip
    for grown, static, equal, search, host in zip(*units.values(), strict=True):
        assert static["organs"] == equal["organs"] == grown["organs"]
        assert static["params"] == equal["params"] == grown["params"] > host["params"]
        assert equal["flops"] == pytest.approx(grown["flops"], rel=0.01)
        assert search["flops"] == pytest.approx(grown["flops"], rel=0.02)
        assert host["flops"] < static["flops"]
    assert units["grown"][0]["flops"] == training_flops(run)
    pair = next(p for p in table["paired"] if p["minus"] == "host")
    differences = [g["score"] - h["score"] for g, h in zip(units["grown"], units["host"], strict=True)]
    assert pair["mean"] == pytest.approx(sum(differences) / 2)
    assert pair["low"] is pair["high"] is None and pair["n"] == 2  # two seeds bear no interval


def test_what_is_done_is_not_run_again(run: Path) -> None:
    compare_run(run, CompareConfig(seeds=1, arms=("host",)))
    marked = run / "compare" / "host-0.json"
    row = json.loads(marked.read_text())
    marked.write_text(json.dumps({**row, "score": 0.125}))
    said: list[str] = []
    table = compare_run(run, CompareConfig(seeds=1, arms=("host",)), notify=said.append)
    assert not said
    assert next(a for a in table["arms"] if a["name"] == "host")["accuracy"] == [0.125]
    marked.unlink()


def test_an_unfinished_run_or_an_unknown_arm_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="did you mean static"):
        CompareConfig(arms=("statics",))
    with pytest.raises(BadFile):
        compare_run(tmp_path)


def test_the_final_architecture_is_that_of_the_saved_model(run: Path) -> None:
    plane, header = load_plane(run)
    assert {o.path for o in organs_of(header["structure"])} == set(plane.contributing())
