"""Worker processes: the same bits as in one process, and clear words when a worker fails."""

from __future__ import annotations

import os
from typing import Any

import attrs
import pytest
import torch

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption
from esper_core.leyline.stages import Op
from esper_core.simic.gym.cpu_engine import WORKER_ENVIRONMENT, WorkerFailed, WorkerPool
from esper_core.simic.gym.population import LocalPopulation, ProcessPopulation, make_population

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


def test_a_population_over_processes_computes_the_same_bits() -> None:
    over, within = ProcessPopulation(CONFIG, 3, workers=2), LocalPopulation(CONFIG, 3)
    try:
        steps = list(within.ground.batches())[:24]
        history = []
        for number, (batch, rate, epoch, _) in enumerate(steps):
            over.step(batch, rate)
            within.step(batch, rate)
            history.append(within.losses)
            if number in (5, 12, 18):
                over.wait()
                assert torch.equal(over.losses[(over.steps - 1) % 8], history[-1])
                views, expected = over.observe(epoch), within.observe(epoch)
                assert views == expected
                for k in (0, 2):
                    command = Command(
                        Op.GERMINATE if number == 5 else Op.ADVANCE, "block1", "conv" if number == 5 else ""
                    )
                    assert over.act(k, [command]) == within.act(k, [command])
        assert [attrs.asdict(s)["stage"] for s in over.observe(2.0)[2].slots] != ["dormant"] * 3
    finally:
        over.close()


def test_a_trunk_that_nobody_shares_is_not_computed() -> None:
    apart, sharing = LocalPopulation(CONFIG, 2, share=False), LocalPopulation(CONFIG, 2)
    for number, (batch, rate, epoch, _) in enumerate(list(apart.ground.batches())[:16]):
        apart.step(batch, rate)
        sharing.step(batch, rate)
        assert torch.equal(apart.losses, sharing.losses)
        if number in (3, 9):
            seen, expected = apart.observe(epoch), sharing.observe(epoch)
            assert [view.validation_loss for view in seen] == [view.validation_loss for view in expected]
    assert apart.cohort.trunk.tolaria.clock.step == 0 and sharing.cohort.trunk.tolaria.clock.step == 16


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BadOption, match="backend"):
        make_population(CONFIG, 1, backend="quantum")
