"""How often the counterfactual of a seed that has become part of the model is measured."""

from __future__ import annotations

import pytest

from esper_core.leyline.events import CounterfactualMeasured, Event
from esper_core.leyline.stages import STAGES
from esper_core.tolaria.run import build_trainer
from esper_core.tolaria.setup import set_up

from . import ground


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 3, 5]), (100, [0, 5])])
def test_fossils_are_measured_as_often_as_was_asked(every: int, expected: list[int]) -> None:
    """Every so many decisions, and at the last one; a seed that is not permanent is measured at every decision."""
    config = ground.config(settings={"sensors.fossils": every})
    trainer = build_trainer(set_up(config, ground.registry()), {})
    tolaria, plane = trainer.tolaria, trainer.tolaria.plane
    events: list[Event] = []
    tolaria.emit = events.append
    for path in ("block1", "block2"):
        plane.germinate(path, "plain")
    while not plane.growths["block1"].stage.spec.permanent:
        if not plane.step():
            plane.advance("block1", gated=False)
    plane.advance("block2", gated=False)
    plane.advance("block2", gated=False)
    plane.step()
    batches = [next(iter(trainer.task.validation.batches(64)))]
    measured: dict[str, list[int]] = {"block1": [], "block2": []}
    for decision in range(tolaria.decisions):
        assert STAGES[plane.growths["block1"].stage].permanent
        events.clear()
        tolaria.decide(batches, decision / 2)
        for event in events:
            if isinstance(event, CounterfactualMeasured):
                measured[event.slot].append(decision)
    assert measured["block1"] == expected and measured["block2"] == list(range(tolaria.decisions))
