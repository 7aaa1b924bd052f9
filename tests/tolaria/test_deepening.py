"""A run that copies blocks in resumes bit for bit, is rolled back exactly, and is left in peace while it settles."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from esper_core.cli.summary import last_note
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.errors import EsperError
from esper_core.leyline.stages import Op
from esper_core.registry import load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.export import FORMATS, export_run
from esper_core.tolaria.governor import Governor, GovernorConfig
from esper_core.tolaria.model_file import load_model
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_core.tolaria.run import resume_run, start_run
from esper_core.tolaria.snapshot import Snapshot, training_tensors
from esper_hosts.gpt import gpt
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter

GROW: dict[str, Any] = {
    "op": "germinate", "blueprint": "copy", "tempo": "instant", "options": {"blocks": "all"}
}  # fmt: skip


def configure(folder: Path, name: str, steps: list[dict[str, Any]], **changes: Any) -> RunConfig:
    """Two epochs of 12 steps of a GPT of two blocks on a small text; a decision every second step."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(" ".join(f"{n} and {n * n % 97} make {n + n * n % 97};" for n in range(900)))
    settings = {"gpt.layers": 2, "gpt.width": 16, "text.length": 16, "governor.check_every": 2, "governor.settle": 4}
    values: dict[str, Any] = {
        "host": "gpt", "task": f"text:{text}", "blueprints": ("copy",), "budget_params": "", "epochs": 2,
        "steps_per_epoch": 12, "batch_size": 8, "decisions_per_epoch": 6, "checkpoint_every": 3, "device": "cpu",
        "learning_rate": 4e-3, "schedule": "wsd", "decision_examples": 16,
        "controller": ground.schedule(folder / "plan.json", *steps),
    }  # fmt: skip
    return RunConfig(out=str(folder / name), settings=settings | changes.pop("settings", {}), **(values | changes))


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2→4→8 blocks."""
    folder = tmp_path_factory.mktemp("deepening")
    steps = [{**GROW, "decision": 1, "slot": "blocks.1"}, {**GROW, "decision": 7, "slot": "blocks.1+1"}]
    assert start_run(configure(folder, "reference", steps)).status == "finished"
    return folder


def test_a_second_doubling_takes_in_the_first_and_nobody_undoes_it(doubled: Path) -> None:
    kinds = {event["kind"] for event in ground.events(doubled / "reference")}
    assert not kinds & {"governor_alarm", "rolled_back", "command_refused", "fault_caught"}
    born = [e for e in ground.events(doubled / "reference", "stage_changed") if e["after"] == "germinated"]
    assert [(e["slot"], e["params"]) for e in born] == [("blocks.1", 2 * 3104), ("blocks.1+1", 4 * 3104)]


def test_counterfactuals_wait_until_the_loss_has_settled(doubled: Path) -> None:
    born = [e["step"] for e in ground.events(doubled / "reference", "stage_changed") if e["after"] == "germinated"]
    measured = {e["step"] for e in ground.events(doubled / "reference", "counterfactual")}
    assert measured and not any(step < other < step + 4 for step in born for other in measured)


def test_it_reloads_without_user_code(doubled: Path) -> None:
    model = load_model(doubled / "reference")
    assert sum(p.numel() for p in model.parameters()) == 2 * 256 * 16 + 16 + 8 * 3104


def test_the_log_and_the_summary_tell_why_nothing_grew(tmp_path: Path) -> None:
    config = attrs.evolve(configure(tmp_path, "small", []), controller="heuristic", budget_total="2e8", epochs=1)
    assert start_run(config).status == "finished"
    notes = {event["note"] for event in ground.events(tmp_path / "small", "decided")}
    assert all("the budget cannot feed" in note for note in notes)
    assert last_note(tmp_path / "small") in notes


def test_adapters_of_peft_cannot_hold_it(doubled: Path, tmp_path: Path) -> None:
    with pytest.raises(EsperError, match="LoRA"):
        export_run(doubled / "reference", "peft", tmp_path / "peft")


@pytest.mark.parametrize("form", sorted({*FORMATS} - {"peft"}))
def test_it_exports(doubled: Path, tmp_path: Path, form: str) -> None:
    exported = export_run(doubled / "reference", form, tmp_path / form)
    assert exported.difference < 1e-4 and exported.examples > 10


@pytest.mark.parametrize("after", [6, 20, 60])
def test_it_resumes_bit_for_bit(doubled: Path, after: int) -> None:
    steps = [{**GROW, "decision": 1, "slot": "blocks.1"}, {**GROW, "decision": 7, "slot": "blocks.1+1"}]
    name = f"stopped-{after}"
    first = start_run(configure(doubled, name, steps), {"stop": Interrupter(signal.SIGTERM, after)})
    assert first.status == "interrupted"
    assert resume_run(doubled / name).status == "finished"
    expected, found = ground.fingerprint(doubled / "reference"), ground.fingerprint(doubled / name)
    assert found == expected


def test_a_rollback_undoes_it_exactly() -> None:
    host = gpt(input_shape=(8,), layers=2, width=16)
    plane = Plane(host, load_registry(), blueprints=["copy"])
    optimizer = GrowthOptimizer(host.module.parameters(), RunConfig(learning_rate=1e-2))
    optimizer.follow(plane)
    tokens = torch.arange(16).view(2, 8)

    def train(steps: int) -> None:
        for _ in range(steps):
            host.forward_with_slots(tokens).square().mean().backward()
            optimizer.step(1e-2)
            optimizer.zero_grad()

    train(3)
    snapshot, before = Snapshot(), {k: v.clone() for k, v in training_tensors(plane, optimizer).items()}
    snapshot.take(plane, optimizer, 3)
    plane.apply(Command(Op.GERMINATE, "blocks.1", "copy", tempo=Tempo.INSTANT, options={"blocks": "all"}))
    train(2)
    snapshot.restore(plane, optimizer)
    after = training_tensors(plane, optimizer)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    train(1)
    optimizer.check(plane)


def test_the_governor_holds_still_and_then_judges_the_new_network() -> None:
    governor = Governor(GovernorConfig(warmup=10, settle=20), 5.0)
    assert governor.observe([1.0] * 100, 100) is None
    governor.hold_still(100)
    assert governor.observe([9.0] * 20, 120) is None and governor.observe_validation(9.0, 110) is None
    assert governor.observe([2.0] * 30, 150) is None  # the level of before is not held against it
    assert governor.observe([9.0] * 30, 180) is not None
    governor.hold_still(180)
    assert governor.observe([float("nan")], 181) is not None
