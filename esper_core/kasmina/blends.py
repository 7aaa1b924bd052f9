"""Names of blends: a combination, a curve, or both as `combination:curve`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import attrs

from esper_core.leyline.errors import BadOption
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlendSpec
from esper_core.registry import Registry

if TYPE_CHECKING:
    from torch import nn

BlendOptions = Mapping[str, Mapping[str, Any]]
"""Name of a combination or curve to its options."""

_NONE: BlendOptions = MappingProxyType({})

DEFAULT_COMBINATION: Final = "residual"
DEFAULT_CURVE: Final = "cosine"


@attrs.frozen
class Blend:
    """A resolved blend.

    Attributes:
        combination: name of the plugin that maps (h, s, alpha) to the slot's output.
        curve: name of the plugin that maps progress in [0, 1] to a share of alpha's way.
    """

    combination: str
    curve: str

    def __str__(self) -> str:
        return f"{self.combination}:{self.curve}"

    def build_combination(self, registry: Registry, point: InjectionSpec, options: BlendOptions = _NONE) -> nn.Module:
        """A fresh combination module for `point`."""
        chosen = options.get(self.combination, {})
        return registry.build("blend", self.combination, point, options=chosen)  # type: ignore[no-any-return]

    def build_curve(self, registry: Registry, options: BlendOptions = _NONE) -> Callable[[float], float]:
        """The curve: progress 0 → 0, progress 1 → 1, monotone."""
        chosen = options.get(self.curve, {})
        return registry.build("blend", self.curve, options=chosen)  # type: ignore[no-any-return]


def parse_blend(text: str, registry: Registry) -> Blend:
    """Read `gated:cosine`, `gated` (with the default curve) or `linear` (with the default combination).

    Raises:
        UnknownName: no such blend.
        BadOption: two combinations, two curves, or nothing at all.
    """
    parts = [part for part in text.split(":") if part]
    if not 1 <= len(parts) <= 2:
        raise BadOption(f"blend {text!r} cannot be read", "combination:curve", "residual:cosine")
    found = {_part(registry, name): name for name in parts}
    if len(found) != len(parts):
        raise BadOption(
            f"blend {text!r} names two {next(iter(found))}s", "one combination and one curve", "gated:cosine"
        )
    return Blend(found.get("combination", DEFAULT_COMBINATION), found.get("curve", DEFAULT_CURVE))


def parts_of_blends(blends: Iterable[str], registry: Registry) -> list[str]:
    """Names of the combinations and curves of `blends`, each once.

    Raises:
        UnknownName, BadOption: see `parse_blend`.
    """
    found = [parse_blend(text, registry) for text in blends]
    return list(dict.fromkeys(name for blend in found for name in (blend.combination, blend.curve)))


def parse_blends(texts: Sequence[str], registry: Registry) -> tuple[str, ...]:
    """Every blend written out as `combination:curve`, in the order given, without repeats.

    Raises:
        PluginBroken, MissingDependency: a blend that cannot be imported; and what `parse_blend` raises.
    """
    blends = [parse_blend(text, registry) for text in texts]
    for blend in blends:  # one that cannot be used must not be found out in mid-run
        for name in (blend.combination, blend.curve):
            registry.load(registry.find("blend", name))
    return tuple(dict.fromkeys(map(str, blends)))


def _part(registry: Registry, name: str) -> str:
    spec = registry.find("blend", name).spec
    assert isinstance(spec, BlendSpec)
    return spec.part
