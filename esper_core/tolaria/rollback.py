"""Rollback to the last good state: the command held responsible, its events, and the embargo."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from esper_core.kasmina.growth import Growth, StageChange
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import RunFailed
from esper_core.leyline.events import GovernorAlarm, RolledBack
from esper_core.leyline.stages import EMPTY, STAGES, Op, Stage
from esper_core.tolaria.consult import consult
from esper_core.tolaria.inquest import auditors, withering

if TYPE_CHECKING:
    from esper_core.tolaria.governor import Alarm
    from esper_core.tolaria.session import Tolaria


def roll_back(tolaria: Tolaria, alarm: Alarm) -> None:
    """Return to the last good state, emit events of all changes, and put the guilty command under embargo.

    Raises:
        RunFailed: unrecoverable.
    """
    plane, governor, snapshot, step = tolaria.plane, tolaria.governor, tolaria.snapshot, tolaria.clock.step
    tolaria.emit(GovernorAlarm(step=step, cause=alarm.cause, value=alarm.value, limit=alarm.limit))
    if snapshot.step < 0:
        raise RunFailed(
            f"{alarm.cause}, and there is no good state to return to",
            "weights and data that are finite",
            "a lower --learning-rate",
        )
    before = {path: (g.stage, g.births, g.blueprint, g.blend, g.params) for path, g in plane.growths.items()}
    missed = withering(tolaria) if math.isfinite(alarm.value) else []
    guilty = (governor.blame if missed else governor.suspects)(snapshot.step, tolaria.stages())
    if guilty is not None and guilty["op"] == Op.CULL and guilty["source"] == "emrakul":
        missed.append(guilty["slot"])
    rise = alarm.value - governor.typical
    snapshot.restore(plane, tolaria.optimizer)
    tolaria.forget_costs()
    found = tolaria.examine(alarm) if tolaria.examine is not None and not math.isfinite(alarm.value) else None
    if found is not None:
        snapshot.restore(plane, tolaria.optimizer)  # gathering evidence moves running statistics and random state
    excused = found is not None and bool(found.batches)
    if found is not None and found.seeds:  # evidence, in place of what the times of commands suggest
        guilty = {**(guilty or {}), "op": Op.ADVANCE.value, "slot": found.seeds[0]}
    elif found is not None and excused:
        guilty = None
        where = f"{alarm.cause} for {', '.join(found.batches)}"
        tolaria.tell_fault("data", where, "no seed and no command is to blame")
        governor.note_hopeless(len(found.batches) if len(found.batches) == found.repeated else 0)
    governor.roll_back(step, snapshot.step, guilty, strike=not missed and not excused)
    if tolaria.sensors is not None:
        tolaria.sensors.clear()
    after = snapshot.plain["structure"]
    born = {entry["path"]: entry["births"] for entry in after if STAGES[Stage(entry["stage"])].occupied}
    lost = [p for p, (stage, births, *_) in before.items() if STAGES[stage].occupied and born.get(p) != births]
    audited = bool(missed) and guilty is not None and guilty["source"] == "emrakul"
    tolaria.books.deaths += not audited  # an auditor's experiment is no fault of the controller's
    penalty = 0.0 if audited else governor.config.penalty
    tolaria.emit(RolledBack(step=step, to_step=snapshot.step, lost=lost, guilty=guilty, penalty=penalty))
    tell_restored(tolaria, before)
    if governor.hopeless > governor.config.streak:
        raise RunFailed(
            f"the run is unrecoverable: {alarm.cause} for {governor.hopeless} batches in a row, without any seed",
            "a host and an objective whose loss is finite",
            "fix them, then esper resume",
        )
    if governor.unrecoverable:
        raise RunFailed(
            f"the run is unrecoverable after {governor.strikes} rollbacks in a row ({alarm.cause})",
            "a loss that stays finite",
            "a lower --learning-rate",
        )
    consult(tolaria, lambda: _tell_auditors(tolaria, missed, rise))
    if guilty is not None and guilty["slot"] in plane.growths and guilty["op"] not in (Op.WITHER, Op.CULL):
        slot = guilty["slot"]
        plane.embargo(slot, governor.config.embargo)
        entering = plane.growths[slot].stage.spec.entering
        if (entering and (found is None or slot in found.seeds)) or governor.offences[slot] > 1:
            tolaria.remove_seed(slot, f"guilty of: {alarm.cause}")


def _tell_auditors(tolaria: Tolaria, missed: Iterable[str], rise: float) -> None:
    for path in missed:
        for auditor in auditors(tolaria.controller) if path in tolaria.plane.growths else ():
            auditor.collapsed(path, tolaria.clock.decision, tolaria.plane.rent_of(path), rise)


def tell_restored(tolaria: Tolaria, before: Mapping[str, tuple[Stage, int, str, str, int]]) -> None:
    """Tell of every slot that a rollback has changed, those that it brought back or took away included.

    Args:
        before: stage, births, blueprint, blend and parameters of every slot before the rollback.
    """
    growths, reason = tolaria.plane.growths, f"rolled back to step {tolaria.snapshot.step}"
    for path in [*before, *(path for path in growths if path not in before)]:
        stage, _, blueprint, blend, params = before.get(path, (EMPTY, 0, "", "", 0))
        now = growths.get(path, Growth())
        if now.stage is stage and (now.params, now.blueprint) == (params, blueprint):
            continue
        told = Command(Op.WAIT, path, source="governor", reason=reason)
        about = (now.blueprint, now.blend) if STAGES[now.stage].occupied else (blueprint, blend)
        tolaria.tell(StageChange(path, stage, now.stage, told, *about))
