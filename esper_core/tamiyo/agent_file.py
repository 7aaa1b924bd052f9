"""Agent files: one `.safetensors` file with lineage, configuration and fingerprint in the header."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch

from esper_core.leyline.errors import BadFile
from esper_core.storage.tensor_file import read_tensor_file, write_tensor_file
from esper_core.tamiyo.features import RETIRED, schema

if TYPE_CHECKING:
    from esper_core.tamiyo.core import CoreConfig, TamiyoCore

FORMAT = "esper-agent-1"
Core = TypeVar("Core", bound="TamiyoCore")


def fingerprint_of(core: TamiyoCore) -> str:
    """SHA-256 over configuration, names, shapes and bytes; cores with equal fingerprints decide equally."""
    digest = hashlib.sha256(json.dumps([core.config.to_dict(), core.features]).encode())
    for name, tensor in sorted(core.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_core(core: TamiyoCore, path: str | Path) -> None:
    """Write the core, without adapters; see the module's docstring."""
    header = {
        "format": FORMAT, "config": core.config.to_dict(), "features": core.features, "lineage": core.lineage,
        "fingerprint": core.fingerprint,
    }  # fmt: skip
    write_tensor_file(path, core.state_dict(), header)


def read_agent(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and header of an agent file.

    Raises:
        BadFile: damaged, hostile, no agent, or written for another feature table.
    """
    tensors, header = read_tensor_file(path)
    if header.get("format") != FORMAT:
        raise BadFile(f"{path} is no agent", f"a file of format {FORMAT}", "esper tamiyo train")
    theirs = header.get("features")
    names = theirs if isinstance(theirs, list) and all(isinstance(name, str) for name in theirs) else []
    strange = sorted(set(names) - set(schema()) - RETIRED)
    if strange or not names or len(set(names)) < len(names):
        shown = f"the feature {strange[0]!r}" if strange else "no feature table"
        raise BadFile(f"{path} reads {shown}", f"features of docs/observation.md ({len(schema())} in this version)",
                      "esper tamiyo train")  # fmt: skip
    return tensors, header


def load_core(cls: type[Core], config_class: type[CoreConfig], path: str | Path) -> Core:
    """Read an agent file into a core; see `TamiyoCore.load`."""
    tensors, header = read_agent(path)
    try:
        config = config_class(**header["config"])
        sizes = [value for name, value in attrs.asdict(config).items() if name != "advised"]
        fits = all(isinstance(v, int) and 0 < v <= 4096 for v in sizes) and isinstance(config.advised, bool)
        if not fits:
            raise ValueError(header["config"])
        core = cls(config, features=header["features"])
        core.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadFile(f"{path} does not hold the core that its header describes: {error}") from error
    lineage = header.get("lineage")
    core.lineage = lineage if isinstance(lineage, dict) else {}
    if core.fingerprint != header.get("fingerprint"):
        raise BadFile(f"{path} is damaged: its tensors do not match its fingerprint", "", "fetch or train it again")
    return core
