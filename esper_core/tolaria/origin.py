"""Fingerprints of the data and plugins of a run, so that changes are noticed."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadFile
from esper_core.leyline.host import OWN_MODEL, Split, TaskProtocol
from esper_core.registry import Registry, split_reference
from esper_core.registry.discovery import CORE_DISTRIBUTION
from esper_core.registry.origin import Origins, Owner, describe_parts
from esper_core.registry.record import Registered
from esper_core.storage.tensor_file import expect_well_formed
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.faults import PART_FAULTS

_BATCHES: Final = 16
_BATCH: Final = 64
"""A split that has no fingerprint of its own is known by its length and its first batches."""

SPLITS: Final = ("train", "validation", "test")

COMPARED: Final = ("host", "task", "objective", "blueprint", "blend", "controller", "reward")
"""Kinds of parts that make a run what it is. A sink only records it."""

_MAY_MOVE: Final = ("out", "host", "download", "device")
"""Keys of a configuration that may differ when a run goes on: where it lies, where its code is, what may be fetched."""

JUDGING: Final = ("host", "task", "objective", "blueprint", "blend")
"""Kinds of parts on which the figures of a trained model depend."""


def split_fingerprint(split: Split) -> str:
    """Twelve hexadecimal digits over the number and content of a split's examples, in their own order.

    A split may have `fingerprint() -> str`, which knows better where to look. The empty string if it cannot be read
    now: training on it reports the error.
    """
    try:
        own = getattr(split, "fingerprint", None)
        if callable(own):
            return str(own())
        digest = hashlib.sha256(f"{split.examples} {split.batch_count(1)}".encode())
        for batch in islice(split.batches(_BATCH), _BATCHES):
            _take(digest, (batch.inputs, batch.targets))
        return digest.hexdigest()[:12]
    except PART_FAULTS:
        return ""


def data_of(task: TaskProtocol) -> dict[str, str]:
    """The fingerprint of each split."""
    return {name: split_fingerprint(getattr(task, name)) for name in SPLITS}


def origins_of(registry: Registry, config: RunConfig, task: str, plane: Plane) -> dict[str, dict[str, dict[str, str]]]:
    """Distribution, version and code of every part of a run, by kind and name, blueprints that may grow included.

    The code of a distribution that is being worked on changes without its version, and a file that a controller is
    made of has none.

    Args:
        task: as the user named it, or its default.
    """
    references = [
        ("host", config.host),
        ("task", task),
        *([("objective", config.objective)] if config.objective else []),
        *(("controller", name) for name in (config.controller, *config.overseers)),
        *(("reward", name.partition("=")[0]) for name in config.rewards),
        *(("sink", name) for name in ("jsonl", *config.sinks)),
        *(("blueprint", name) for name in plane.candidates),
    ]
    own = {("host", split_reference(config.host)[0]): str(getattr(plane.host, "fingerprint", ""))}
    for reference in (config.controller, *config.overseers):
        name, argument = split_reference(reference)
        files = [argument, *(v for k, v in config.settings.items() if k == f"{name}.adapter" and isinstance(v, str))]
        own["controller", name] = " ".join(filter(None, map(_file_digest, files)))
    names = [(kind, split_reference(name)[0]) for kind, name in references]
    return describe_parts(named_parts(registry, names, plane.blends, own))


def named_parts(
    registry: Registry, names: Iterable[tuple[str, str]], blends: Iterable[str],
    own: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> Iterator[tuple[str, str, Registered, str]]:  # fmt: skip
    """Kind, name, part and code of everything named; a model of the caller's own has no part.

    Args:
        blends: as in `RunConfig.blends`. own: what a part is made of beside its code.
    """
    of_blends = [("blend", name) for blend in blends for name in blend.split(":") if name]
    for kind, name in dict.fromkeys([*names, *of_blends]):
        if (kind, name) == ("host", OWN_MODEL):
            continue
        part = registry.find(kind, name)
        code = "" if part.distribution == CORE_DISTRIBUTION else _code(registry.load(part))
        yield kind, name, part, " ".join(filter(None, (code, own.get((kind, name), ""))))


def compare_data(
    recorded: Mapping[str, Any], data: Callable[[], Mapping[str, str]], now: Origins, *,
    splits: Iterable[str] = SPLITS, kinds: Iterable[str] = COMPARED,
) -> list[str]:  # fmt: skip
    """What has changed since it was recorded, in words; nothing for what was not recorded.

    Raises:
        BadFile: the record is malformed.
    """
    told = []
    then = recorded.get("data")
    if isinstance(then, Mapping):
        found = data()
        told += [f"the {n} data" for n in splits if then.get(n) and found.get(n) and then[n] != found[n]]
    return told + _recorded_parts(recorded).differing(now, kinds)


def _recorded_parts(recorded: Mapping[str, Any]) -> Origins:
    """The parts of a run or of a model's training, as this version or an earlier one recorded them."""
    parts = recorded.get("parts", recorded.get("origins", {}))
    with expect_well_formed("the record of the run's parts"):
        if not all(isinstance(part, str) for part in parts.values()):
            return Origins.read(parts)
        owners = {}
        for name, told in parts.items():  # such as "blueprint twin": "dist-a 1.0 0123456789ab"
            distribution, version, code = (*told.split(" ", 2), "", "")[:3]
            owners[str(name).partition(" ")[0], str(name).partition(" ")[2]] = Owner(distribution, version, code)
        return Origins(owners)


def check_origin(
    about: Mapping[str, Any], task: TaskProtocol, now: Origins, *, accept_changes: bool, notify: Callable[[str], None]
) -> None:
    """Refuse to resume with data or plugins that differ from those of the run.

    Raises:
        BadFile: something has changed, and that was not accepted.
    """
    if not isinstance(about.get("data"), Mapping):
        notify("the run does not record its data; whether they have changed is unknown")
    changed = compare_data(about, lambda: data_of(task), now)
    if not changed:
        return
    told = f"not what the run began with: {'; '.join(changed)}"
    if not accept_changes:
        raise BadFile(told, "the same data and plugins", "restore them, or add --accept-changes")
    notify(told)


def refuse_edited(recorded: object, config: RunConfig, where: object) -> None:
    """Refuse a configuration that is not the one with which a checkpoint was written.

    Args:
        recorded: what the checkpoint holds of it; earlier versions recorded nothing. where: the run's folder.

    Raises:
        BadFile: `run.json` was edited.
    """
    if not isinstance(recorded, Mapping):
        return
    now = config.to_mapping()
    changed = [f"{key} (was {recorded[key]!r}, is {now[key]!r})" for key in now
               if key not in _MAY_MOVE and key in recorded and recorded[key] != now[key]]  # fmt: skip
    if changed:
        raise BadFile(
            f"{where}/run.json is not what the checkpoint was written with: {'; '.join(changed)}"[:1000],
            "the same configuration", "restore it, or add --accept-changes",
        )  # fmt: skip


def _take(digest: Any, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(str(key).encode())
            _take(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _take(digest, item)
    else:
        digest.update(repr(value).encode())


def _code(factory: Any) -> str:
    """Digest of the file that a factory stands in, or `?`."""
    try:
        return _file_digest(inspect.getsourcefile(factory) or "") or "?"
    except TypeError:
        return "?"


def _file_digest(path: str) -> str:
    """Digest of a regular file, or the empty string if there is none."""
    try:
        if not path or not os.path.isfile(path):
            return ""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except (OSError, ValueError):
        return ""
