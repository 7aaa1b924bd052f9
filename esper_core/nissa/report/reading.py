"""Reads a run folder into the plain data that the report draws. Tolerates unfinished, damaged and foreign files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import attrs

from esper_core.leyline.events import renamed
from esper_core.leyline.files import open_text
from esper_core.leyline.pairs import TOO_FEW
from esper_core.leyline.stages import BORN, EMPTY, STAGES
from esper_core.nissa.report.control import ask_for_control, control_of, differences, verdict_of_record
from esper_core.nissa.report.wording import GROUPS, describe_event, number, printable

MAX_POINTS: Final = 1200
"""Points of one curve in the report; longer ones keep the extremes of each bucket."""

MAX_SLOT_POINTS: Final = 240
MAX_JSON: Final = 1 << 25
"""Characters of a JSON file that are read; a longer one counts as damaged."""

MAX_LINE: Final = 1 << 22
"""Characters of a line of events that are read at once; a longer one counts as damaged."""

BRIEF: Final = frozenset(
    {"run_started", "epoch_ended", "decided", "stage_changed", "counterfactual", "rolled_back", "run_ended"}
)
MAX_LOG: Final = 6000

_EPOCH_FIELDS: Final = (
    "epoch", "train_loss", "train_score", "validation_loss", "validation_score", "learning_rate", "seed_params",
    "excess_params_ratio", "total_flops",
)  # fmt: skip
_DECISION_FIELDS: Final = ("train_loss", "validation_loss", "validation_score", "score_minus_rent")
_COUNTERFACTUAL_FIELDS: Final = (
    "loss_mean", "loss_low", "loss_high", "score_mean", "score_low", "score_high", "rent",
)  # fmt: skip
_READING_FIELDS: Final = ("alpha", "gradient_norm")
_AUDIT_FIELDS: Final = ("churn", "churn_low", "churn_high", "rise", "harm", "rent")

_FIGURE_FIELDS: Final = ("gain", "gain_low", "gain_high", "rent")
_REGION_FIELDS: Final = ("slots", "live", "used", "budget", "efficiency", "flops", "flops_budget")

Columns = dict[str, list[float | None]]


def read_json(path: Path) -> Any:
    """The file's JSON, or None when it is missing, damaged or nested too deeply."""
    try:
        with open_text(path) as file:
            text = file.read(MAX_JSON + 1)
        return json.loads(text) if len(text) <= MAX_JSON else None
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(path: Path, skip: re.Pattern[str] | None = None) -> Iterator[dict[str, Any] | None]:
    """Each line of a file of JSON mappings; None for a damaged one. Nothing for a missing file, or lines to `skip`."""
    try:
        with open_text(path, errors="replace") as lines:
            while line := lines.readline(MAX_LINE):
                if not line.strip() or (skip and skip.match(line)):
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    yield None
                    continue
                yield record if isinstance(record, dict) else None
    except OSError:  # missing, or no file of this folder
        return


def read_events(path: Path, kinds: frozenset[str] | None = None) -> Iterator[dict[str, Any] | None]:
    """Each line of an `events.jsonl` as a mapping; None for a line that is damaged, such as a truncated last one.

    With `kinds`, events of other kinds are skipped, most of them unparsed.
    """
    skip = re.compile(rf'\{{"kind":"(?!(?:{"|".join(kinds)})")\w+"') if kinds else None
    for event in read_lines(path, skip):
        yield renamed(event) if event is not None and isinstance(event.get("kind"), str) else None


def dropped_sinks(folder: Path) -> list[str]:
    """Names of the sinks that failed before the run's end, by its `result.json`; their output is incomplete."""
    result = read_json(folder / "result.json")
    names = result.get("dropped_sinks") if isinstance(result, dict) else None
    return [printable(name) for name in names] if isinstance(names, list) else []


def training_seconds(folder: Path) -> float | None:
    """Seconds in the training loop over all its sittings, from `timings.jsonl`; None where there is none."""
    times = [number(line.get("seconds")) for line in read_lines(folder / "timings.jsonl") if line]
    return math.fsum(t for t in times if t is not None) if times else None


def moment(text: object) -> str | None:
    """A time in ISO 8601 as given, or None for what is none."""
    try:
        return text if isinstance(text, str) and datetime.fromisoformat(text).tzinfo else None
    except ValueError:
        return None


@attrs.define
class SlotHistory:
    """One slot over the run.

    A segment is [start, end, stage, blueprint, parameters, reason, gain, low, high, rent]: the last four are the figure
    on which the stage was decided (nats), None where it rests on none.
    """

    point: dict[str, Any]
    segments: list[list[Any]] = attrs.field(factory=list)
    counterfactual: list[list[float | None]] = attrs.field(factory=list)
    readings: list[list[float | None]] = attrs.field(factory=list)
    audits: list[list[float | None]] = attrs.field(factory=list)

    def enter(
        self, step: int, stage: str, blueprint: str = "", params: float | None = 0, reason: str = "",
        figure: Sequence[float | None] = (None,) * 4,
    ) -> None:  # fmt: skip
        """Close the open segment at `step` and open the next."""
        if self.segments:
            self.segments[-1][1] = step
            if self.segments[-1][0] >= step:
                self.segments.pop()
        self.segments.append([step, step, stage, blueprint, params, reason, *figure])

    @property
    def undecided(self) -> bool:
        """Whether its seed was kept although the interval of its gain reaches down to the rent, or below."""
        if not self.segments or not is_permanent(self.segments[-1][2]):
            return False
        low, rent = self.segments[-1][7], self.segments[-1][9]
        return low is not None and rent is not None and low <= rent

    def return_to(self, step: int, before: int) -> None:
        """Enter again, at `step`, the state of the step `before`."""
        held = next((s for s in reversed(self.segments) if s[0] <= before), None)
        if held is None:
            self.enter(step, EMPTY.value, reason="rolled back")
        else:
            _, _, stage, blueprint, params, _, *figure = held
            self.enter(step, stage, blueprint, params, "rolled back", figure)

    def latest_figure(self) -> list[float | None]:
        """Gain, its interval and the rent of the last counterfactual since the seed's birth; None if there is none."""
        born = next((s[0] for s in reversed(self.segments) if s[2] == BORN), 0)
        if not self.counterfactual or (self.counterfactual[-1][0] or 0) < born:
            return [None] * 4
        return [*self.counterfactual[-1][1:4], self.counterfactual[-1][7]]


class RunDigest:
    """Everything that the report shows of a run, gathered in one pass over its events.

    Args:
        folder: the run folder. Nothing in it need exist.
        brief: leave out what only drawings of one run need: readings and rewards.
    """

    def __init__(self, folder: Path, *, brief: bool = False) -> None:
        self.folder = folder
        self.started: dict[str, Any] = {}
        self.ended: dict[str, Any] | None = None
        self.last_step = self.total = self.unreadable = 0
        self.slots: dict[str, SlotHistory] = {}
        self.epochs: list[list[float | None]] = []
        self.decisions: list[list[float | None]] = []
        self.regions: list[list[Any]] = []
        self.marks: list[list[Any]] = []
        self.log: list[list[Any]] = []
        self.dropped = dropped_sinks(folder)
        for event in read_events(folder / "events.jsonl", BRIEF if brief else None):
            if event is None:
                self.unreadable += 1
            else:
                self._take(event)
        for slot in self.slots.values():
            if slot.segments:
                slot.segments[-1][1] = self.last_step

    def _take(self, event: dict[str, Any]) -> None:
        kind, given = event["kind"], number(event.get("step"))
        step = self.last_step if given is None else int(given)
        if step < self.last_step:  # a rollback that also took the step counter back
            self._forget_after(step)
        self.last_step = step
        text, group = describe_event(event, self.started.get("metric")), GROUPS.get(kind, "routine")
        self.log.append([self.total, step, kind, group, str(event.get("slot") or ""), text])
        self.total += 1
        handler = getattr(self, f"_on_{kind}", None)
        if handler is not None:
            handler(step, event)
        if group == "governor" and kind != "command_refused":
            self.marks.append([step, kind, "", text])

    def _forget_after(self, step: int) -> None:
        for rows in (self.epochs, self.decisions, *(s.counterfactual for s in self.slots.values())):
            while rows and (rows[-1][0] or 0) > step:
                rows.pop()

    def _slot(self, path: object) -> SlotHistory:
        name = str(path)
        if name not in self.slots:  # a slot inside a seed, or stacked on one: drawn after the slot that holds it
            order = max(
                (s.point["order"] for n, s in self.slots.items() if name.startswith(n)), default=len(self.slots)
            )
            self.slots[name] = SlotHistory(
                {"name": name, "order": order, "region": name.rsplit("/", 1)[0], "inner": True}
            )
        return self.slots[name]

    def _on_run_started(self, step: int, event: dict[str, Any]) -> None:
        points = event.pop("points", None)
        self.started = self.started or event
        for index, point in enumerate(points if isinstance(points, list) else ()):
            if isinstance(point, Mapping) and str(point.get("name")) not in self.slots:
                cleaned = {**point, "name": str(point.get("name")), "region": str(point.get("region") or "")}
                cleaned["order"] = number(point.get("order")) if number(point.get("order")) is not None else index
                self.slots[cleaned["name"]] = SlotHistory(cleaned)

    def _on_run_ended(self, step: int, event: dict[str, Any]) -> None:
        self.ended = event

    def _on_epoch_ended(self, step: int, event: dict[str, Any]) -> None:
        self.epochs.append([step, *(number(event.get(name)) for name in _EPOCH_FIELDS)])
        self.ended = None  # a run that was resumed after it had ended

    def _on_decided(self, step: int, event: dict[str, Any]) -> None:
        self.decisions.append([step, *(number(event.get(name)) for name in _DECISION_FIELDS)])

    def _on_stage_changed(self, step: int, event: dict[str, Any]) -> None:
        stage = str(event.get("after"))
        blueprint, params = str(event.get("blueprint") or ""), number(event.get("params"))
        slot, figure = self._slot(event.get("slot")), [number(event.get(name)) for name in _FIGURE_FIELDS]
        if figure[0] is None and _is_verdict(stage):  # versions up to 0.2.0 did not say
            figure = slot.latest_figure()
        slot.enter(step, stage, blueprint, params, str(event.get("reason") or ""), figure)
        self.marks.append([step, stage, str(event.get("slot")), describe_event(event, self.started.get("metric"))])

    def _on_counterfactual(self, step: int, event: dict[str, Any]) -> None:
        row = [step, *(number(event.get(name)) for name in _COUNTERFACTUAL_FIELDS)]
        self._slot(event.get("slot")).counterfactual.append(row)

    def _on_regions(self, step: int, event: dict[str, Any]) -> None:
        regions = event.get("regions")
        if isinstance(regions, Mapping):
            rows = {str(name): row for name, row in regions.items() if isinstance(row, Mapping)}
            self.regions = [[name, *(number(row.get(key)) for key in _REGION_FIELDS)] for name, row in rows.items()]

    def _on_audited(self, step: int, event: dict[str, Any]) -> None:
        self._slot(event.get("slot")).audits.append([step, *(number(event.get(name)) for name in _AUDIT_FIELDS)])

    def _on_slot_read(self, step: int, event: dict[str, Any]) -> None:
        readings = event.get("readings") if isinstance(event.get("readings"), Mapping) else {}
        values = {**(readings or {}), "alpha": event.get("alpha")}
        self._slot(event.get("slot")).readings.append([step, *(number(values.get(name)) for name in _READING_FIELDS)])

    def _on_rolled_back(self, step: int, event: dict[str, Any]) -> None:
        """Every slot stands again where it stood at `to_step`; a seed born since is gone."""
        before = int(number(event.get("to_step")) or 0)
        for slot in self.slots.values():
            if slot.segments and slot.segments[-1][0] > before:
                slot.return_to(step, before)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data for the template: curves as columns, downsampled; the log cut to `MAX_LOG` entries."""
        manifest = read_json(self.folder / "run.json")
        compare = read_json(self.folder / "compare.json")
        compare = {**compare, "paired": differences(compare)} if isinstance(compare, dict) else None
        control = control_of(compare)
        return {
            "name": self.folder.name,
            "started": self.started,
            "ended": self.ended,
            "last_step": self.last_step,
            "epochs": _columns(("step", *_EPOCH_FIELDS), thin(self.epochs, MAX_POINTS)),
            "decisions": _columns(("step", *_DECISION_FIELDS), thin(self.decisions, MAX_POINTS)),
            "slots": [self._slot_dict(slot) for slot in sorted(self.slots.values(), key=lambda s: s.point["order"])],
            "regions": self.regions[:MAX_SLOT_POINTS],
            "trees": self._trees()[:MAX_SLOT_POINTS],
            "marks": self.marks[-MAX_LOG:],
            "log": _shorten_log(self.log),
            "total": self.total,
            "unreadable": self.unreadable,
            "dropped": self.dropped,
            "config": manifest,
            "compare": compare,
            "control": control.to_mapping() if control is not None else None,
            "verdict": verdict_of_record(compare),
            "ask": ask_for_control(self.folder, str(self.started.get("host"))),
            "few": TOO_FEW,
            "moment": moment(manifest.get("started")) if isinstance(manifest, dict) else None,
            "seconds": training_seconds(self.folder),
            "stages": {stage.value: {"colour": spec.colour, "summary": spec.summary, "occupied": spec.occupied,
                                     "isolated": spec.isolated, "contributes": spec.contributes,
                                     "permanent": spec.permanent, "ramping": spec.ramping, "leaving": spec.leaving,
                                     "empty": stage is EMPTY, "born": stage is BORN}
                       for stage, spec in STAGES.items()},
        }  # fmt: skip

    def _trees(self) -> list[list[Any]]:
        """Every organ that lives, followed by what lives inside it, in depth order.

        A row: slot, depth in the tree, stage, blueprint, its parameters, seeds of its tree, their parameters, worth and
        rent (nats). Worth and rent are those of the last counterfactual, which is measured with all that is nested.
        """
        lives = {n: s.segments[-1] for n, s in self.slots.items() if s.segments and _is_occupied(s.segments[-1][2])}
        trees = {name: [other for other in lives if other == name or other.startswith(name + "/")] for name in lives}
        rooted = {name: name.split("/", 1)[0] for name in lives if name.split("/", 1)[0] in lives}
        rows = []
        for name in sorted(rooted, key=lambda n: (self.slots[rooted[n]].point["order"], n)):
            if len(trees[rooted[name]]) > 1:
                stage, blueprint, params = lives[name][2:5]
                worth = self.slots[name].counterfactual[-1] if self.slots[name].counterfactual else None
                mass = sum(lives[member][4] or 0 for member in trees[name])
                rows.append([
                    name, name.count("/"), stage, blueprint, params, len(trees[name]), mass,
                    worth and worth[1], worth and worth[-1],
                ])  # fmt: skip
        return rows

    def _slot_dict(self, slot: SlotHistory) -> dict[str, Any]:
        measured = thin(slot.counterfactual, MAX_SLOT_POINTS)
        return {
            **slot.point,
            "segments": slot.segments[-MAX_LOG:],
            "counterfactual": _columns(("step", *_COUNTERFACTUAL_FIELDS), measured),
            "readings": _columns(("step", *_READING_FIELDS), thin(slot.readings, MAX_SLOT_POINTS)),
            "audits": _columns(("step", *_AUDIT_FIELDS), slot.audits[-MAX_SLOT_POINTS:]),
        }


def is_permanent(stage: str) -> bool:
    """Whether a seed of that stage stays for good; False for the name of no stage."""
    return any(known.value == stage and spec.permanent for known, spec in STAGES.items())


def _is_verdict(stage: str) -> bool:
    return any(known.value == stage and (spec.permanent or spec.leaving) for known, spec in STAGES.items())


def _is_occupied(stage: str) -> bool:
    return any(known.value == stage and spec.occupied for known, spec in STAGES.items())


def _columns(names: Sequence[str], rows: Sequence[Sequence[float | None]]) -> Columns:
    return {name: [_round(row[i]) for row in rows] for i, name in enumerate(names)}


def _round(value: float | None) -> float | None:
    return value if value is None or value == int(value) else float(f"{value:.6g}")


def thin(rows: list[list[float | None]], limit: int) -> list[list[float | None]]:
    """Hardly more than `limit` rows: each bucket keeps its first, and the lowest and highest of its second column."""
    if len(rows) <= limit:
        return rows
    buckets, kept = limit // 3, set()
    for b in range(buckets):
        span = range(b * len(rows) // buckets, (b + 1) * len(rows) // buckets)
        known = [i for i in span if rows[i][1] is not None]
        kept.add(span[0])
        if known:
            kept |= {min(known, key=lambda i: rows[i][1] or 0.0), max(known, key=lambda i: rows[i][1] or 0.0)}
    kept.add(len(rows) - 1)
    return [rows[i] for i in sorted(kept)]


def _shorten_log(log: list[list[Any]]) -> list[list[Any]]:
    """The log without its commonest groups, as far as needed to fit; what remains is in order."""
    for dropped in ("routine", "measurement", "epoch"):
        if len(log) <= MAX_LOG:
            return log
        rare = [entry for entry in log if entry[3] != dropped]
        common = [entry for entry in log if entry[3] == dropped]
        room = max(0, MAX_LOG - len(rare))
        step = len(common) / room if room else 0.0
        log = sorted([*rare, *(common[int(i * step)] for i in range(room))])
    return log[-MAX_LOG:]
