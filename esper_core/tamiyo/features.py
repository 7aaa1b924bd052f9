"""The features of an observation, each defined once; encoders and docs/observation.md derive from them.

Raw values are float; NaN stands for unknown and becomes a mask bit beside a zero (see `normaliser`).
Nothing is hashed by name: blueprints and blends are seen by descriptors, so that new ones can be judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Final

import attrs

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import EsperError
from esper_core.leyline.stages import STAGES, Op, Stage
from esper_core.leyline.tags import TAGS
from esper_core.leyline.view import BlueprintView, Interval, RunView, SlotView
from esper_core.tamiyo.advice import Advice, advice_of

FAMILIES: Final = (
    "convolution",
    "attention",
    "feed-forward",
    "normalization",
    "adapter",
    "mixing",
    "routing",
    "identity",
)
"""Families with a feature of their own; any other family sets `family_other`."""

ROLES: Final = ("block", "stage", "layer", "after_attention", "after_ffn")
"""Roles of a point with a feature of their own; any other role sets `role_other`."""

GOVERNOR_STATES: Final = ("calm", "watching", "recovering")


class Transform(StrEnum):
    """Maps a raw reading to a feature, before the running normaliser."""

    FLAG = "flag"  # 0 or 1, always known, not normalised
    SHARE = "share"  # about 0 to 1, left as it is
    LOG = "log"  # log10 of a positive quantity, normalised
    COUNT = "count"  # log(1 + n), normalised
    SIGNED = "signed"  # asinh(100 x): linear within ±0.01 nats, logarithmic beyond; normalised

    def apply(self, value: float | None) -> float:
        """The feature's value; NaN where `value` is unknown, not finite or out of domain."""
        if value is None or not math.isfinite(value):
            return math.nan
        if self is Transform.LOG:
            return math.log10(value) if value > 0 else math.nan
        if self is Transform.COUNT:
            return math.log1p(max(value, 0.0))
        value = min(max(float(value), -1e6), 1e6)
        return math.asinh(100 * value) if self is Transform.SIGNED else value

    @property
    def normalised(self) -> bool:
        """Whether a running mean and deviation are kept."""
        return self in (Transform.LOG, Transform.COUNT, Transform.SIGNED)


@attrs.frozen
class Feature:
    """One number of a token: its name, meaning, transform, and how it is read from a view."""

    name: str
    meaning: str
    transform: Transform
    read: Callable[..., float | None]


FLAG, SHARE, LOG, COUNT, SIGNED = Transform
_NAN = math.nan


def _mean(interval: Interval | None) -> float | None:
    return interval.mean if interval else None


def _width(interval: Interval | None) -> float | None:
    return interval.high - interval.low if interval else None


def _net(s: SlotView, r: RunView) -> float | None:
    gain = _mean(s.counterfactual)
    return None if gain is None else gain - r.rent * s.tree_params / max(r.host_params, 1)


def _reading(name: str, meaning: str, transform: Transform) -> Feature:
    return Feature(name, meaning, transform, lambda s, r: s.readings.get(name))


def _stage(stage: Stage) -> Feature:
    return Feature(f"stage_{stage}", STAGES[stage].summary, FLAG, lambda s, r: s.stage is stage)


def _legal(op: Op) -> Feature:
    return Feature(f"may_{op}", f"{op.name} is legal here now", FLAG, lambda s, r: op in s.legal)


def _tagged(tag: str, meaning: str, read: Callable[..., frozenset[str]], prefix: str = "") -> Feature:
    return Feature(f"{prefix}tag_{tag}", meaning, FLAG, lambda *view: tag in read(*view))


def _role(role: str) -> Feature:
    return Feature(f"role_{role}", f"the role of the point is {role}", FLAG, lambda s, r: s.spec.role == role)


def _neighbours(s: SlotView, r: RunView) -> list[SlotView]:
    return [o for o in r.slots if o.spec.region == s.spec.region]


def _families(read: Callable[..., str], prefix: str = "") -> tuple[Feature, ...]:
    def known(family: str) -> Feature:
        meaning = f"the blueprint is of family {family}"
        return Feature(f"{prefix}family_{family}", meaning, FLAG, lambda *v: read(*v) == family)

    other = Feature(f"{prefix}family_other", "a family that this table does not list", FLAG,
                    lambda *v: read(*v) not in ("", *FAMILIES))  # fmt: skip
    return (*map(known, FAMILIES), other)


def _advised(s: SlotView, r: RunView) -> Command | None:
    advice = advice_of(r)
    return advice.command_at(s.path) if advice else None


def _advised_op(op: Op) -> Feature:
    def read(s: SlotView, r: RunView) -> bool:
        command = _advised(s, r)
        return command is not None and command.op is op

    return Feature(f"advised_{op}", f"the adviser would {op.name} here", FLAG, read)


def _advised_blueprint(s: SlotView, r: RunView) -> BlueprintView | None:
    command = _advised(s, r)
    return next((b for b in s.blueprints if command and b.name == command.blueprint), None)


def _of_advised(read: Callable[[BlueprintView, SlotView, RunView], float | None]) -> Callable[..., float | None]:
    def found(s: SlotView, r: RunView) -> float | None:
        blueprint = _advised_blueprint(s, r)
        return None if blueprint is None else read(blueprint, s, r)

    return found


def _advised_family(s: SlotView, r: RunView) -> str:
    blueprint = _advised_blueprint(s, r)
    return "" if blueprint is None else blueprint.family


def _rent_of(params: int, r: RunView) -> float:
    return r.rent * params / max(r.host_params, 1)


def _expected(b: BlueprintView, s: SlotView, r: RunView) -> float | None:
    advice = advice_of(r)
    return advice.gains.get((s.path, b.name)) if advice else None


def _less_rent(gain: float | None, params: int, r: RunView) -> float | None:
    return None if gain is None else gain - _rent_of(params, r)


def _outlook(name: str, meaning: str, read: Callable[[Advice, str], float | None]) -> Feature:
    def found(s: SlotView, r: RunView) -> float | None:
        advice = advice_of(r)
        return _less_rent(read(advice, s.path), s.tree_params, r) if advice else None

    return Feature(name, f"{meaning}, less the rent (nats)", SIGNED, found)


def _end(read: Callable[[Interval], float]) -> Callable[[Advice, str], float | None]:
    def found(advice: Advice, path: str) -> float | None:
        pooled = advice.pooled(path)
        return None if pooled is None else read(pooled)

    return found


SLOT_ADVICE: Final[tuple[Feature, ...]] = (
    *map(_advised_op, (op for op in Op if op is not Op.WAIT)),
    Feature("advised_gain", "gain (nats) that the adviser expects of what it would plant here", SIGNED,
            _of_advised(_expected)),
    Feature("advised_rent", "rent of what it would plant here", SIGNED,
            _of_advised(lambda b, s, r: _rent_of(b.params, r))),
    Feature("advised_ratio", "its parameters over the host's", LOG,
            _of_advised(lambda b, s, r: b.params / max(r.host_params, 1))),
    *_families(_advised_family, "advised_"),
    _outlook("pooled_gain", "the adviser's mean of the seed's later measurements", _end(lambda i: i.mean)),
    _outlook("pooled_low", "the lower end of its interval", _end(lambda i: i.low)),
    _outlook("pooled_high", "the upper end of its interval", _end(lambda i: i.high)),
    _outlook("prospect", "the most that the adviser thinks the seed can gain by the end", Advice.prospect),
)  # fmt: skip
"""Known only to a core that is advised (`tamiyo.advice`)."""

SLOT_FEATURES: Final[tuple[Feature, ...]] = (
    *map(_stage, Stage),
    *map(_legal, (op for op in Op if op is not Op.WAIT)),
    Feature("alpha", "weight of the seed in the slot's output", SHARE, lambda s, r: s.alpha),
    Feature("age", "decision steps since germination", COUNT, lambda s, r: s.age),
    Feature("stage_age", "decision steps in this stage", COUNT, lambda s, r: s.stage_age),
    Feature("embargo_left", "decision steps until the slot may germinate again", COUNT,
            lambda s, r: s.embargo_left),
    Feature("depth", "order of the point over the number of slots", SHARE,
            lambda s, r: s.spec.order / max(len(r.slots) - 1, 1)),
    Feature("channels", "feature dimension of the point", LOG, lambda s, r: s.spec.channels),
    Feature("positions", "positions of one example's feature", LOG, lambda s, r: s.spec.positions),
    Feature("stride", "input pixels per feature step", LOG, lambda s, r: s.spec.stride),
    Feature("choices", "blueprints that may germinate here now", COUNT, lambda s, r: len(s.blueprints)),
    Feature("rent", "what the seed costs a decision: lambda times its parameters over the host's", SIGNED,
            lambda s, r: r.rent * s.tree_params / max(r.host_params, 1)),
    Feature("flops_ratio", "forward FLOPs of the seed over the host's", SHARE,
            lambda s, r: s.flops / max(r.host_flops, 1)),
    Feature("counterfactual", "validation loss without the slot minus with it (nats)", SIGNED,
            lambda s, r: _mean(s.counterfactual)),
    Feature("counterfactual_width", "width of its 95% interval", SIGNED,
            lambda s, r: _width(s.counterfactual)),
    Feature("counterfactual_count", "paired examples behind it", COUNT,
            lambda s, r: s.counterfactual.count if s.counterfactual else None),
    Feature("accuracy_counterfactual", "validation accuracy with the slot minus without", SIGNED,
            lambda s, r: _mean(s.score_counterfactual) if r.metric.share else None),
    Feature("net_contribution", "the counterfactual's mean minus the rent", SIGNED, _net),
    _reading("gradient_norm", "gradient norm of the seed's parameters", LOG),
    _reading("host_gradient_norm", "norm of the gradient that reaches the host's feature here", LOG),
    _reading("gradient_ratio", "the first over the second", LOG),
    _reading("update_ratio", "size of the seed's last update over its parameters'", LOG),
    _reading("activation_mean", "mean of the seed's output", SIGNED),
    _reading("activation_std", "standard deviation of the seed's output", LOG),
    _reading("delta_norm", "norm of the slot's change to the feature over the feature's", LOG),
    _reading("proxy_loss", "the seed's own loss while it is isolated", SIGNED),
    _reading("proxy_progress", "how far that loss fell since germination", SIGNED),
    *(_tagged(tag, f"the point: {text}", lambda s, r: s.spec.tags) for tag, text in TAGS.items()),
    *_families(lambda s, r: s.seed_family, "seed_"),
    *(_tagged(tag, f"the seed's blueprint: {text}", lambda s, r: s.seed_tags, "seed_") for tag, text in TAGS.items()),
    *map(_role, ROLES),
    Feature("role_other", "a role that this table does not list", FLAG, lambda s, r: s.spec.role not in ROLES),
    Feature("region_slots", "share of the slots that lie in this slot's region", SHARE,
            lambda s, r: len(_neighbours(s, r)) / max(len(r.slots), 1)),
    Feature("region_growing", "seeds in this slot's region that are not permanent yet", COUNT,
            lambda s, r: sum(o.stage.spec.growing for o in _neighbours(s, r))),
    Feature("region_ratio", "parameters of the seeds in this slot's region over the host's", SHARE,
            lambda s, r: sum(o.params for o in _neighbours(s, r)) / max(r.host_params, 1)),
    _reading("need", "nats that the best small change could gain here, relative to the feature's size", LOG),
    _reading("layer_loss", "what the layers before the slot do to the loss, to first order (nats)", SIGNED),
    _reading("attention_entropy", "mean entropy of the seed's own attention (nats)", COUNT),
    *SLOT_ADVICE,
)  # fmt: skip


def _slope(r: RunView, index: int, now: float | None, back: int) -> float | None:
    """Relative fall of a loss since `back` decisions ago; positive is improvement."""
    past = r.history[-back][index] if len(r.history) >= back else None
    return None if past is None or now is None else (past - now) / max(abs(past), 1e-8)


def _first_loss(r: RunView) -> float | None:
    return next((loss for _, loss, _ in r.history if loss is not None), r.validation_loss)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / max(whole, 1e-8)


def _share(stage: Stage) -> Feature:
    return Feature(f"share_{stage}", f"share of the slots that are {stage}", SHARE,
                   lambda r: sum(s.stage is stage for s in r.slots) / max(len(r.slots), 1))  # fmt: skip


def _governor(state: str) -> Feature:
    return Feature(f"governor_{state}", f"the governor is {state}", FLAG, lambda r: r.governor == state)


def _advised_total(r: RunView) -> float | None:
    advice = advice_of(r)
    if advice is None:
        return None
    planted = [_advised_blueprint(s, r) for s in r.slots]
    return _rent_of(sum(b.params for b in planted if b is not None), r)


GLOBAL_ADVICE: Final[tuple[Feature, ...]] = (
    Feature("advised", "there is an adviser", FLAG, lambda r: advice_of(r) is not None),
    Feature("advised_commands", "commands that it would give", COUNT,
            lambda r: len(advice.commands) if (advice := advice_of(r)) else None),
    Feature("advised_rent", "rent of all that it would plant now", SIGNED, _advised_total),
    Feature("record", "share of the gains that it expected so far that came true", SHARE,
            lambda r: advice.record if (advice := advice_of(r)) else None),
)  # fmt: skip
"""Known only to a core that is advised."""

GLOBAL_FEATURES: Final[tuple[Feature, ...]] = (
    Feature("progress", "decision step over decision steps in the run", SHARE,
            lambda r: r.decision / max(r.decisions, 1)),
    Feature("decisions_left", "decision steps to come", COUNT, lambda r: r.decisions - r.decision),
    Feature("train_loss", "mean training loss since the last decision (nats)", LOG, lambda r: r.train_loss),
    Feature("validation_loss", "loss on the validation split (nats)", LOG, lambda r: r.validation_loss),
    Feature("loss_left", "validation loss over the first one measured", SHARE,
            lambda r: _ratio(r.validation_loss, _first_loss(r))),
    Feature("validation_accuracy", "accuracy on the validation split", SHARE,
            lambda r: r.validation_accuracy),
    Feature("gap", "validation minus training loss", SIGNED,
            lambda r: None if r.train_loss is None or r.validation_loss is None else r.validation_loss - r.train_loss),
    *(
        Feature(f"{name}_slope_{back}", f"relative fall of the {name} loss over {back} decisions", SIGNED,
                lambda r, index=index, back=back, name=name: _slope(r, index, getattr(r, f"{name}_loss"), back))
        for index, name in enumerate(("train", "validation")) for back in (1, 4)
    ),
    Feature("excess_params_ratio", "parameters of all seeds over the host's", SHARE,
            lambda r: r.excess_params_ratio),
    Feature("excess_flops_ratio", "forward FLOPs of all seeds over the host's", SHARE,
            lambda r: r.excess_flops_ratio),
    Feature("rent", "rent paid a decision", SIGNED, lambda r: r.rent * r.excess_params_ratio),
    Feature("rent_rate", "lambda of the rent", SIGNED, lambda r: r.rent),
    Feature("params_left", "parameters that the budget still allows, over the host's", SHARE,
            lambda r: _ratio(r.params_left, r.host_params)),
    Feature("flops_left", "forward FLOPs that the budget still allows, over the host's", SHARE,
            lambda r: _ratio(r.flops_left, r.host_flops)),
    Feature("host_params", "parameters of the host", LOG, lambda r: r.host_params),
    Feature("host_flops", "forward FLOPs of the host for one example", LOG, lambda r: r.host_flops),
    Feature("learning_rate", "the host's learning rate as a share of its peak", SHARE,
            lambda r: r.learning_rate),
    *map(_governor, GOVERNOR_STATES),
    Feature("rollbacks", "rollbacks so far", COUNT, lambda r: r.rollbacks),
    Feature("slots", "number of slots", COUNT, lambda r: len(r.slots)),
    *map(_share, Stage),
    Feature("attention_entropy", "mean entropy of the host's attentions (nats)", COUNT,
            lambda r: r.readings.get("attention_entropy")),
    Feature("steps", "optimizer steps so far", LOG, lambda r: r.step),
    Feature("horizon", "optimizer steps of the whole run", LOG, lambda r: r.horizon),
    Feature("tokens_per_param", "targets trained on so far (positions of a text) over the host's parameters", LOG,
            lambda r: r.targets / max(r.host_params, 1)),
    Feature("flops_budget_left", "share of the run's budget of FLOPs that is not spent", SHARE,
            lambda r: None if r.course is None else max(0.0, 1.0 - r.course.share)),
    *GLOBAL_ADVICE,
)  # fmt: skip


def _relatives(b: BlueprintView, r: RunView) -> list[SlotView]:
    """Slots of this run in which the same blueprint grows now."""
    return [s for s in r.slots if s.blueprint == b.name]


def _average(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _is_advised(b: BlueprintView, s: SlotView, r: RunView) -> bool:
    command = _advised(s, r)
    return command is not None and command.op is Op.GERMINATE and command.blueprint == b.name


BLUEPRINT_ADVICE: Final[tuple[Feature, ...]] = (
    Feature("advised", "the adviser would plant it here", FLAG, _is_advised),
    Feature("expected_gain", "gain (nats) that the adviser expects of it here", SIGNED, _expected),
    Feature("expected_surplus", "the same less its rent", SIGNED,
            lambda b, s, r: _less_rent(_expected(b, s, r), b.params, r)),
)  # fmt: skip
"""Known only to a core that is advised."""

BLUEPRINT_FEATURES: Final[tuple[Feature, ...]] = (
    Feature("rent", "what it would cost a decision here", SIGNED,
            lambda b, s, r: r.rent * b.params / max(r.host_params, 1)),
    Feature("params", "parameters of a seed built here", COUNT, lambda b, s, r: b.params),
    Feature("params_ratio", "the same over the host's", LOG,
            lambda b, s, r: b.params / max(r.host_params, 1)),
    Feature("flops_ratio", "forward FLOPs of a seed built here over the host's", LOG,
            lambda b, s, r: b.flops / max(r.host_flops, 1)),
    Feature("density", "parameters over the square of the point's channels", LOG,
            lambda b, s, r: b.params / max(s.spec.channels, 1) ** 2),
    Feature("budget_share", "parameters over what the budget still allows", SHARE,
            lambda b, s, r: _ratio(b.params, r.params_left)),
    Feature("grown_now", "slots in which it grows now", COUNT, lambda b, s, r: len(_relatives(b, r))),
    Feature("known_counterfactual", "mean counterfactual of those slots (nats)", SIGNED,
            lambda b, s, r: _average([_mean(o.counterfactual) for o in _relatives(b, r)])),
    Feature("known_progress", "mean proxy progress of those slots", SIGNED,
            lambda b, s, r: _average([o.readings.get("proxy_progress") for o in _relatives(b, r)])),
    Feature("failed_here", "seeds of it that were culled in this slot", COUNT, lambda b, s, r: s.culled.get(b.name, 0)),
    Feature("failed", "seeds of it that were culled in any slot", COUNT,
            lambda b, s, r: sum(slot.culled.get(b.name, 0) for slot in r.slots)),
    *_families(lambda b, s, r: b.family),
    *(_tagged(tag, f"the blueprint: {text}", lambda b, s, r: b.tags) for tag, text in TAGS.items()),
    *BLUEPRINT_ADVICE,
)  # fmt: skip

BLEND_FEATURES: Final[tuple[Feature, ...]] = (
    *(
        Feature(f"curve_at_{share}", f"share of alpha's way at {share}% of the ramp", SHARE, lambda d, i=i: d[i])
        for i, share in enumerate((25, 50, 75))
    ),
    Feature("replaces", "how much of the host's feature is gone at alpha 1: 0 adds, 1 replaces", SHARE, lambda d: d[3]),
    Feature("learned", "the combination has parameters of its own", FLAG, lambda d: d[4]),
)

TABLES: Final = {
    "slots": SLOT_FEATURES,
    "run": GLOBAL_FEATURES,
    "blueprints": BLUEPRINT_FEATURES,
    "blends": BLEND_FEATURES,
}
"""Every feature by the kind of token it belongs to."""


def read_features(table: Sequence[Feature], *view: Any) -> list[float]:
    """One token: each feature of `table` read from `view` and transformed; NaN where unknown."""
    return [feature.transform.apply(feature.read(*view)) for feature in table]


RETIRED: Final = frozenset(f"slots.{feature.name}" for feature in _families(lambda: ""))
"""Features that were 0 in every view before `seed_family` was delivered. Cores trained then still read 0 there."""


_ADVICE: Final = {"slots": SLOT_ADVICE, "run": GLOBAL_ADVICE, "blueprints": BLUEPRINT_ADVICE}


def schema(*, advised: bool = True) -> list[str]:
    """Names of all features in order. An agent file carries the schema that its core was trained with.

    Args:
        advised: with those that only a core that is advised knows.
    """
    return [f"{kind}.{feature.name}" for kind, table in TABLES.items() for feature in table
            if advised or feature not in _ADVICE.get(kind, ())]  # fmt: skip


def select_features(names: Sequence[str], kind: str) -> tuple[list[Feature], list[int]]:
    """The features of one kind that a schema names, and the column of each in an observation of today.

    So a core keeps the inputs that it was trained with when features are added. A retired feature has column -1,
    which reads 0.

    Raises:
        EsperError: a feature that this version has never had.
    """
    table = {f"{kind}.{feature.name}": (feature, column) for column, feature in enumerate(TABLES[kind])}
    chosen: list[Feature] = []
    columns: list[int] = []
    for name in names:
        if name.partition(".")[0] != kind:
            continue
        if name not in table and name not in RETIRED:
            raise EsperError(f"feature {name!r} is of another table", "one of docs/observation.md")
        blank = Feature(name.partition(".")[2], "always 0", FLAG, lambda *view: 0.0)
        feature, column = table.get(name, (blank, -1))
        chosen.append(feature)
        columns.append(column)
    return chosen, columns


_PREAMBLE: Final = """# What Tamiyo observes

Written from `esper_core/tamiyo/features.py` by `python -m esper_core.tamiyo.features`; do not edit.

`flag` is 0 or 1 and always known. Every other feature carries a mask bit: 1 when known; an unknown one reads 0
with mask bit 0. `share` is left as it is, `log` is log10, `count` is log(1 + n), `signed` is asinh(100 x); the
last three pass a running normaliser that is saved with the agent.

An agent file lists by name the features that its core was trained with, and the core reads those and no others. So a
core keeps deciding as it did when features are added here. Before `seed_family` and `seed_tags` were delivered, the
features `family_*` of a slot were 0 in every view, and `tag_*` showed the tags of the point alone. They are retired:
a core that was trained with them, such as the shipped `core_v1`, still reads 0 there, so its decisions have not
changed, and it does not see what grows in a slot. A core that is trained now does (`seed_family_*`, `seed_tag_*`).

The features of advice (`advised*`, `pooled_*`, `prospect`, `record`, `expected_*`) are known only to a core that is
advised: the heuristic then says at each decision what it would do, and the core may do otherwise."""


def observation_document() -> str:
    """The feature table as Markdown; docs/observation.md holds it and a test compares."""
    titles = {"slots": "Slot tokens (one a slot)", "run": "Global token (one a run)",
              "blueprints": "Blueprint descriptors (one a slot and blueprint)",
              "blends": "Blend descriptors (one a blend)"}  # fmt: skip
    lines = [_PREAMBLE]
    for kind, table in TABLES.items():
        lines += ["", f"## {titles[kind]}", "", "| feature | meaning | transform |", "|---|---|---|"]
        lines += [f"| `{f.name}` | {f.meaning} | {f.transform.value} |" for f in table]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(observation_document(), end="")
