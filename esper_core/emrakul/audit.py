"""Emrakul: withers a seed slowly, looks at what that cost, and culls or revives it. She never deletes untested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from esper_core.emrakul.audit_config import AuditConfig
from esper_core.leyline.actions import Command
from esper_core.leyline.stages import Op, Stage, legal_ops
from esper_core.leyline.view import Controller, Interval, RunView, SlotView

_JUDGED = (Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED)


@attrs.frozen
class Verdict:
    """The end of an audit: `cull` or `revive`, and the churn that decided (None: called off before it was known)."""

    slot: str
    verdict: Op
    churn: Interval | None
    rent: float


class Auditor:
    """Emrakul around another controller, whose commands pass unless they concern a seed under audit.

    Args:
        argument, seed: unused.
        inner: the controller that grows; None for Emrakul alone.
        measure: slot path to the churn of its withered seed, such as `kasmina.churn` measures on the validation
            split; without it the last counterfactual at full alpha stands for it.
        report: called with every verdict.
        options: fields of `AuditConfig`.
    """

    def __init__(
        self,
        argument: str = "",
        *,
        seed: int = 0,
        inner: Controller | None = None,
        measure: Callable[[str], Interval] | None = None,
        report: Callable[[Verdict], None] | None = None,
        **options: Any,
    ) -> None:
        self.inner, self.measure, self.report = inner, measure, report
        self.config = AuditConfig(**options)
        self._open: dict[str, list[Any]] = {}  # slot → [decision of the start, counterfactual at full alpha]
        self._rests_until: dict[str, int] = {}
        self._audits: dict[str, int] = {}

    def decide(self, view: RunView) -> Sequence[Command]:
        """The inner controller's commands less those under audit, and Emrakul's own."""
        slots = {slot.path: slot for slot in view.slots}
        for path in [p for p in self._open if p not in slots or slots[p].stage is not Stage.WITHERING]:
            del self._open[path]  # a rollback or another hand ended it
        verdicts = [c for path in list(self._open) if (c := self._judge(slots[path], view)) is not None]
        audits = self._begin(view)
        held = set(self._open) | {command.slot for command in verdicts}
        grown = self.inner.decide(view) if self.inner else ()
        return [c for c in grown if c.slot not in held] + verdicts + audits

    def state_dict(self) -> dict[str, object]:
        """Open audits, rests and counts, and the inner controller's state."""
        return {
            "open": self._open,
            "rests_until": self._rests_until,
            "audits": self._audits,
            "inner": self.inner.state_dict() if self.inner else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._open = {path: list(value) for path, value in state["open"].items()}
        self._rests_until, self._audits = dict(state["rests_until"]), dict(state["audits"])
        if self.inner:
            self.inner.load_state_dict(state["inner"])

    def _begin(self, view: RunView) -> list[Command]:
        config = self.config
        last = min((1 - config.reserve) * view.decisions, view.decisions - 2)
        if not config.start * view.decisions <= view.decision < last or view.governor != "calm":
            return []
        suspects = [slot for slot in view.slots if self._is_suspect(slot, view)]
        suspects.sort(key=lambda slot: slot.counterfactual.mean if slot.counterfactual else float("-inf"))
        commands = []
        for slot in suspects[: config.at_once - len(self._open)]:
            gain = slot.counterfactual
            self._open[slot.path] = [view.decision, attrs.asdict(gain) if gain else None]
            shown = f"[{gain.low:.4g}, {gain.high:.4g}]" if gain else "unmeasured"
            reason = f"audit: its gain is {shown} against rent {_rent(slot, view):.3g}"
            commands.append(Command(Op.WITHER, slot.path, source="emrakul", reason=reason))
        return commands

    def _is_suspect(self, slot: SlotView, view: RunView) -> bool:
        if slot.stage not in _JUDGED or Op.WITHER not in legal_ops(slot.stage, auditor=True) or slot.path in self._open:
            return False
        if view.decision < self._rests_until.get(slot.path, 0) or slot.alpha < 1:
            return False
        gain, rent = slot.counterfactual, _rent(slot, view)
        if slot.stage is not Stage.FOSSILIZED:  # still on trial: only what is shown to be parasitic
            return gain is not None and gain.high <= rent
        return self.config.everyone or gain is None or gain.low <= rent

    def _judge(self, slot: SlotView, view: RunView) -> Command | None:
        began, before = self._open[slot.path]
        if Op.CULL not in slot.legal:
            late = view.decision - began >= self.config.patience or view.decision + 1 >= view.decisions
            return self._close(slot, view, Op.REVIVE, None) if late else None
        known = self.measure(slot.path) if self.measure else Interval(**before) if before else None
        # What is unknown is not shown to be dead weight.
        keeps = known is None or not known.mean <= _rent(slot, view)
        return self._close(slot, view, Op.REVIVE if keeps else Op.CULL, known)

    def _close(self, slot: SlotView, view: RunView, op: Op, churn: Interval | None) -> Command:
        del self._open[slot.path]
        count = self._audits[slot.path] = self._audits.get(slot.path, 0) + 1
        self._rests_until[slot.path] = view.decision + self.config.cooldown * 2 ** min(count - 1, 16)
        if op is Op.CULL:
            self._audits.pop(slot.path)
        verdict = Verdict(slot.path, op, churn, _rent(slot, view))
        if self.report:
            self.report(verdict)
        shown = f"{churn.mean:.4g} [{churn.low:.4g}, {churn.high:.4g}]" if churn else "unmeasured"
        return Command(op, slot.path, source="emrakul", reason=f"churn {shown} against rent {verdict.rent:.3g}")


def _rent(slot: SlotView, view: RunView) -> float:
    return view.rent * slot.params / max(view.host_params, 1)
