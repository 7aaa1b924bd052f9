"""The options of a run: each is declared, bounded and documented once, here.

`esper run --help`, TOML files and `run.json` are all derived from `RunConfig`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import attrs

from esper_core.leyline.errors import BadOption, did_you_mean
from esper_core.leyline.measures import MEASURES
from esper_core.leyline.options import OptionValue, option_field, option_of
from esper_core.storage.toml_file import flatten, parse_toml, read_text_file

_ALIASES: Final = {"audit": "emrakul", "regions": "narset"}
"""Other names of the parts that settings are for: what is set, and not who does it."""


SYNONYMS: Final[Mapping[str, str]] = MappingProxyType(
    {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "output": "out", "output_dir": "out"}
)
"""Other names of options, as other libraries call them."""


def _texts(value: object) -> object:
    """`"a,b"` and `["a", "b"]` are the same list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, Sequence) else value


_list_field: Final = functools.partial(option_field, converter=_texts)


@attrs.frozen(kw_only=True)
class RunConfig:
    """The configuration of one run. Field metadata: `help`, `group` (for `--help`), `choices`, `minimum`, `maximum`.

    Lists may be given as text with commas. `settings` maps `part.option` to a value, where a part is a plugin's name
    or one of the run's own parts: `governor`, `plane`, `optimizer`.

    Raises:
        BadOption: a value of the wrong type, out of bounds, or not among the choices.
    """

    host: str = option_field("cnn", "model to grow: `name` or `name:argument`", group="model")
    blueprints: tuple[str, ...] = _list_field(
        ("depthwise", "attention"), "blueprints that may grow; empty: every one that fits", group="model"
    )
    blends: tuple[str, ...] = _list_field(
        ("residual:cosine",), "blends that seeds may use, `combination:curve`; the first is the default", group="model"
    )
    slots: tuple[str, ...] = _list_field(
        ("auto",),
        "injection points to use; auto: all that the host offers; around:attn,mlp: around layers of a role",
        group="model",
    )
    task: str = option_field("", "task: `name` or `name:argument`; empty: the host's default", group="data")
    objective: str = option_field("", "loss and metric; empty: the task's default", group="data")
    download: bool = option_field(False, "let the task fetch data that is not on this machine", group="data")
    controller: str = option_field("heuristic", "controller of growth: `name` or `name:argument`", group="growth")
    overseers: tuple[str, ...] = _list_field(
        (), "controllers that wrap the controller, such as emrakul; the first is the innermost", group="growth"
    )
    rewards: tuple[str, ...] = _list_field(
        ("accuracy=1", "rent=1"), "terms of the reported reward, `name=weight`", group="growth"
    )
    allocate: str = option_field(
        "",
        "place low-rank seeds around layers before the first step, by what each layer is measured to need; empty: no",
        group="growth",
        choices=("", *MEASURES),
    )
    rent: float = option_field(
        0.05, "rent in nats for seeds with as many parameters as the host", group="growth", minimum=0.0
    )
    budget_params: str = option_field(
        "20%", "parameters of all seeds: a number, a share of the host's, or empty", group="growth"
    )
    budget_flops: str = option_field(
        "", "limit on the forward FLOPs of all seeds for one example: a number, or a share such as 20%", group="growth"
    )
    decisions_per_epoch: int = option_field(
        0, "decision steps in an epoch; 0: at least 24 in the run", group="growth", minimum=0
    )
    decision_examples: int = option_field(
        2048, "validation examples read at a decision; 0: all of them", group="growth", minimum=0
    )
    epochs: int = option_field(20, "passes over the training split", group="training", minimum=1)
    budget_total: str = option_field(
        "", "FLOPs of the whole run, growth and probes included, in place of epochs", group="training"
    )
    minutes: float = option_field(
        0.0, "approximate time budget in place of epochs: FLOPs that the host would spend in it on this machine",
        group="training", minimum=0.0,
    )  # fmt: skip
    steps_per_epoch: int = option_field(
        0, "batches in an epoch; 0: the whole training split", group="training", minimum=0
    )
    batch_size: int = option_field(64, "examples in a batch", group="training", minimum=1)
    optimizer: str = option_field(
        "adamw",
        "optimizer; muon: Muon for hidden matrices, AdamW for the rest",
        group="training",
        choices=("adamw", "sgd", "muon"),
    )
    accumulate: int = option_field(
        1, "parts into which a batch is split to save memory; one update for all", group="training", minimum=1
    )
    learning_rate: float = option_field(2e-3, "peak learning rate of the host", group="training", minimum=0.0)
    weight_decay: float = option_field(0.01, "decoupled for adamw and muon, L2 for sgd", group="training", minimum=0.0)
    schedule: str = option_field(
        "trapezoid",
        "learning-rate schedule",
        group="training",
        choices=("trapezoid", "wsd", "cosine", "constant", "linear", "one-cycle"),
    )
    warmup: float = option_field(
        0.05, "share of the run in which the learning rate rises", group="training", minimum=0.0, maximum=1.0
    )
    decay: float = option_field(
        0.4, "share of the run, at its end, in which wsd lets the rate fall to zero; constant before", group="training",
        minimum=0.0, maximum=1.0,
    )  # fmt: skip
    seed_learning_rate_factor: float = option_field(
        1.0, "learning rate of seeds over the host's", group="training", minimum=0.0
    )
    clip: float = option_field(
        0.0, "largest gradient norm of the host and of each seed; 0: unlimited", group="training", minimum=0.0
    )
    seed: int = option_field(
        0, "random seed of initial weights, data order and augmentation", group="training", minimum=0, maximum=2**53 - 1
    )
    device: str = option_field("auto", "auto, cpu, cuda, cuda:1, mps", group="machine")
    amp: str = option_field(
        "auto",
        "mixed precision; auto: bf16 on GPUs that have it",
        group="machine",
        choices=("auto", "off", "bf16", "fp16"),
    )
    strategy: str = option_field(
        "auto", "how several processes share a model: ddp, each holds all of it; fsdp2, each holds a shard; auto: ddp",
        group="machine", choices=("auto", "ddp", "fsdp2"),
    )  # fmt: skip
    compile: str = option_field(
        "off", "blocks: train the host's blocks, and their copies, by compiled code", group="machine",
        choices=("off", "blocks"),
    )  # fmt: skip
    recompute: str = option_field(
        "off", "activation checkpointing: compute blocks again in the backward pass to save memory; half: every second",
        group="machine", choices=("off", "half", "blocks"),
    )  # fmt: skip
    out: str = option_field("", "the run's folder; empty: runs/<host>-<task>-<n>", group="output")
    checkpoint_every: int = option_field(
        0,
        "optimizer steps between checkpoints; 0: each epoch, fewer where they would take over 1% of the time",
        group="output",
        minimum=0,
    )
    keep_checkpoints: int = option_field(3, "newest checkpoints to keep, beside the best", group="output", minimum=1)
    sinks: tuple[str, ...] = _list_field((), "further telemetry sinks", group="output")
    settings: Mapping[str, OptionValue] = attrs.field(
        factory=dict, metadata={"help": "options of plugins and parts, `part.option = value`", "group": "other"}
    )

    def __attrs_post_init__(self) -> None:
        for field in attrs.fields(RunConfig):
            value = getattr(self, field.name)
            if field.name == "settings":
                object.__setattr__(self, "settings", _checked_settings(value))
            elif isinstance(field.default, tuple):
                if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
                    raise BadOption(f"{field.name}={value!r} is no list of names", "text with commas or a list")
            else:
                object.__setattr__(self, field.name, option_of(field).parse(value))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration that `values` describe; the rest are defaults. Dashes and underscores are the same.

        `SYNONYMS` are understood: `lr` is `learning_rate`.

        Raises:
            BadOption: a key that does not exist (with a suggestion), or a value that does not fit.
        """
        known = [field.name for field in attrs.fields(cls)]
        given: dict[str, Any] = {}
        words: dict[str, str] = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            name = SYNONYMS.get(name, name)
            if name not in known:
                raise BadOption(f"unknown option {key!r}", "an option of `esper run --help`", did_you_mean(name, known))
            if name in given:
                raise BadOption(f"{name} is given twice, as {words[name]!r} and {key!r}", "each option once")
            given[name], words[name] = value, str(key)
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> RunConfig:
        """The configuration in a TOML file, with `overrides` on top; `settings` of both are merged.

        Raises:
            BadFile: the file is missing, too large or no TOML.
            BadOption: see `from_mapping`.
        """
        path = Path(path)
        expected = "a configuration in TOML"
        values = parse_toml(read_text_file(path, expected), path, expected)
        plain = ((str(key).replace("-", "_"), value) for key, value in values.items())
        merged = {SYNONYMS.get(key, key): value for key, value in plain}
        settings = {**_checked_settings(merged.get("settings", {})), **_checked_settings(overrides.get("settings", {}))}
        return cls.from_mapping({**merged, **overrides, "settings": settings})

    def to_mapping(self) -> dict[str, Any]:
        """JSON-compatible data from which `from_mapping` gives the same configuration."""
        values = {field.name: getattr(self, field.name) for field in attrs.fields(RunConfig)}
        return {k: list(v) if isinstance(v, tuple) else dict(v) if k == "settings" else v for k, v in values.items()}

    def settings_of(self, part: str) -> dict[str, OptionValue]:
        """The options given for the plugin or part of that name."""
        split = {key: key.rpartition(".") for key in self.settings}
        return {name: self.settings[key] for key, (owner, _, name) in split.items() if owner == part}


def _checked_settings(value: object) -> dict[str, OptionValue]:
    if not isinstance(value, Mapping):
        raise BadOption(f"settings={value!r} is no table", "part.option = value", "heuristic.start = 0.1")
    flat: dict[str, OptionValue] = {}
    for key, item in flatten(value):
        owner, dot, name = key.rpartition(".")
        plain = f"{_ALIASES.get(owner, owner)}{dot}{name}"
        if flat.get(plain, item) != item:
            raise BadOption(f"setting {plain!r} is given twice, as {flat[plain]!r} and {item!r}", "each option once")
        flat[plain] = item
    for key, item in flat.items():
        if "." not in key.strip("."):
            raise BadOption(f"setting {key!r} names no part", "part.option", f"--set heuristic.{key}={item}")
        if not isinstance(item, str | int | float | bool | None):
            raise BadOption(f"setting {key}={item!r}", "text, a number or true/false")
    return flat
