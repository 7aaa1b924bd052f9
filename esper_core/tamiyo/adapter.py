"""Adapters of a frozen core to a domain: deltas on the outputs of its linear maps, which can be removed bit for bit.

The core's weights are never touched while an adapter is attached, so that detaching restores every bit. Several
domains live side by side; one is active. `merge` writes a domain into a core of its own, with a fingerprint of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from esper_core.leyline.errors import BadFile, UnknownName, did_you_mean
from esper_core.registry import Registry, load_registry
from esper_core.storage.tensor_file import read_tensor_file, write_tensor_file

if TYPE_CHECKING:
    from esper_core.tamiyo.core import TamiyoCore

FORMAT = "esper-adapter-1"


class Adapter(nn.Module):
    """Base of all adapters: a module that adds a delta to the outputs of some linear maps of the core.

    A kind subclasses it, sets `targets` in its constructor and implements `delta`; `weight_delta` makes it mergeable.

    Attributes:
        kind: name of the plugin that makes it. domain: what it was trained for.
        options: what it was built with, so that a file can rebuild it.
        base: fingerprint of the core that it belongs to.
        targets: names of the core's linear maps that it changes.
        lineage: how it was trained.
    """

    targets: tuple[str, ...] = ()

    def __init__(self, core: TamiyoCore, kind: str, **options: Any) -> None:
        super().__init__()
        self.kind, self.options = kind, dict(options)
        self.base = core.fingerprint
        self.domain = ""
        self.lineage: dict[str, Any] = {}

    def delta(self, target: str, inputs: Tensor) -> Tensor:
        """What to add to the output of `target` (…, out), given its input (…, in)."""
        raise NotImplementedError

    def weight_delta(self, target: str) -> tuple[Tensor, Tensor | None]:
        """The same as a change of weight (out, in) and bias (out,) or None, for `merge`."""
        raise NotImplementedError(f"adapters of kind {self.kind!r} cannot be merged")

    def save(self, path: str | Path) -> None:
        """Write one `.safetensors` file with everything needed to rebuild it on its core."""
        header = {
            "format": FORMAT, "kind": self.kind, "domain": self.domain, "base": self.base, "options": self.options,
            "lineage": self.lineage,
        }  # fmt: skip
        write_tensor_file(path, self.state_dict(), header)

    @staticmethod
    def load(path: str | Path) -> AdapterFile:
        """Read an adapter file; `TamiyoCore.attach` builds it.

        Raises:
            BadFile: damaged, hostile or not an adapter.
        """
        return load_adapter(path)


@attrs.frozen
class AdapterFile:
    """The content of an adapter file: tensors by name, and the header."""

    path: str
    kind: str
    domain: str
    base: str
    options: Mapping[str, Any]
    lineage: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def build(self, core: TamiyoCore, registry: Registry | None = None) -> Adapter:
        """The adapter on `core`.

        Raises:
            BadFile: it belongs to another core, or its tensors do not fit.
            UnknownName: no plugin offers this kind.
        """
        if self.base != core.fingerprint:
            raise BadFile(
                f"{self.path} was trained on core {self.base[:12]}, not on {core.fingerprint[:12]}",
                "the core that `esper tamiyo show` names as the adapter's base",
            )
        adapter = build_adapter(core, self.kind, self.domain, registry=registry, options=self.options)
        try:
            adapter.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            raise BadFile(f"{self.path} does not fit its own kind {self.kind!r}: {error}") from error
        adapter.lineage = dict(self.lineage)
        return adapter


def load_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter file without building it; see `Adapter.load`."""
    tensors, header = read_tensor_file(path)
    if header.get("format") != FORMAT:
        raise BadFile(f"{path} is no adapter", f"a file written by `esper tamiyo adapt` (format {FORMAT})")
    fields: dict[str, Any] = {name: header.get(name) for name in ("kind", "domain", "base", "options", "lineage")}
    if not all(isinstance(fields[n], str) for n in ("kind", "domain", "base")) or not all(
        isinstance(fields[n], dict) for n in ("options", "lineage")
    ):
        raise BadFile(f"{path} has a damaged header", "kind, domain, base, options and lineage")
    return AdapterFile(str(path), tensors=tensors, **fields)


def build_adapter(
    core: TamiyoCore,
    kind: str,
    domain: str,
    *,
    registry: Registry | None = None,
    options: Mapping[str, Any] = {},
) -> Adapter:
    """A fresh adapter of a kind that a plugin offers; its delta starts at zero."""
    adapter: Adapter = (registry or load_registry()).build("adapter", kind, core, options=options)
    adapter.domain = domain
    return adapter


def attach(core: TamiyoCore, adapter: Adapter | AdapterFile, domain: str | None = None) -> Adapter:
    """Attach and activate; the core's own parameters stop training.

    Raises:
        BadFile: the adapter belongs to another core.
        UnknownName: the adapter names a linear map that the core does not have.
    """
    adapter = adapter.build(core) if isinstance(adapter, AdapterFile) else adapter
    if adapter.base != core.fingerprint:
        raise BadFile(f"the adapter belongs to core {adapter.base[:12]}", f"core {core.fingerprint[:12]}")
    for target in adapter.targets:
        if not isinstance(_modules(core).get(target), nn.Linear):
            raise UnknownName(f"the core has no linear map {target!r}", "", did_you_mean(target, _modules(core)))
    name = domain or adapter.domain or adapter.kind
    core.adapters[name] = adapter
    core.requires_grad_(False)
    activate(core, name)
    return adapter


def activate(core: TamiyoCore, domain: str | None) -> None:
    """Use the adapter of `domain`, or none; the others stay attached.

    Raises:
        UnknownName: no adapter of that domain is attached.
    """
    if domain is not None and domain not in core.adapters:
        raise UnknownName(f"no adapter for {domain!r} is attached", ", ".join(core.adapters) or "no domain")
    while core.adapter_handles:
        core.adapter_handles.pop().remove()
    if domain is not None:
        adapter = core.adapters[domain]
        for target in adapter.targets:
            hook = _Speak(adapter, target)
            core.adapter_handles.append(_modules(core)[target].register_forward_hook(hook))


def detach(core: TamiyoCore, domain: str | None = None) -> None:
    """Detach the adapter of one domain, or all; without any, the core's parameters may train again."""
    if domain is not None and domain not in core.adapters:
        raise UnknownName(f"no adapter for {domain!r} is attached", ", ".join(core.adapters) or "no domain")
    activate(core, None)
    for name in [domain] if domain is not None else list(core.adapters):
        del core.adapters[name]
    if core.adapters:
        activate(core, next(reversed(core.adapters)))
    else:
        core.requires_grad_(True)


def merge_adapter(core: TamiyoCore, domain: str) -> TamiyoCore:
    """A core of its own with the domain's adapter written into its weights; its lineage names both parents."""
    adapter = core.adapters[domain]
    merged = type(core)(core.config, features=core.features)
    merged.load_state_dict(core.state_dict())
    merged.lineage = {**copy.deepcopy(core.lineage), "merged": {"core": core.fingerprint, "domain": domain,
                                                                "adapter": adapter.lineage}}  # fmt: skip
    with torch.no_grad():
        for target in adapter.targets:
            linear = _modules(merged)[target]
            assert isinstance(linear, nn.Linear)
            weight, bias = adapter.weight_delta(target)
            linear.weight.add_(weight)
            if bias is not None:
                linear.bias.add_(bias)
    return merged


class _Speak:
    """A forward hook as a picklable object: adds the adapter's delta to the output of a linear map."""

    def __init__(self, adapter: Adapter, target: str) -> None:
        self.adapter, self.target = adapter, target

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.adapter.delta(self.target, inputs[0])


def _modules(core: TamiyoCore) -> dict[str, nn.Module]:
    return dict(core.named_modules())
