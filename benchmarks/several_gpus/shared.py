"""What the pieces share: plugins without an installation, timing by all processes together, text, rows of output."""

from __future__ import annotations

import importlib
import json
import os
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("", "hosts", "blueprints", "plugins")]  # runs without an installation
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products compute the same each time

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from esper_core.registry import Registry, load_registry  # noqa: E402

PEAK = 989e12
"""Dense bf16 FLOP/s of an H100 or H200 (SXM), from NVIDIA's data sheet."""

_PLUGINS = (
    "esper_hosts.plugin", "esper_blueprints.plugin", "esper_plugins.blends.plugin", "esper_plugins.rewards.plugin",
    "esper_plugins.objectives.plugin", "esper_plugins.tasks.plugin", "esper_plugins.sinks.plugin",
    "esper_core.tamiyo.plugin", "esper_core.emrakul.plugin",
)  # fmt: skip


def parts() -> Registry:
    """The registry, with this repository's own plugins even where nothing is installed."""
    registry = load_registry()
    if not registry.specs("blueprint"):
        for name in _PLUGINS:
            registry.register(importlib.import_module(name), name=name)
    return registry


def installed_in(folder: Path) -> dict[str, str]:
    """What new processes need in their environment to find this repository's plugins without an installation.

    Args:
        folder: gets the metadata of a package.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = folder / f"esper_core-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: esper-core\nVersion: {project['version']}\n")
    entries = "".join(f"{name} = {module}\n" for name, module in project["entry-points"]["esper_core"].items())
    (about / "entry_points.txt").write_text(f"[esper_core]\n{entries}")
    places = [*(str(ROOT / part) for part in ("", "hosts", "blueprints", "plugins")), str(folder)]
    return {"PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


def tell(**values: Any) -> None:
    """Print one JSON object, from process 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(values), flush=True)


def on_gpu() -> bool:
    """Whether figures are of a GPU."""
    return torch.cuda.is_available()


def wait() -> None:
    """Wait for the device."""
    if on_gpu():
        torch.cuda.synchronize()


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, which all processes begin together."""
    wait()
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU: a barrier that asks no device
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def memory() -> float:
    """Peak of the allocator's memory so far, GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if on_gpu() else 0.0


@cache
def device_name() -> str:
    """The GPU's, or `cpu`."""
    return torch.cuda.get_device_name() if on_gpu() else "cpu"


def model_flops(weights: float, layers: int, width: int, length: int) -> float:
    """Training FLOPs of one token of a causal transformer, without what activation checkpointing computes again.

    6 for each weight of a matrix product, and 6·layers·width·length for attention, of which causality leaves half.
    """
    return 6.0 * weights + 6.0 * layers * width * length


def write_text(path: Path, size: int) -> Path:
    """About `size` bytes of Python source that every installation has: the standard library's, then torch's."""
    with path.open("wb") as out:
        for root in (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent):
            for file in sorted(root.rglob("*.py")):
                if out.tell() >= size:
                    return path
                if "site-packages" in file.relative_to(root).parts or "dist-packages" in file.relative_to(root).parts:
                    continue
                out.write(file.read_bytes().decode("utf-8", "ignore").encode())
    return path
