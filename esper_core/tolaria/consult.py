"""The controller of the first process decides for all; what it asks of the loop meanwhile is done on every process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.errors import EsperError, RunFailed
from esper_core.leyline.stages import Op
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Interval
from esper_core.tolaria.faults import PART_FAULTS
from esper_core.tolaria.snapshot import model_tensors

if TYPE_CHECKING:
    from esper_core.tolaria.session import Tolaria


def consult(tolaria: Tolaria, ask: Callable[[], Any]) -> Any:
    """Return on every process what `ask` returns on the first.

    Args:
        ask: called on the first process alone; JSON-compatible. A churn that it has measured is measured by all, and a
            verdict that it reports is carried out by all.

    Raises:
        RunFailed: `ask` raised it.
    """
    ranks = tolaria.plane.ranks
    if ranks.size == 1:
        return ask()
    if not ranks.first:
        return _serve(tolaria)
    tolaria.consulting = True
    try:
        answer = ask()
    except EsperError as error:
        if not getattr(ranks, "lost", False):
            ranks.share({"do": "end", "why": str(error)})
        raise
    finally:
        tolaria.consulting = False
    ranks.share({"do": "go on", "answer": answer})
    return answer


def _serve(tolaria: Tolaria) -> Any:
    """Do what the first process asks, until it has its answer."""
    while True:
        asked = tolaria.plane.ranks.share()
        if asked["do"] == "go on":
            return asked["answer"]
        if asked["do"] == "end":
            raise RunFailed(asked["why"])
        try:
            if asked["do"] == "churn":
                tolaria.churn_of(asked["slot"])
            else:
                tolaria.tell_audit(_verdict_of(asked["verdict"]))
        except EsperError:
            raise
        except PART_FAULTS:  # it was raised on every process, and the first one's controller hears of it
            continue


def compare_processes(tolaria: Tolaria, every: int = 1) -> None:
    """Make sure, about every so many optimizer steps, that the processes hold the same model.

    Raises:
        RunFailed: they do not; the message names the place.
    """
    plane, step = tolaria.plane, tolaria.clock.step
    if plane.ranks.size > 1 and step % every < tolaria.governor.config.check_every:
        slots = {f"slot {entry['path']}": entry for entry in plane.structure()}
        plain = {**slots, "the governor's state": tolaria.governor.state_dict()}
        plane.ranks.compare(model_tensors(plane), plain, step)


def plain_command(command: Command) -> dict[str, Any]:
    """A command as JSON-compatible data."""
    return attrs.asdict(command, value_serializer=lambda _, __, v: v.value if isinstance(v, Op | Tempo) else v)


def command_of(plain: Mapping[str, Any]) -> Command:
    """The command that `plain_command` wrote."""
    gain = Interval(**plain["gain"]) if plain["gain"] is not None else None
    return Command(**{**plain, "op": Op(plain["op"]), "tempo": Tempo(plain["tempo"]), "gain": gain})


def plain_verdict(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON-compatible data."""
    return attrs.asdict(verdict, value_serializer=lambda _, __, v: v.value if isinstance(v, Op) else v)


def _verdict_of(plain: Mapping[str, Any]) -> Verdict:
    read = {key: Interval(**plain[key]) if plain[key] is not None else None for key in ("churn", "worth")}
    return Verdict(**{**plain, **read, "verdict": Op(plain["verdict"])})


def controller_state(controller: Any) -> Mapping[str, Any]:
    """The controller's state, with that of the one inside it where it is an overseer.

    Raises:
        TypeError: a state is no mapping: it could be saved, and not be loaded again.
    """
    state = controller.state_dict()
    said: Any = state
    while controller is not None:
        if not isinstance(said, Mapping):
            name = type(controller).__name__
            raise TypeError(f"the state of controller {name} is a {type(said).__name__}, expected a mapping")
        controller, said = getattr(controller, "inner", None), said.get("inner", {})
    return state  # type: ignore[no-any-return]
