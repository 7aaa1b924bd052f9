"""A frontier protocol tunes every arm, chooses by validation, and can be cut off anywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import pytest

from esper_core.leyline.errors import BadOption
from esper_core.registry import load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.trials.frontier.job import Job
from esper_core.trials.frontier.of_run import describe_frontier, frontier_of, plan_of_run, sizes_around
from esper_core.trials.frontier.plan import Frontier
from esper_core.trials.frontier.queue import append_row, read_rows
from esper_core.trials.frontier.table import equal_loss, show_frontier, summarise_frontier

GROWN = Job(arm="grown", budget=1.0, size={"layers": 1, "width": 64}, rate=0.0, heuristic=True)
FRONTIER = Frontier(
    name="test", base={}, budget=1e12, host=(1, 64), sizes=((2, 64), (3, 64), (4, 64), (5, 64), (8, 64), (2, 96)),
    grown=(GROWN,), rates=(0.004, 0.008), most_rates=3, decays=(0.4, 0.2), finalists=2, seeds=3,
)  # fmt: skip


def outcome(job: Job) -> dict:
    """Best at 3 blocks, rate 0.016 and decay 0.2; grown 5% better."""
    depth = 3 if not job.is_static else job.size["layers"] * job.size["width"] / 64
    loss = 1.4 + 0.1 * math.log(depth / 3) ** 2 + 0.01 * math.log(job.rate / 0.016) ** 2 + 0.02 * (job.decay - 0.2)
    loss = (loss if job.is_static else 0.95 * loss) + 1e-4 * math.sin(7 * job.seed + depth)
    return {
        **job.to_mapping(), "key": job.key, "loss": loss, "test_loss": loss + 0.1 if job.test else None,
        "params": 49_000 * depth, "flops": job.budget, "train_seconds": 1.0, "seconds": 1.0, "grown_at": [],
    }  # fmt: skip


def run(rows: list[dict], most: int = 1000) -> list[Job]:
    done = []
    while len(done) < most:
        keys = {row["key"] for row in rows}
        job = next((job for job in FRONTIER.plan(rows) if job.key not in keys), None)
        if job is None:
            break
        rows.append(outcome(job))
        done.append(job)
    return done


def test_it_ends_and_what_it_found_is_what_is_there() -> None:
    rows: list[dict] = []
    jobs = run(rows)
    assert len({job.key for job in jobs}) == len(jobs)
    summary = summarise_frontier(FRONTIER, rows)
    best = summary["tuned"]["static 3x64"]
    assert (best["rate"], best["decay"]) == (0.016, 0.2)
    assert {arm["name"] for arm in summary["arms"]} == {"grown", "static 3x64", "static 2x96", "static 1x64"}
    assert all(arm["seeds"] == [0, 1, 2] for arm in summary["arms"])
    pair = next(pair for pair in summary["paired"] if pair["arm"] == "grown")
    assert pair["minus"] in ("static 3x64", "static 2x96") and -0.055 < pair["low"] < pair["high"] < -0.04
    assert summary["isoflop"]["fitted"] and "grown" in show_frontier(summary)


def test_a_contender_gets_a_longer_decay_while_the_longest_is_best_and_the_host_does_not() -> None:
    def run_with(most: int, best: float, host: tuple[int, int] = (1, 64)) -> dict[str, set[float]]:
        frontier = attrs.evolve(FRONTIER, host=host, decays=(0.4, 0.2, 0.6), most_decays=most, finalists=1, seeds=1)
        rows: list[dict] = []
        while job := next((j for j in frontier.plan(rows) if j.key not in {row["key"] for row in rows}), None):
            loss = outcome(job)["loss"] - 0.02 * (job.decay - 0.2) + 0.02 * abs(job.decay - best)
            rows.append({**outcome(job), "loss": loss})
        found: dict[str, set[float]] = {}
        for row in rows:
            found.setdefault(row["arm"], set()).add(row["decay"])
        return found

    found = run_with(4, 0.8)
    assert found["static 3x64"] == found["grown"] == {0.2, 0.4, 0.6, 0.8}
    assert found["static 1x64"] == {0.2, 0.4, 0.6} and found["static 4x64"] == {0.4}
    assert run_with(4, 0.8, (3, 64))["static 3x64"] == {0.2, 0.4, 0.6, 0.8}  # a host that is the best static network
    assert run_with(4, 0.4)["grown"] == run_with(3, 0.8)["grown"] == {0.2, 0.4, 0.6}


def test_flops_to_equal_loss_are_told_within_one_configuration() -> None:
    def found(name: str, budget: float, static: float, grown: float, **config: str) -> dict:
        tuned = {"s": {"validation_loss": static, "static": True}, "g": {"validation_loss": grown, "static": False}}
        return {"name": name, "budget": budget, "config": config, "tuned": tuned}

    one, three = found("one", 1e15, 1.0, 0.95), found("three", 3e15, 0.9, 0.9 * 0.9)
    other = found("muon", 1e15, 0.5, 0.4, optimizer="muon")
    told = equal_loss([one, three, other])
    assert set(told) == {"one", "three"}
    assert told["three"]["g"] == pytest.approx(1 / 3)  # the static networks need three times as many for 0.81


def test_test_text_is_read_only_when_all_is_tuned() -> None:
    jobs = run([])
    first = next(number for number, job in enumerate(jobs) if job.test)
    assert all(job.test and job.stage == "final" and job.seed < 3 for job in jobs[first:])
    assert all(job.seed == FRONTIER.tune_seed for job in jobs[:first])
    tries = {job.arm: sum(j.arm == job.arm and j.decay == 0.4 for j in jobs[:first]) for job in jobs[:first]}
    assert tries["grown"] == tries["static 3x64"] == FRONTIER.most_rates  # equal for all that contend
    assert tries["static 8x64"] == 1  # 8 blocks are too far off for a rate to help


def test_it_goes_on_from_any_row(tmp_path: Path) -> None:
    whole: list[dict] = []
    jobs, file = run(whole), tmp_path / "rows.jsonl"
    half: list[dict] = []
    run(half, most=9)
    for row in half:
        append_row(file, row)
    with open(file, "a", encoding="utf-8") as torn:
        torn.write(json.dumps(whole[9])[:40])
    rows = read_rows(file)
    assert len(rows) == 9
    run(rows)
    assert [row["key"] for row in rows] == [job.key for job in jobs]


def run_row(job: Job) -> dict:
    """As `outcome`, for a network that doubles once at 0.3 of its steps; a small network's token is worth 0.6."""
    depth = job.size["layers"] * job.size["width"] / 64
    steps = job.budget / (1e8 * depth)
    grown_at = [] if job.is_static else [0.3]
    tokens = steps if job.is_static else (steps := job.budget / (1e8 * 1.7)) * (0.7 + 0.6 * 0.3)
    loss = 2.0 * tokens**-0.05 * (1.0 if depth in (1, 2) else 1.1)
    return {
        **outcome(job), "loss": loss, "test_loss": loss, "steps": steps, "grown_at": grown_at,
        "curve": [[at, loss * (2 - at / 50)] for at in range(50)],
    }  # fmt: skip


def test_the_frontier_of_a_run_tells_what_tokens_and_flops_were_worth() -> None:
    config = RunConfig(host="gpt", budget_total="1e12", learning_rate=0.008, settings={"gpt.layers": "1"})
    frontier = frontier_of(config, 1e12, load_registry(), seeds=2)
    assert (1, 64) in frontier.sizes and (2, 64) in frontier.sizes and len(frontier.sizes) > 6
    assert frontier.arms()[0].size == {"layers": 1, "width": 64}
    rows: list[dict] = []
    while jobs := [job for job in plan_of_run(frontier, rows) if job.key not in {row["key"] for row in rows}]:
        rows.append(run_row(jobs[0]))
    found = describe_frontier(frontier, rows)
    assert found["token_worth"] == pytest.approx(0.6, abs=1e-6)
    assert found["equal_loss"] == pytest.approx(1.7 / (0.7 + 0.6 * 0.3))  # here the host alone is the better buy
    assert min(found["regret"].values()) == 0.0 and "a token of the smaller" in show_frontier(found)


def test_a_run_without_budget_or_sizes_has_no_frontier() -> None:
    with pytest.raises(BadOption, match="sizes"):
        frontier_of(RunConfig(host="timm:resnet18", budget_total="1e12"), 1e12, load_registry(), 2)
    with pytest.raises(BadOption, match="sizes"):  # 0 stands for what a model is configured to have
        frontier_of(RunConfig(host="transformers:gpt2", budget_total="1e12"), 1e12, load_registry(), 2)


@pytest.mark.parametrize("host", [(1, 64), (2, 96), (6, 192), (3,), (4, 48)])
def test_sizes_keep_heads_whole_and_hold_the_hosts(host) -> None:
    sizes = sizes_around(host)
    assert host in sizes and len(sizes) == len(set(sizes)) and all(size[0] >= 1 for size in sizes)
    assert all(size[1] % 16 == 0 for size in sizes if len(size) > 1)


def test_a_job_is_known_by_what_changes_its_result() -> None:
    assert GROWN.key == attrs.evolve(GROWN, arm="other", stage="tune").key
    assert GROWN.key != attrs.evolve(GROWN, rate=0.1).key
    assert Job.from_mapping(json.loads(json.dumps({**GROWN.to_mapping(), "loss": 1.0}))) == GROWN
