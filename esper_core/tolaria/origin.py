"""Fingerprints of the data and plugins of a run, so that changes are noticed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, Final

from torch import Tensor

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadFile, EsperError
from esper_core.leyline.host import Split, TaskProtocol
from esper_core.registry import Registry, split_reference
from esper_core.registry.discovery import CORE_DISTRIBUTION
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.faults import PART_FAULTS

_BATCHES: Final = 16
_BATCH: Final = 64
"""A split that has no fingerprint of its own is known by its length and its first batches."""

SPLITS: Final = ("train", "validation", "test")


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


def parts_of(config: RunConfig, plane: Plane, registry: Registry) -> dict[str, str]:
    """Distribution and version of each plugin that the run uses, and the digest of its code if it is third-party.

    The code of a distribution that is being worked on changes without its version.
    """
    blends = [part for blend in plane.blends for part in blend.split(":") if part]
    named = {
        "host": [split_reference(config.host)[0]], "blueprint": list(plane.candidates), "blend": blends,
        "controller": [split_reference(name)[0] for name in (config.controller, *config.overseers)],
        "reward": [name.partition("=")[0] for name in config.rewards],
    }  # fmt: skip
    if config.task:
        named["task"] = [split_reference(config.task)[0]]
    found = {}
    for kind, names in named.items():
        for name in names:
            try:
                part = registry.find(kind, name)
                code = "" if part.distribution == CORE_DISTRIBUTION else f" {_code(registry.load(part))}"
            except EsperError:  # a model of the caller's own has no part
                continue
            if kind == "host" and (own := getattr(plane.host, "fingerprint", "")):
                code = f" {own}"
            found[f"{kind} {name}"] = f"{part.distribution} {part.version}{code}"
    return dict(sorted(found.items()))


def compare_data(
    recorded: Mapping[str, Any], data: Callable[[], Mapping[str, str]], parts: Mapping[str, str],
    splits: Iterable[str] = SPLITS,
) -> list[str]:  # fmt: skip
    """What has changed since it was recorded, in words; nothing for what was not recorded."""
    told = []
    then = recorded.get("data")
    if isinstance(then, Mapping):
        now = data()
        told += [f"the {name} data" for name in splits if then.get(name) and now.get(name) and then[name] != now[name]]
    before = recorded.get("parts")
    if isinstance(before, Mapping):
        told += [f"{name} (was {before[name]}, is {now})" for name, now in parts.items()
                 if name in before and before[name] != now]  # fmt: skip
    return told


def check_origin(
    about: Mapping[str, Any], task: TaskProtocol, plane: Plane, config: RunConfig, registry: Registry, *,
    accept_changes: bool, notify: Callable[[str], None],
) -> None:  # fmt: skip
    """Refuse to resume with data or plugins that differ from those of the run.

    Raises:
        BadFile: something has changed, and that was not accepted.
    """
    if not isinstance(about.get("data"), Mapping):
        notify("the run does not record its data and plugins; whether they have changed is unknown")
    changed = compare_data(about, lambda: data_of(task), parts_of(config, plane, registry))
    if not changed:
        return
    told = f"not what the run began with: {'; '.join(changed)}"
    if not accept_changes:
        raise BadFile(told, "the same data and plugins", "restore them, or add --accept-changes")
    notify(told)


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
        with open(inspect.getsourcefile(factory) or "", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except (OSError, TypeError):
        return "?"
