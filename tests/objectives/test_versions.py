"""Parts of API 1 and runs of version 0.1 still work; a run says what its scores are of."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from esper_core.leyline.errors import EsperError
from esper_core.leyline.events import RENAMED
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.specs import RewardSpec, TaskSpec
from esper_core.nissa.report.overview import summarise_run
from esper_core.nissa.report.reading import RunDigest
from esper_core.tolaria.run import plan_run, resume_run, start_run
from esper_core.tolaria.trainer import Trainer
from esper_plugins.tasks.digits import digits
from tests.tolaria import ground

OLD = {new: old for old, new in RENAMED.items()}


class OldTask:
    """A task of API 1: it has a kind and names no objective."""

    def __init__(self, argument: str = "", *, seed: int = 0) -> None:
        made = digits()
        self.name, self.kind, self.outputs, self.input_shape = "old", made.kind, made.outputs, made.input_shape
        self.train, self.validation, self.test = made.train, made.validation, made.test


class OldReward:
    """A term of API 1 that reads the gain by its old name."""

    def __call__(self, outcome) -> float:
        assert outcome.accuracy_gain == outcome.score_gain
        return 0.25


def old_parts():
    registry = ground.registry()
    plugin = SimpleNamespace(
        esper_tasks=hookimpl(
            lambda: [TaskSpec(name="old", summary="s", factory=f"{__name__}:OldTask", api=1)], specname="esper_tasks"
        ),
        esper_rewards=hookimpl(
            lambda: [RewardSpec(name="olden", summary="s", factory=f"{__name__}:OldReward", api=1)],
            specname="esper_rewards",
        ),
    )
    registry.register(plugin, name="old", distribution="old-parts")
    return registry


def test_parts_of_the_version_before_run_as_they_are(tmp_path) -> None:
    config = ground.config(tmp_path / "a", task="old", rewards=("olden=2",), epochs=1)
    result = start_run(config, registry=old_parts())
    same = start_run(ground.config(tmp_path / "b", epochs=1), registry=ground.registry())
    assert result.test_score == same.test_score and result.metric.name == "accuracy"
    assert {event["total"] for event in ground.events(tmp_path / "a", "reward")} == {0.5}


def test_an_objective_that_does_not_fit_is_refused_before_a_folder_exists(tmp_path) -> None:
    for name, told in (("regression", "regression cannot judge"), ("dense", "dense cannot judge"), ("mse", "mse")):
        with pytest.raises(EsperError, match=told):
            start_run(ground.config(tmp_path / "x", objective=name), registry=ground.registry())
        assert not (tmp_path / "x").exists()
    settings = {"classification.label_smoothing": 0.2}
    assert (
        plan_run(ground.config(objective="classification", settings=settings), registry=ground.registry()).outputs == 10
    )


def make_old(folder) -> None:
    """Rewrite what a run left as version 0.1 would have named it."""
    lines = []
    for event in ground.events(folder):
        event.pop("metric", None)
        lines.append(json.dumps({OLD.get(key, key): value for key, value in event.items()}, separators=(",", ":")))
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")


def test_a_run_of_the_version_before_opens_with_the_same_figures(tmp_path) -> None:
    start_run(ground.config(tmp_path / "a"), registry=ground.registry())
    now, digest = summarise_run(tmp_path / "a"), RunDigest(tmp_path / "a")
    make_old(tmp_path / "a")
    assert "test_accuracy" in (tmp_path / "a" / "events.jsonl").read_text()
    before = RunDigest(tmp_path / "a")
    assert summarise_run(tmp_path / "a") == now and now["score"] is not None
    assert before.epochs == digest.epochs and before.decisions == digest.decisions and before.log == digest.log


def test_a_checkpoint_of_the_version_before_is_resumed(tmp_path, monkeypatch) -> None:
    plain = Trainer.plain_state

    def old(trainer):
        state = plain(trainer)
        return {**state, "position": {OLD.get(key, key): value for key, value in state["position"].items()}}

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "plain_state", old)
        whole = start_run(ground.config(tmp_path / "a", epochs=2), registry=ground.registry())
    (tmp_path / "a" / "result.json").unlink()
    assert resume_run(tmp_path / "a", registry=ground.registry()) == whole
