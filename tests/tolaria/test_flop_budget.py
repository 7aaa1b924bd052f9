"""A run with a budget of FLOPs ends when it is spent, and goes by its share in all that went by steps."""

from __future__ import annotations

import pytest

from esper_core.kasmina import counterfactual
from esper_core.leyline import scaling
from esper_core.leyline.errors import BadOption
from esper_core.leyline.specs import HostSpec
from esper_core.registry import load_registry
from esper_core.tolaria import flop_budget, run, setup
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.model_file import load_plane
from esper_core.tolaria.run import plan_run, resume_run, start_run
from esper_core.tolaria.run_folder import RunFolder
from esper_core.trials.compare import deeper_host
from esper_core.trials.static import organs_of
from esper_hosts.gpt import start_size
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter

BUDGET = 4e9


def spent(folder) -> float:
    return ground.events(folder, "epoch_ended")[-1]["total_flops"]


def test_growing_spends_the_same_in_fewer_steps(tmp_path):
    grow = ground.schedule(tmp_path / "plan.json", {"share": 0.2, "op": "germinate", "slot": "*", "blueprint": "plain"})
    runs = {}
    for name, controller in (("alone", "wait"), ("grown", grow)):
        config = ground.config(tmp_path / name, controller=controller, budget_total=f"{BUDGET:g}", epochs=1)
        runs[name] = start_run(config, registry=ground.registry(), test=False)
        assert BUDGET <= spent(tmp_path / name) < 1.02 * BUDGET
        assert runs[name].test_loss is None and runs[name].validation_loss is not None
    assert runs["grown"].steps < runs["alone"].steps
    born = next(e for e in ground.events(tmp_path / "grown", "stage_changed") if e["after"] == "germinated")
    assert 0.15 * runs["alone"].steps < born["step"] < 0.25 * runs["alone"].steps
    rates = [e["learning_rate"] for e in ground.events(tmp_path / "grown", "epoch_ended")]
    assert rates[-1] < 0.05 * max(rates)


def test_validation_passes_are_counted_anew_only_where_they_compute_something_else(tmp_path, monkeypatch):
    counted = []
    count = counterfactual.count_flops
    monkeypatch.setattr(counterfactual, "count_flops", lambda run: counted.append(1) or count(run))
    step = {"decision": 0, "op": "germinate", "slot": "block2", "blueprint": "plain"}
    grow = ground.schedule(tmp_path / "plan.json", step)
    start_run(ground.config(tmp_path / "run", controller=grow, epochs=6), registry=ground.registry(), test=False)
    moved = [e["after"] for e in ground.events(tmp_path / "run", "stage_changed")]
    assert {"germinated", "training", "blending", "shadowing", "probationary"} <= set(moved)
    assert len(counted) == 3  # without a seed that shows, with and without one, and with one that is not measured


def test_a_budgeted_run_resumes_bit_for_bit(tmp_path):
    def config(name):
        return ground.config(tmp_path / name, controller="wait", budget_total=f"{BUDGET:g}", checkpoint_every=5)

    assert start_run(config("whole"), registry=ground.registry()).status == "finished"
    stopped = {"stop": Interrupter(15, 6)}
    assert start_run(config("cut"), stopped, registry=ground.registry()).status == "interrupted"
    assert resume_run(tmp_path / "cut", registry=ground.registry()).status == "finished"
    assert ground.fingerprint(tmp_path / "cut") == ground.fingerprint(tmp_path / "whole")


def test_minutes_become_a_budget_that_a_resumed_run_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "measure_speed", lambda *args: BUDGET / 60)
    told: list[str] = []
    config = ground.config(tmp_path / "run", controller="wait", minutes=1.0)
    start_run(config, registry=ground.registry(), notify=told.append, test=False)
    assert any("a budget of 4e+09 FLOP" in line for line in told)
    assert RunFolder.open(tmp_path / "run")[1].budget_total == "4e+09"
    assert BUDGET <= spent(tmp_path / "run") < 1.02 * BUDGET


def test_measuring_the_speed_leaves_no_trace(tmp_path):
    reference = ground.config(tmp_path / "a", controller="wait", budget_total=f"{BUDGET:g}")
    start_run(reference, registry=ground.registry())
    seen = ground.events(tmp_path / "a", "decided")
    speed = flop_budget.measure_speed

    def measured(*args):
        assert speed(*args) > 0
        return BUDGET / 60

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flop_budget, "TRIAL_SECONDS", 0.01)
        patch.setattr(setup, "measure_speed", measured)
        config = ground.config(tmp_path / "b", controller="wait", minutes=1.0)
        start_run(config, registry=ground.registry())
    assert ground.events(tmp_path / "b", "decided") == seen


def test_a_dry_run_of_a_large_host_tries_one_example(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(run, "measure_speed", lambda *args: tried.append(args[4]) or 1e9)
    for flops in (run._TRIAL_FLOPS, 1.0):
        monkeypatch.setattr(run, "_TRIAL_FLOPS", flops)
        assert plan_run(ground.config(tmp_path / "a"), registry=ground.registry()).seconds > 0
    assert tried == [ground.config(tmp_path / "a").batch_size, 1]


@pytest.mark.parametrize("text", ["much", "-1e9", "0", "nan", "inf"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(BadOption, match="budget_total"):
        flop_budget.budget_of(ground.config(budget_total=text))


@pytest.mark.parametrize("length", [{"budget_total": "1e3"}, {"minutes": 1.0}])
def test_a_budget_below_one_step_is_refused(tmp_path, monkeypatch, length):
    monkeypatch.setattr(setup, "measure_speed", lambda *args: 1e3 / 60)
    with pytest.raises(BadOption, match=r"less than one step of \d+ examples"):
        start_run(ground.config(tmp_path / "run", controller="wait", **length), registry=ground.registry())
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pytest.mark.parametrize(("optimizer", "slots"), [("adamw", ["blocks.0", "blocks.0+1"]), ("muon", ["blocks.0"])])
def test_the_heuristic_deepens_a_network_by_its_budget_alone(tmp_path, monkeypatch, optimizer, slots):
    monkeypatch.setattr(scaling, "NEED", {"adamw": 5.0, "muon": 13.0}[optimizer])
    settings = {"gpt.layers": "1", "gpt.width": 16, "gpt.heads": 1, "stdlib.length": 16, "governor.settle": 2}
    config = RunConfig(
        host="gpt", budget_total="1e9", batch_size=8, optimizer=optimizer, settings=settings, out=str(tmp_path / "run"),
        decisions_per_epoch=0, device="cpu",
    )  # fmt: skip
    told: list[str] = []
    result = start_run(config, notify=told.append)
    assert any("copies of the host's own blocks" in line for line in told)
    born = [e for e in ground.events(tmp_path / "run", "stage_changed") if e["after"] == "germinated"]
    assert [event["slot"] for event in born] == slots and result.fossilized == tuple(slots)
    assert BUDGET / 4 <= spent(tmp_path / "run") < 1.05 * BUDGET / 4
    block = 12 * 16**2 + 2 * 16
    assert result.params - result.host_params == (2 ** len(slots) - 1) * block
    registry = load_registry()
    plane, header = load_plane(tmp_path / "run", registry)
    ran = RunFolder.open(tmp_path / "run")[1]
    deeper = deeper_host(ran, plane, organs_of(header["structure"]), registry)
    assert deeper is not None and deeper.settings["gpt.layers"] == 2 ** len(slots)


def test_a_budget_chooses_where_to_start_unless_the_user_did():
    spec = HostSpec(name="gpt", summary="", factory="a:b", sensors=("alpha",), sizes=("layers", "width"), start="a:c")
    sizes = [fit_start(spec, budget)["gpt.width"] for budget in ("5e12", "3e15", "1e16")]
    assert sizes == sorted(sizes) and sizes[0] == 64 and 192 <= sizes[1] <= 256
    kept = RunConfig(host="gpt", budget_total="3e15", settings={"gpt.layers": 1})
    assert flop_budget.fit_to_budget(kept, spec, start_size) is kept


def fit_start(spec: HostSpec, budget: str) -> dict:
    return dict(flop_budget.fit_to_budget(RunConfig(host="gpt", budget_total=budget), spec, start_size).settings)
