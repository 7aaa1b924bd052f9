"""The heuristic doubles depth when, and only when, what is left of a budget can feed the deeper network."""

from __future__ import annotations

import attrs
import pytest

from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.stages import Op, Stage
from esper_core.leyline.view import BlueprintView, Course, RunView, SlotView
from esper_core.tamiyo.depth_plan import due_at, find_deepening, plan_depth
from esper_core.tamiyo.heuristic import HeuristicController

WIDTH, LENGTH = 64, 128
BLOCK = 12 * WIDTH**2
FORWARD = 2 * BLOCK * LENGTH


def offer(blocks: int) -> BlueprintView:
    return BlueprintView("copy", "depth", frozenset(), blocks * BLOCK, blocks * FORWARD)


def slot(path: str, blocks: int = 0, *, stage: Stage = Stage.DORMANT, age: int = 0) -> SlotView:
    """A slot with an offer of so many blocks, or with a copy in `stage`."""
    spec = InjectionSpec(path.partition("+")[0], WIDTH, "NLD", 0, (LENGTH, WIDTH))
    return SlotView(
        path=path, spec=spec, stage=stage, alpha=float(not blocks), age=age, stage_age=0,
        blueprint="" if blocks else "copy", blend="", params=0, flops=0,
        legal=frozenset({Op.GERMINATE} if blocks else ()),
        blueprints=(offer(blocks),) if blocks else (), counterfactual=None, score_counterfactual=None,
        readings={}, embargo_left=0, seed_family="" if blocks else "depth",
    )  # fmt: skip


def view(slots: list[SlotView], budget: float, share: float, blocks: int, targets: int | None = None) -> RunView:
    """A network of so many blocks that has spent a share of its budget."""
    spent = share * budget
    seen = targets if targets is not None else int(spent * LENGTH / (3 * blocks * FORWARD))
    return RunView(
        decision=round(100 * share), decisions=100, epoch=0.0, epochs=1,
        train_loss=None, validation_loss=None, validation_score=None,
        history=(), host_params=blocks * BLOCK, host_flops=blocks * FORWARD, seed_params=0, seed_flops=0,
        params_left=None, flops_left=None, rent=0.0, learning_rate=1.0, governor="calm", rollbacks=0,
        slots=tuple(slots), blends=("residual:cosine",), course=Course(budget, spent, seen, float(LENGTH)),
    )  # fmt: skip


def times(budget: float, order: str = "stack") -> list[float]:
    """Shares of the budget at which a network of one block doubles, decision by decision."""
    found, blocks, targets, before = [], 1, 0.0, 0.0
    for step in range(1, 101):
        share = step / 100
        targets += (share - before) * budget * LENGTH / (3 * blocks * FORWARD)
        before = share
        top = f"blocks.0+{len(found)}" if found else "blocks.0"
        ages = [step - round(100 * born) for born in found]
        grown = [slot(f"blocks.0+{n}" if n else "blocks.0", stage=Stage.FOSSILIZED, age=a) for n, a in enumerate(ages)]
        offered = slot(top, blocks if order == "stack" else 1)
        command, _ = plan_depth(
            view([*grown, offered], budget, share, blocks, int(targets)), last=0.25, latest=0.7, order=order
        )
        if command is not None:
            assert command.slot == top and command.options["blocks"] == ("all" if order == "stack" else str(blocks))
            found.append(share)
            blocks *= 2
    return found


@pytest.mark.parametrize("order", ["stack", "interleave"])
@pytest.mark.parametrize(("budget", "doublings"), [(5e11, 0), (5e12, 1), (1e13, 2), (4e13, 3)])
def test_a_larger_budget_doubles_more_often_and_at_its_times(budget: float, doublings: int, order: str) -> None:
    found = times(budget, order)
    assert len(found) == doublings
    for number, share in enumerate(reversed(found)):
        assert share == pytest.approx(due_at(number + 1, 0.25), abs=0.0101)


def test_what_could_not_be_fed_in_time_is_not_fed_later() -> None:
    late = [
        plan_depth(view([slot("blocks.0", 1)], 1.5e12, share, 1), last=0.25, latest=0.9)[0] for share in (0.2, 0.5, 0.8)
    ]
    assert late == [None, None, None]


def test_every_run_of_blocks_deepens_in_one_event() -> None:
    stages = [slot("a.0", 1), slot("a.1", 2), slot("b.0", 1), slot("b.1", 2), slot("b.2", 3)]
    found = find_deepening(stages)
    assert found is not None and (found.slots, found.params) == (("a.1", "b.2"), 5 * BLOCK)
    beside = find_deepening([slot("a.0", 1), slot("a.1", 1)], "interleave")
    assert beside is not None and (beside.slots, beside.params) == (("a.0", "a.1"), 2 * BLOCK)


@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY])
def test_a_young_copy_is_waited_for(stage: Stage) -> None:
    slots = [slot("blocks.0", 1), slot("blocks.1", stage=stage)]
    assert find_deepening(slots) is None
    assert find_deepening([slots[0], attrs.evolve(slots[1], stage=Stage.FOSSILIZED), slot("blocks.1+1", 4)]) is not None


def test_copies_that_did_not_prove_themselves_are_not_planted_again() -> None:
    offered = slot("blocks.0", 1)
    assert plan_depth(view([offered], 1e14, 0.3, 1), last=0.25, latest=0.7)[0] is not None
    failed = attrs.evolve(offered, culled={"copy": 1})
    command, why = plan_depth(view([failed], 1e14, 0.3, 1), last=0.25, latest=0.7)
    assert command is None and "did not prove themselves" in why


def test_why_a_network_stays_as_it_is_is_said_at_every_decision() -> None:
    small = view([slot("blocks.0", 1)], 5e11, 0.3, 1)
    said = list(HeuristicController().decide(small))
    assert [command.op for command in said] == [Op.WAIT] and "budget cannot feed" in said[0].reason


def test_a_run_that_goes_by_epochs_has_no_plan() -> None:
    plain = attrs.evolve(view([slot("blocks.0", 1)], 1e14, 0.3, 1), course=None)
    assert plan_depth(plain, last=0.25, latest=0.7) == (None, "")


@pytest.mark.parametrize(("layers", "width", "length", "budget", "ends"), [
    (3, 192, 256, 1e15, 6), (3, 160, 256, 1e15, 6), (3, 160, 256, 3e15, 12), (4, 192, 256, 1e16, 16),
    (1, 64, 128, 5e12, 2), (1, 48, 128, 5e12, 4), (1, 64, 128, 1e13, 4), (1, 48, 128, 1.2e12, 2), (1, 64, 128, 1e12, 1),
])  # fmt: skip
@pytest.mark.parametrize("order", ["stack", "interleave"])
def test_the_plans_of_the_protocols(layers: int, width: int, length: int, budget: float, ends: int, order: str) -> None:
    """A GPT of 256 tokens, with FLOPs as they are counted: attention in full, and the head."""
    params, forward = 12 * width**2, 24 * width**2 * length + 4 * length**2 * width
    head, depth, targets, born = 2 * 256 * width * length, layers, 0.0, list[int]()
    for decision in range(1, 51):
        targets += 0.02 * budget * length / (3 * (depth * forward + head))
        slots = []
        for block in range(layers):
            heights = len(born) if order == "interleave" or block == layers - 1 else 0
            slots += [
                slot(f"blocks.{block}" + (f"+{n}" if n else ""), stage=Stage.FOSSILIZED, age=decision - born[n])
                for n in range(heights)
            ]
            offered = 1 if order == "interleave" else depth if block == layers - 1 else block + 1
            top = BlueprintView("copy", "depth", frozenset(), offered * params, offered * forward)
            path = f"blocks.{block}" + (f"+{heights}" if heights else "")
            slots.append(attrs.evolve(slot(path, 1), blueprints=(top,)))
        share = decision / 50
        now = attrs.evolve(
            view(slots, budget, share, 1), decision=decision, decisions=50, host_flops=depth * forward + head,
            course=Course(budget, share * budget, int(targets), float(length)),
        )  # fmt: skip
        command, _ = plan_depth(now, last=0.25, latest=0.7, order=order)
        if command is not None:
            assert len(command.slots) == (1 if order == "stack" else layers)
            born.append(decision)
            depth *= 2
    assert depth == ends
