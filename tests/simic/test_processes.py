"""Worker processes: the same bits as in one process, and clear words when a worker fails."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from esper_core.registry import load_registry
from esper_core.simic.gym.cohort import Cohort
from esper_core.simic.gym.cpu_engine import WORKER_ENVIRONMENT, WorkerFailed, WorkerPool
from esper_core.simic.gym.environment import Ground

from .test_cohort import CONFIG


def add(state: dict[str, Any], number: int) -> int:
    state["sum"] = state.get("sum", 0) + number
    return state["sum"]


def surroundings(state: dict[str, Any]) -> tuple[dict[str, str], int, int]:
    return {name: os.environ.get(name, "") for name in WORKER_ENVIRONMENT}, torch.get_num_threads(), os.getpid()


def double(state: dict[str, Any], number: int) -> int:
    return 2 * number


def fail(state: dict[str, Any]) -> None:
    raise ValueError("on purpose")


def die(state: dict[str, Any]) -> None:
    os._exit(3)


@pytest.fixture(scope="module")
def pool() -> Any:
    with WorkerPool(2) as pool:
        yield pool


def test_workers_are_tuned_keep_state_and_answer_in_order(pool: WorkerPool) -> None:
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    (first, threads, one), (second, _, two) = pool.everywhere(surroundings)
    assert first == second == dict(WORKER_ENVIRONMENT) and threads == 1 and len({one, two, os.getpid()}) == 3
    assert {name: os.environ.get(name) for name in WORKER_ENVIRONMENT} == before
    pool.everywhere(add, 2)
    assert pool.everywhere(add, 3) == [5, 5]
    assert pool.run([(double, (n,)) for n in range(7)]) == [0, 2, 4, 6, 8, 10, 12]


def test_a_failure_is_told_with_its_cause() -> None:
    with WorkerPool(1) as pool:
        with pytest.raises(WorkerFailed, match="on purpose"):
            pool.everywhere(fail)
        assert pool.everywhere(add, 1) == [1]
        with pytest.raises(WorkerFailed, match="died"):
            pool.everywhere(die)


def test_a_trunk_that_nobody_shares_is_not_computed() -> None:
    ground = Ground.lay(CONFIG, load_registry())
    apart, sharing = (
        Cohort(ground.member(), [ground.member() for _ in range(2)], share=share, twin=False)
        for share in (False, True)
    )  # fmt: skip
    for number, (batch, rate, epoch, _) in enumerate(list(ground.batches())[:16]):
        apart.step([batch], rate)
        sharing.step([batch], rate)
        for one, other in zip(apart.members, sharing.members, strict=True):
            assert torch.equal(one.loss, other.loss)
        if number in (3, 9):
            seen, expected = (cohort.observe([ground.validation()], epoch) for cohort in (apart, sharing))
            assert [view.validation_loss for view in seen] == [view.validation_loss for view in expected]
    assert apart.trunk.tolaria.clock.step == 0 and sharing.trunk.tolaria.clock.step == 16
