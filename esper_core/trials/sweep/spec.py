"""The file of a sweep: which options vary, and the runs that follow.

    draws = 20                        # of the options under [random]; each is trained with every row of the grid

    [run]                             # options of every run
    task = "digits"

    [grid]                            # every combination
    host = ["cnn", "mlp"]
    seed = [0, 1, 2]

    [random]                          # drawn: from a range, or one of a list
    learning_rate = { low = 1e-4, high = 1e-1, scale = "log" }
    batch_size = [32, 64]

`[[cases]]` lists options that belong together, such as a host and its task. Names are those of `esper run`; a setting
is `part.option`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from esper_core.leyline.errors import BadOption, did_you_mean
from esper_core.leyline.options import OptionValue
from esper_core.storage.toml_file import parse_toml, read_text_file
from esper_core.tolaria.config import SYNONYMS, RunConfig

MOST: Final = 10_000
"""Runs of a sweep at most; more are a slip."""

_TABLES: Final = ("run", "grid", "random", "cases")
_KEYS: Final = ("config", "draws", "draw_seed", *_TABLES)
_RANGE: Final = ("low", "high", "scale")
_SCALES: Final = ("linear", "log")
_EXPECTED: Final = "a sweep in TOML"


@attrs.frozen
class SweepRun:
    """One run of a sweep.

    Attributes:
        key: ten hexadecimal digits of its options; the same options have the same key, whatever else is in the file.
        name: of its folder; ends with the key.
        config: without a folder.
        varied: the options that differ from run to run, as text, in the file's order.
    """

    key: str
    name: str
    config: RunConfig
    varied: Mapping[str, str]


@attrs.frozen
class Sweep:
    """What a file describes. `varied`: names of the options that vary. `repeated`: runs that it describes twice."""

    name: str
    runs: tuple[SweepRun, ...]
    varied: tuple[str, ...]
    repeated: int = 0


def read_sweep(path: str | Path) -> Sweep:
    """The sweep that a TOML file describes.

    Raises:
        BadFile: missing, too large or no TOML.
        BadOption: an unknown key or option, an empty list, a value that does not fit, or too many runs.
    """
    path = Path(path)
    table = parse_toml(read_text_file(path, _EXPECTED), path, _EXPECTED)
    for key in table:
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS)
            if not hint and _option_name(key) in _fields():
                hint = f"{key} under [run], or its values under [grid]"
            raise BadOption(f"{path} has an unknown key {key!r}", ", ".join(_KEYS), hint)
    with _in_file(path):
        return _expand(path, table)


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """A context in which errors about options name the file."""
    try:
        yield
    except BadOption as error:
        raise BadOption(f"{path}: {error.given}", error.expected, error.hint) from error


def _expand(path: Path, table: Mapping[str, Any]) -> Sweep:
    fixed = _options(table.get("run", {}), "[run]")
    cases = _cases(table.get("cases", []))
    grid = {key: _values(key, value) for key, value in _options(table.get("grid", {}), "[grid]").items()}
    drawn = {key: _Draw.of(key, value) for key, value in _options(table.get("random", {}), "[random]").items()}
    _refuse_doubles(fixed, cases, grid, drawn)
    count, seed = _whole(table, "draws", 0), _whole(table, "draw_seed", 0)
    if bool(count) != bool(drawn):
        given = f"draws = {count} without [random]" if count else "[random] without draws"
        raise BadOption(given, "both, or neither", "draws = 20 above the first [table]")
    total = len(cases) * max(1, count) * math.prod(map(len, grid.values()))
    if total > MOST:
        raise BadOption(f"{total:,} runs", f"at most {MOST:,}", "shorter lists, or draws of [random]")
    base = table.get("config")
    if base is not None and not isinstance(base, str):
        raise BadOption(f"config = {base!r}", "the name of a file in TOML")
    varied = tuple(dict.fromkeys((*(key for case in cases for key in case), *drawn, *grid)))
    found: dict[str, SweepRun] = {}
    for case in cases:
        for number in range(max(1, count)):
            draws = {key: draw.take(random.Random(f"{seed}:{number}:{key}")) for key, draw in drawn.items()}
            for row in itertools.product(*grid.values()):
                options = {**fixed, **case, **draws, **dict(zip(grid, row, strict=True))}
                config = _config(options, path.parent / base if base else None)
                run = _run(config, {key: options[key] for key in varied if key in options})
                found.setdefault(run.key, run)
    runs = tuple(found.values())
    return Sweep(path.stem, runs, _differing(varied, runs), total - len(runs))


def _differing(varied: Sequence[str], runs: Sequence[SweepRun]) -> tuple[str, ...]:
    """The options of which there are several values; all of them where there is one run."""
    if len(runs) < 2:
        return tuple(varied)
    return tuple(key for key in varied if len({run.varied.get(key) for run in runs}) > 1)


# --- Tables of the file ---


def _options(table: object, where: str) -> dict[str, Any]:
    """Options by name: fields of `RunConfig` as they are called there, settings as `part.option`."""
    if not isinstance(table, Mapping):
        raise BadOption(f"{where} is no table", "option = value")
    found: dict[str, Any] = {}
    for given, value in _leaves(table):
        name = given.removeprefix("settings.")
        if "." not in name:
            name = _option_name(name)
            if name == "out":
                raise BadOption(f"out in {where}: the sweep names the folders of its runs", "", "esper sweep --out")
            if name not in _fields():
                hint = did_you_mean(name, _fields())
                raise BadOption(f"{where} has an unknown option {given!r}", "an option of `esper run --help`", hint)
        if name in found:
            raise BadOption(f"{where} gives {name} twice, the second time as {given!r}", "each option once")
        found[name] = value
    return found


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; a table with the keys of a range is a value."""
    for key, value in table.items():
        if isinstance(value, Mapping) and not ({"low", "high"} & set(value)):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _option_name(name: str) -> str:
    plain = name.replace("-", "_")
    return SYNONYMS.get(plain, plain)


def _fields() -> list[str]:
    return [field.name for field in attrs.fields(RunConfig) if field.name not in ("settings", "out")]


def _cases(table: object) -> list[dict[str, Any]]:
    if not isinstance(table, list):
        raise BadOption("[cases] is one table", "a list of tables, each under [[cases]]")
    return [_options(case, f"[[cases]] number {number}") for number, case in enumerate(table, 1)] or [{}]


def _values(key: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadOption(f"{key} = {value!r} under [grid]", "a list of at least one value", f"{key} under [run]")
    return value


def _refuse_doubles(
    fixed: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], grid: Mapping[str, Any], drawn: Mapping[str, Any]
) -> None:
    """An option stands in one table; one of [run] may be replaced in a case."""
    inside = {"[run]": set(fixed), "[[cases]]": {key for case in cases for key in case}, "[grid]": set(grid),
              "[random]": set(drawn)}  # fmt: skip
    for (one, first), (two, second) in itertools.combinations(inside.items(), 2):
        both = sorted(first & second)
        if both and (one, two) != ("[run]", "[[cases]]"):
            raise BadOption(f"{both[0]} is under {one} and under {two}", "each option in one of them")


def _whole(table: Mapping[str, Any], key: str, least: int) -> int:
    value = table.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadOption(f"{key} = {value!r}", f"a whole number of at least {least}")
    return value


@attrs.frozen
class _Draw:
    """What an option is drawn from: one of `values`, or the range from `low` to `high`, the ends included."""

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @classmethod
    def of(cls, key: str, value: object) -> _Draw:
        """As the file gives it."""
        if isinstance(value, list) and value:
            return cls(tuple(value))
        expected = '{ low = …, high = … }, with scale = "log" if wished, or a list of values'
        if not isinstance(value, Mapping):
            raise BadOption(f"{key} = {value!r} under [random]", expected)
        for name in value:
            if name not in _RANGE:
                raise BadOption(
                    f"{key} under [random] has an unknown key {name!r}", expected, did_you_mean(name, _RANGE)
                )
        low, high, scale = value.get("low"), value.get("high"), value.get("scale", "linear")
        numbers = [
            x for x in (low, high) if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
        ]
        if len(numbers) < 2 or numbers[0] >= numbers[1]:
            raise BadOption(f"{key} from {low!r} to {high!r} under [random]", "two numbers, low below high")
        if scale not in _SCALES:
            raise BadOption(f"scale = {scale!r} of {key}", " or ".join(_SCALES), did_you_mean(str(scale), _SCALES))
        if scale == "log" and numbers[0] <= 0:
            raise BadOption(f"{key} from {low} on a log scale", "numbers above 0")
        whole = isinstance(low, int) and isinstance(high, int)
        return cls((), numbers[0], numbers[1], scale == "log", whole)

    def take(self, source: random.Random) -> Any:
        """One value; numbers that are not whole have four digits, so that they can be read and typed."""
        if self.values:
            return source.choice(self.values)
        if self.whole and not self.log:
            return source.randint(int(self.low), int(self.high))
        if self.log:
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = source.uniform(self.low, self.high)
        value = round(value) if self.whole else float(f"{value:.4g}")
        return min(max(value, self.low), self.high)


# --- Runs ---


def _config(options: Mapping[str, Any], base: Path | None) -> RunConfig:
    plain = {key: value for key, value in options.items() if "." not in key}
    given = {**plain, "settings": {key: value for key, value in options.items() if "." in key}}
    config = RunConfig.from_file(base, given) if base else RunConfig.from_mapping(given)
    return attrs.evolve(config, out="")


def _run(config: RunConfig, varied: Mapping[str, Any]) -> SweepRun:
    key = run_key(config)
    shown = {name: show_value(value) for name, value in varied.items()}
    words = [text if name in ("host", "task") else f"{name.rpartition('.')[2]}{text}" for name, text in shown.items()]
    stem = re.sub(r"[^A-Za-z0-9_.+]+", "-", "_".join(words)).strip("-._")[:100] or "run"
    return SweepRun(key, f"{stem}-{key}", config, shown)


def run_key(config: RunConfig) -> str:
    """Ten hexadecimal digits of the options that are not the default, the folder left out."""
    values, default = config.to_mapping(), RunConfig().to_mapping()
    told = {name: value for name, value in values.items() if name != "out" and value != default[name]}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]


def show_value(value: OptionValue | Sequence[str]) -> str:
    """An option's value as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
