"""The checks of `esper doctor`: versions, devices, plugins and data folders, each with the command that fixes it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from esper_core.registry.discovery import CORE_DISTRIBUTION

if TYPE_CHECKING:
    from esper_core.registry import Registry

_COLLECTIONS = ("all", "dev")
"""Extras that only collect others, or that only developers need."""

_MOST_FILES = 20_000
"""Files of a folder whose sizes are added up before giving up: a doctor must answer soon."""


@attrs.frozen
class HealthItem:
    """One line of `esper doctor`.

    Attributes:
        section: `system`, `packages`, `devices`, `plugins` or `data`.
        name: what was looked at.
        state: `ok`, `absent` (optional and not there), or `bad`.
        text: what was found.
        fix: what to type or do; empty if nothing helps.
    """

    section: str
    name: str
    state: str
    text: str
    fix: str = ""


def examine(registry: Registry, *, fast: bool) -> Iterator[HealthItem]:
    """Everything worth saying; `fast` looks at nothing that needs torch."""
    yield from _system()
    yield from _packages()
    yield from _devices(fast)
    yield from _plugins(registry)
    yield from _data()


def _system() -> Iterator[HealthItem]:
    from esper_core import __version__
    from esper_core.leyline.specs import API_VERSION

    yield HealthItem("system", "esper", "ok", f"{__version__}, plugin API {API_VERSION}")
    yield HealthItem("system", "python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield HealthItem("system", "platform", "ok", platform.platform(terse=True))


def _packages() -> Iterator[HealthItem]:
    """Every package that the core requires, then those that its extras add."""
    from packaging.requirements import Requirement

    try:
        requirements = requires(CORE_DISTRIBUTION) or []
    except PackageNotFoundError:
        yield HealthItem("packages", CORE_DISTRIBUTION, "bad", "runs from a folder, not installed", "pip install -e .")
        return
    for text in sorted(requirements, key=lambda text: ("extra" in text, text)):
        wanted = Requirement(text)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", str(wanted.marker))
        if extra and extra[1] in _COLLECTIONS:
            continue
        name, bounds = wanted.name, wanted.specifier
        fix = f"pip install '{CORE_DISTRIBUTION}[{extra[1]}]'" if extra else f"pip install '{name}{bounds}'"
        try:
            found = version(name)
        except PackageNotFoundError:
            text = f"not installed (extra {extra[1]})" if extra else "not installed"
            yield HealthItem("packages", name, "absent" if extra else "bad", text, fix)
            continue
        if bounds.contains(found, prereleases=True):
            yield HealthItem("packages", name, "ok", found)
        else:
            yield HealthItem("packages", name, "bad", f"{found} is installed, {bounds} is needed", fix)


def _devices(fast: bool) -> Iterator[HealthItem]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if fast:
        yield HealthItem("devices", "cpu", "ok", f"{_cores(cores)}; others were not looked for (--fast)")
        return
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch links to is missing
        text = f"torch cannot be imported: {' '.join(str(error).split())}"
        yield HealthItem("devices", "torch", "bad", text, "pip install --force-reinstall torch")
        return

    threads = torch.get_num_threads()
    yield HealthItem(
        "devices", "cpu", "ok", f"{_cores(cores)}, torch uses {threads} thread{'s' if threads > 1 else ''}"
    )
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        text = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        yield HealthItem("devices", f"cuda:{index}", "ok", text)
    if torch.backends.mps.is_available():
        yield HealthItem("devices", "mps", "ok", "Apple GPU")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        text = "a driver is installed, but this build of torch cannot use it"
        yield HealthItem(
            "devices", "cuda", "bad", text, "install a CUDA build of torch: https://pytorch.org/get-started"
        )


def _cores(count: int) -> str:
    return f"{count} core" + ("s" if count > 1 else "")


def _plugins(registry: Registry) -> Iterator[HealthItem]:
    for distribution, its_version in registry.distributions.items():
        parts = [part for part in registry.specs() if part.distribution == distribution]
        if parts or not any(broken.distribution == distribution for broken in registry.broken):
            text = f"{its_version}, {len(parts)} part{'' if len(parts) == 1 else 's'}"
            yield HealthItem("plugins", distribution, "ok", text)
        for part in parts:
            if rivals := registry.rivals(part):
                others = ", ".join(rival.distribution for rival in rivals)
                text = f"{part.kind} {part.name!r} is offered by {others} too"
                yield HealthItem("plugins", part.qualified, "bad", text, f"say {part.qualified}, or --no-plugin")
    for plugin in registry.plugins:
        for note in plugin.notes:
            yield HealthItem("plugins", plugin.qualified, "absent", note, f"esper plugins check {plugin.qualified}")
    for broken in registry.broken:
        hint = broken.error.hint or f"update it, or leave it out: esper --no-plugin {broken.owner}"
        yield HealthItem("plugins", broken.owner, "bad", broken.error.given, hint)
    for name in registry.disabled:
        yield HealthItem("plugins", name, "absent", "disabled")


def _data() -> Iterator[HealthItem]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folders = {
        "esper": Path(os.environ.get("ESPER_CACHE") or cache / "esper"),
        "data": Path("data").resolve(),
        "hugging face": Path(os.environ.get("HF_HOME") or cache / "huggingface"),
        "torch hub": Path(os.environ.get("TORCH_HOME") or cache / "torch"),
    }
    for name, folder in folders.items():
        if folder.is_dir():
            yield HealthItem("data", name, "ok", f"{_size(folder)} in {folder}")
        else:
            yield HealthItem("data", name, "absent", f"nothing yet in {folder}")
    free = shutil.disk_usage(Path.cwd()).free
    low = free < 2**30
    fix = "free some space before a run: checkpoints and datasets go to disk" if low else ""
    yield HealthItem("data", "disk", "bad" if low else "ok", f"{_bytes(free)} free in {Path.cwd()}", fix)


def _size(folder: Path) -> str:
    total = count = 0
    for path, _, names in os.walk(folder):
        for name in names:
            if count == _MOST_FILES:
                return f"more than {_bytes(total)}"
            count += 1
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except OSError:  # removed while we look
                continue
    return _bytes(total)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
