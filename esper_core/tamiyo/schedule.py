"""A fixed schedule of growth, read from a file.

TOML or JSON; in TOML:

    advance = true            # move every seed on as soon as its gates pass (default)
    [[steps]]
    epoch = 2                 # or `decision = 4`, counted from 0, or `share = 0.3` of the run
    op = "germinate"
    slot = "block2"           # or a list; `*` stands for every slot
    blueprint = "depthwise"
    blend = "residual:cosine"
    tempo = "fast"
    options = {kernel_size = 5}   # of the blueprint, before those of the run
    together = true           # the slots in one event, all of them or none (default: each as soon as it can)

A step whose time has come but which is not legal yet waits until it is. JSON may be the bare list of steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.errors import BadFile, did_you_mean
from esper_core.leyline.stages import Op
from esper_core.leyline.view import RunView, SlotView
from esper_core.storage.toml_file import parse_toml, read_text_file


def _slots(value: object) -> tuple[str, ...]:
    slots = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not slots or not all(isinstance(slot, str) for slot in slots):
        raise ValueError(f"slot {value!r} is no path and no list of paths")
    return slots


def _options(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"options {value!r} are no table")
    return {str(key): item for key, item in value.items()}


@attrs.frozen
class ScheduledStep:
    """One step: due at `decision`, or else at a `share` of the run, or else at `epoch` (fractions allowed)."""

    op: Op = attrs.field(converter=Op)
    slot: tuple[str, ...] = attrs.field(converter=_slots)
    epoch: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))
    decision: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))
    share: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))
    blueprint: str = attrs.field(default="", validator=attrs.validators.instance_of(str))
    blend: str = attrs.field(default="", validator=attrs.validators.instance_of(str))
    tempo: Tempo = attrs.field(default=Tempo.STANDARD, converter=Tempo)
    options: dict[str, Any] = attrs.field(factory=dict, converter=_options)
    together: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))

    def is_due(self, view: RunView) -> bool:
        """Whether its time has come."""
        if self.decision is not None:
            return view.decision >= self.decision
        if self.share is not None:
            return view.share >= self.share
        return self.epoch is not None and view.epoch >= self.epoch

    def covers(self, slot: SlotView) -> bool:
        """Whether the step is about `slot`."""
        return "*" in self.slot or slot.path in self.slot


def _parse_step(raw: object, index: int, path: Path) -> ScheduledStep:
    where = f"step {index} of {path}"
    if not isinstance(raw, Mapping):
        raise BadFile(f"{where} is {raw!r}", "a table of op, slot and epoch, decision or share")
    known = [field.name for field in attrs.fields(ScheduledStep)]
    for key in raw:
        if key not in known:
            raise BadFile(f"{where} has an unknown key {key!r}", ", ".join(known), did_you_mean(str(key), known))
    if all(raw.get(time) is None for time in ("epoch", "decision", "share")):
        raise BadFile(f"{where} has no time", "epoch, decision or share")
    try:
        step = ScheduledStep(**raw)
    except (TypeError, ValueError) as error:
        raise BadFile(f"{where} cannot be read: {error}", "op, slot and epoch, decision or share") from error
    if step.op is Op.GERMINATE and not step.blueprint:
        raise BadFile(f"{where} germinates nothing", "a blueprint")
    return step


def read_schedule(path: Path) -> tuple[tuple[ScheduledStep, ...], bool]:
    """The steps of a schedule file, and whether seeds advance by themselves.

    Raises:
        BadFile: missing, unreadable, or with a step that is not one.
    """
    expected = "a TOML or JSON file of steps"
    text = read_text_file(path, expected)
    try:
        content = json.loads(text) if path.suffix == ".json" else parse_toml(text, f"schedule {path}", expected)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"schedule {path} cannot be read: {error}", expected) from error
    table = {"steps": content} if isinstance(content, list) else content
    if not isinstance(table, Mapping) or set(table) - {"steps", "advance"} or not isinstance(table.get("steps"), list):
        raise BadFile(f"schedule {path} has no list of steps", "[[steps]] tables and, optionally, `advance`")
    return tuple(_parse_step(raw, i, path) for i, raw in enumerate(table["steps"])), bool(table.get("advance", True))


class ScheduleController:
    """Follows a file. `argument` is its path; `seed` is unused."""

    def __init__(self, argument: str, *, seed: int = 0) -> None:
        if not argument:
            raise BadFile("the schedule controller got no file", "a path", "--controller schedule:plan.toml")
        self.steps, self.advance = read_schedule(Path(argument))
        self._done: set[tuple[int, str]] = set()

    def decide(self, view: RunView) -> Sequence[Command]:
        """The steps that are due and legal; at most one a slot."""
        commands: dict[object, Command] = {}
        for slot in view.slots:
            for key, command in self._for(slot, view):
                first = commands.get(key)
                commands[key] = command if first is None else attrs.evolve(first, others=(*first.others, command.slot))
        return list(commands.values())

    def _for(self, slot: SlotView, view: RunView) -> Iterator[tuple[object, Command]]:
        """At most one command; those with the same key belong together."""
        for index in self._due(slot, view):
            step = self.steps[index]
            if _can(step, slot) and (not step.together or self._all_can(step, view)):
                self._done.add((index, slot.path))
                reason = f"step {index} of the schedule"
                yield index if step.together else (index, slot.path), Command(
                    step.op, slot.path, step.blueprint, step.blend, step.tempo, "schedule", reason,
                    options=step.options,
                )  # fmt: skip
                return
        if (command := self._move_on(slot)) is not None:
            yield slot.path, command

    def _all_can(self, step: ScheduledStep, view: RunView) -> bool:
        """Whether the step is legal at every slot that it names; `*` names those at which it is."""
        known = {slot.path: slot for slot in view.slots}
        return "*" in step.slot or all(path in known and _can(step, known[path]) for path in step.slot)

    def _move_on(self, slot: SlotView) -> Command | None:
        if self.advance and Op.ADVANCE in slot.legal:
            return Command(Op.ADVANCE, slot.path, blend=slot.blend, source="schedule", reason="its gates pass")
        if slot.stage.spec.leaving and Op.CULL in slot.legal and self.advance:
            return Command(Op.CULL, slot.path, source="schedule", reason="withered")
        return None

    def _due(self, slot: SlotView, view: RunView) -> Iterator[int]:
        for index, step in enumerate(self.steps):
            if step.covers(slot) and (index, slot.path) not in self._done and step.is_due(view):
                yield index

    def state_dict(self) -> dict[str, object]:
        """Which steps were taken, by slot."""
        return {"done": [list(pair) for pair in sorted(self._done)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._done = {(int(index), str(slot)) for index, slot in state["done"]}


def _can(step: ScheduledStep, slot: SlotView) -> bool:
    """Whether the step is legal at a slot; with others together, its blueprint must fit there, too."""
    fits = not step.together or step.op is not Op.GERMINATE or step.blueprint in {b.name for b in slot.blueprints}
    return step.op in slot.legal and fits
