"""Audits: a seed is withered slowly, the loss of doing so is measured, and the seed is culled or revived."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from esper_core.emrakul.audit_config import AuditConfig
from esper_core.kasmina.paths import ancestors_of, base_of
from esper_core.leyline.actions import Command, Tempo, read_commands
from esper_core.leyline.stages import Op, legal_ops
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Controller, Interval, RunView, SlotView

_TREND = 5
"""Decisions over which it is seen where the training loss is heading."""


@attrs.frozen
class Opening:
    """The start of an audit.

    Attributes:
        decision: when. loss: of the validation split. worth: of the seed at full alpha.
        fall: by how much the training loss had fallen a decision just before (nats); training continues in an audit.
    """

    decision: int
    loss: float | None
    worth: Interval | None
    fall: float = 0.0


class Auditor:
    """Emrakul around another controller, whose commands pass unless they concern a seed under audit.

    The rule of the verdict: REVIVE if the harm that the removal is shown to do exceeds the rent, CULL otherwise.
    A host that had time to adapt does not show what a seed was worth, so harm is measured in two ways (`Verdict.harm`).
    The *churn*, measured by restoring the seed in the present host, is too low, since the host and its batch statistics
    have adapted to its absence. The *rise* of the loss is counted from where the loss was heading when the audit began,
    since training continues during an audit, and up to what the seed was worth then.

    An audit in which the governor raises an alarm has shown harm: the loop restores the model from before the
    audit and calls `collapsed`. Such a seed is not audited again unless it is measured below its rent. An audit that
    is cancelled, or in which nothing could be measured, shows nothing, and the seed returns.

    Seeds of one stack, and a seed and those nested in it, stand in for one another. So they are audited one after the
    other, with a pause after each, in which the others are measured without the one that was removed.

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
        self._open: dict[str, Opening] = {}  # slot → its audit
        self._rests_until: dict[str, int] = {}
        self._audits: dict[str, int] = {}
        self._essential: set[str] = set()  # shown by a collapse, until it is measured below its rent

    def decide(self, view: RunView) -> Sequence[Command]:
        """The inner controller's commands less those under audit, and Emrakul's own."""
        slots = {slot.path: slot for slot in view.slots}
        for path in [p for p in self._open if p not in slots or not slots[p].stage.spec.leaving]:
            del self._open[path]  # its verdict was carried out, or a rollback or another hand ended it
        verdicts = [c for path in list(self._open) if (c := self._judge(slots[path], view)) is not None]
        audits = self._begin(view)
        held = set(self._open) | {command.slot for command in verdicts}
        self._essential &= {path for path, slot in slots.items() if slot.blueprint}
        grown = read_commands(self.inner.decide(view)) if self.inner else ()
        return [c for c in grown if c.slot not in held] + verdicts + audits

    def collapsed(self, path: str, decision: int, rent: float, rise: float) -> None:
        """Called when the model collapsed while the seed at `path` withered; the state before the audit is restored.

        Args:
            decision: now. rent: what the seed pays. rise: of the training loss (nats).
        """
        opening = self._open.pop(path, None)
        self._essential.add(path)
        self._rest(path, decision)
        if self.report:
            worth = opening.worth if opening else None
            self.report(Verdict(path, Op.REVIVE, None, rent, rise, worth, "the model collapsed without it"))

    def removed(self, path: str) -> None:
        """Called when the loop has removed the seed at `path`, which was measured to do harm."""
        self._open.pop(path, None)
        self._audits.pop(path, None)

    def state_dict(self) -> dict[str, object]:
        """Open audits, rests and counts, and the inner controller's state."""
        return {
            "open": {path: attrs.asdict(opening) for path, opening in self._open.items()},
            "rests_until": self._rests_until,
            "audits": self._audits,
            "essential": sorted(self._essential),
            "inner": self.inner.state_dict() if self.inner else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._open = {
            path: Opening(**{**value, "worth": Interval(**value["worth"]) if value["worth"] else None})
            for path, value in state["open"].items()
        }
        self._rests_until, self._audits = dict(state["rests_until"]), dict(state["audits"])
        self._essential = set(state.get("essential", ()))
        if self.inner:
            self.inner.load_state_dict(state["inner"])

    def _begin(self, view: RunView) -> list[Command]:
        config = self.config
        last = min((1 - config.reserve) * view.decisions, view.decisions - 2)
        if not config.start * view.decisions <= view.decision < last or view.governor == "recovering":
            return []
        suspects = [slot for slot in view.slots if self._is_suspect(slot, view)]
        suspects.sort(key=lambda slot: slot.counterfactual.mean if slot.counterfactual else float("-inf"))
        commands: list[Command] = []
        for slot in suspects:
            if len(self._open) >= config.at_once:
                break
            if any(_kin(slot.path, other) for other in self._open):
                continue
            gain = slot.counterfactual
            self._open[slot.path] = Opening(view.decision, view.validation_loss, gain, _fall(view))
            shown = f"[{gain.low:.4g}, {gain.high:.4g}]" if gain else "unmeasured"
            reason = f"audit: its gain is {shown} against rent {_rent(slot, view):.3g}"
            commands.append(Command(Op.WITHER, slot.path, source="emrakul", reason=reason))
        return commands

    def _is_suspect(self, slot: SlotView, view: RunView) -> bool:
        if (
            slot.merged
            or not slot.stage.spec.settled
            or Op.WITHER not in legal_ops(slot.stage, auditor=True)
            or slot.path in self._open
        ):
            return False
        if slot.alpha < 1 or any(
            view.decision < until and _kin(slot.path, other) for other, until in self._rests_until.items()
        ):
            return False
        gain, rent = slot.counterfactual, _rent(slot, view)
        if slot.stage.spec.on_trial:  # still on trial: only what is shown to be parasitic
            return gain is not None and gain.high <= rent
        if slot.path in self._essential:
            return gain is not None and gain.high <= rent
        return self.config.everyone or gain is None or gain.low <= rent

    def _judge(self, slot: SlotView, view: RunView) -> Command | None:
        opening, rent = self._open[slot.path], _rent(slot, view)
        if Op.CULL not in slot.legal:
            late = view.decision - opening.decision >= self.config.patience or view.decision + 1 >= view.decisions
            off = Verdict(slot.path, Op.REVIVE, None, rent, None, opening.worth, "called off before alpha was 0")
            return self._close(view, off) if late else None
        known = self.measure(slot.path) if self.measure else opening.worth
        losses = opening.loss, view.validation_loss
        heading = opening.fall * (view.decision - opening.decision)
        rise = None if losses[0] is None or losses[1] is None else losses[1] - losses[0] + heading
        verdict = Verdict(slot.path, Op.REVIVE, known, rent, rise, opening.worth)
        harm = verdict.harm
        if known is None or harm is None:  # what is unknown is not shown to be dead weight
            verdict = attrs.evolve(verdict, reason="the churn could not be measured")
        else:
            keeps = harm > rent
            reason = f"harm {harm:.4g} {'exceeds' if keeps else 'does not exceed'} rent {rent:.3g}"
            verdict = attrs.evolve(verdict, verdict=Op.REVIVE if keeps else Op.CULL, reason=reason)
        return self._close(view, verdict) if verdict.verdict in slot.legal else None

    def _close(self, view: RunView, verdict: Verdict) -> Command:
        """Carry a verdict out. The audit stays open until that shows, for a rollback may undo it."""
        self._rest(verdict.slot, view.decision)
        if verdict.verdict is Op.CULL:
            self._audits.pop(verdict.slot)
        if self.report:
            self.report(attrs.evolve(verdict, barren=math.ceil(self.config.memory * view.decisions)))
        churn = verdict.churn
        shown = f"{churn.mean:.4g} [{churn.low:.4g}, {churn.high:.4g}]" if churn else "unmeasured"
        rise = "" if verdict.rise is None else f", rise {verdict.rise:.3g}"
        reason = f"{verdict.reason}: churn {shown}{rise}"
        # Slowly, or a host that had got used to its absence is thrown out of balance.
        return Command(verdict.verdict, verdict.slot, tempo=Tempo.SLOW, source="emrakul", reason=reason)

    def _rest(self, path: str, decision: int) -> None:
        count = self._audits[path] = self._audits.get(path, 0) + 1
        self._rests_until[path] = decision + self.config.cooldown * 2 ** min(count - 1, 16)


def _kin(one: str, other: str) -> bool:
    """Whether two slots may replace one another: the same one, or of one stack, or one inside a seed of that stack."""

    def stacks(path: str) -> set[str]:
        return {base_of(part) for part in (path, *ancestors_of(path))}

    return base_of(one) in stacks(other) or base_of(other) in stacks(one)


def _fall(view: RunView) -> float:
    """By how much the training loss fell a decision over the last few (nats), never less than 0."""
    losses = [loss for loss, _, _ in view.history if loss is not None][-_TREND:]
    return max(0.0, (losses[0] - losses[-1]) / (len(losses) - 1)) if len(losses) > 1 else 0.0


def _rent(slot: SlotView, view: RunView) -> float:
    return view.rent * slot.tree_params / max(view.host_params, 1)
