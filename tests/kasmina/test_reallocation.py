"""Ranks move from seeds that earn nothing to those that do; a seed that grows computes what it computed."""

from __future__ import annotations

import pytest
import torch

from esper_core.kasmina.around import resolve_points
from esper_core.kasmina.ledger import Limits
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.reallocation import move_ranks, resize
from esper_core.leyline.actions import Tempo
from esper_core.leyline.errors import IllegalCommand
from esper_core.leyline.stages import Stage
from esper_core.leyline.view import Interval
from esper_core.testing.blueprint import disturb
from esper_core.testing.cases import installed
from tests.kasmina.test_around import HOSTS


def planted(blueprint: str, words: list[str], limit: int | None = None) -> Plane:
    """A plane with a seed of rank 2 in every slot, on probation."""
    torch.manual_seed(0)
    host = HOSTS["gpt2"]()
    host.module.eval()
    plane = Plane(host, installed(), points=resolve_points(host, words), limits=Limits(limit, None), rent=0.0)
    for path in list(plane.slots):
        plane.germinate(path, blueprint, tempo=Tempo.INSTANT, options={"rank": 2})
        plane.record(path, loss=Interval(0.0, 0.0, 0.0, 10))
        plane.decide()
        disturb(plane.slots[path].seed)  # type: ignore[arg-type]
        assert plane.growths[path].stage is Stage.PROBATIONARY
    return plane


@pytest.mark.parametrize("blueprint", ["lora", "dora"])
def test_a_seed_takes_another_rank_and_files_know_it(blueprint: str) -> None:
    plane = planted(blueprint, ["around:transformer.h.0.mlp.c_fc"])
    (path,) = plane.slots
    tokens = torch.randint(40, (3, 12))
    changes = []
    plane.on_change(changes.append)
    with torch.no_grad():
        expected, params = plane.host.forward_with_slots(tokens), plane.ledger.seed_params
        resize(plane, path, 5, "it earns")
        torch.testing.assert_close(plane.host.forward_with_slots(tokens), expected, rtol=0, atol=1e-6)
        assert plane.ledger.seed_params == params + 3 * (16 + 64)
        resize(plane, path, 2)
        torch.testing.assert_close(plane.host.forward_with_slots(tokens), expected, rtol=0, atol=1e-6)
        assert plane.ledger.seed_params == params
        resize(plane, path, 4)
    assert [change.before is change.after for change in changes] == [True] * 3
    live = [id(p) for p in plane.slots[path].seed.parameters()]  # type: ignore[union-attr]
    assert {id(p) for p in changes[-1].added} <= set(live) and not {id(p) for p in changes[-1].removed} & set(live)
    again = planted(blueprint, ["around:transformer.h.0.mlp.c_fc"])
    again.rebuild(plane.structure())
    again.module.load_state_dict(plane.module.state_dict())
    again.host.module.load_state_dict(plane.host.module.state_dict())
    with torch.no_grad():
        assert torch.equal(again.host.forward_with_slots(tokens), plane.host.forward_with_slots(tokens))


def test_ranks_move_from_seeds_that_earn_nothing_to_those_that_do() -> None:
    plane = planted("lora", ["around:mlp"], limit=4 * 2 * 80)
    idle, small, large, unsure = list(plane.slots)
    assert plane.ledger.seed_params == 640
    for path, mean, spread in ((idle, -0.1, 0.05), (small, 0.2, 0.1), (large, 0.8, 0.1), (unsure, 0.1, 0.2)):
        plane.record(path, loss=Interval(mean, mean - spread, mean + spread, 100))
    moved = move_ranks(plane)
    assert moved.removed == {idle: 2} and moved.grown == {large: (2, 4)}
    assert plane.growths[idle].stage is Stage.CULLED and plane.growths[unsure].options["rank"] == 2
    assert plane.ledger.seed_params == 640
    with pytest.raises(IllegalCommand, match="rank 9"):
        resize(plane, large, 9)
    for path in (small, large, unsure):
        plane.record(path, loss=Interval(-0.1, -0.2, 0.0, 100))
    assert not move_ranks(plane).removed, "where nothing is shown to earn, nothing moves"
