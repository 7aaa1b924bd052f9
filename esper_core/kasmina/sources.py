"""Which blocks end at a slot: the host's own and those that have grown among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import nn

from esper_core.kasmina.around import path_of
from esper_core.kasmina.block_run import BlockInfo, Pass
from esper_core.kasmina.copies import BlockRun, CopiedBlock, CopiedRun, Source
from esper_core.kasmina.feature_view import FeatureView
from esper_core.kasmina.paths import base_of, height_of
from esper_core.kasmina.slot import Mode
from esper_core.leyline.errors import IllegalCommand
from esper_core.leyline.stages import STAGES

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane


@runtime_checkable
class BlockHost(Protocol):
    """A host that knows the blocks before its points."""

    @property
    def module(self) -> nn.Module:
        """The host's own module."""

    def blocks(self) -> Mapping[str, BlockInfo]:
        """What stands before each point: a block that can be copied, or why there is none."""

    def observe_blocks(self, names: Sequence[str]) -> Mapping[str, Pass]:
        """What the modules before some points do on an example, by point."""

    def view_at(self, name: str) -> FeatureView:
        """How the slot at a point sees the feature."""


def run_at(plane: Plane, path: str, origins: Sequence[str] = ()) -> BlockRun:
    """The blocks that end at the slot `path`, clones that already grew among them.

    A run starts again behind a seed of another kind, since that computes too; and where the host calls two
    neighbours with different arguments, since a seed gets those of the last.

    Args:
        origins: take the host's blocks before these points instead: what a seed that grew earlier was made of.

    Raises:
        IllegalCommand: no block ends there; the reason says why.
    """
    host = plane.host
    if "/" in path or not isinstance(host, BlockHost):
        where = "it is nested in a seed" if "/" in path else f"a {type(host).__name__} does not tell its blocks"
        raise IllegalCommand(f"no block ends at {path}: {where}", "a point behind a whole block")
    infos = host.blocks()
    cut = ""
    if origins:
        sources = [Source(host.module.get_submodule(infos[name].path), infos[name]) for name in origins]
    else:
        sources = []
        for source, reason in _walk(plane, host, _chain(infos, base_of(path)), path):
            if source is None:
                sources, cut = [], reason
            else:
                sources.append(source)
    if not sources:
        raise IllegalCommand(f"no block ends at {path}: {cut}", "a point behind a whole block")
    known: dict[str, Pass] = {}

    def see(names: Sequence[str]) -> Mapping[str, Pass]:
        if not known.keys() >= set(names):
            known.update(host.observe_blocks(list(dict.fromkeys([*names, *(s.info.name for s in sources)]))))
        return known

    return BlockRun(tuple(sources), path, host.module, host.view_at(base_of(path)), see, cut)


def _chain(infos: Mapping[str, BlockInfo], name: str) -> list[BlockInfo]:
    """The blocks that follow one another up to the point `name`.

    Raises:
        IllegalCommand: there is none before that point.
    """
    if name not in infos:
        raise IllegalCommand(f"no block ends at {name}: it stands around a layer", "a point behind a whole block")
    if infos[name].reason:
        raise IllegalCommand(f"no block ends at {name}: {infos[name].reason}", "a point behind a whole block")
    chain = [infos[name]]
    while chain[0].before and not infos[chain[0].before].reason:
        chain.insert(0, infos[chain[0].before])
    return chain


def _walk(plane: Plane, host: BlockHost, chain: Sequence[BlockInfo], path: str) -> Iterator[tuple[Source | None, str]]:
    """Blocks in the order in which they run; None with a reason where a run starts again."""
    for info in chain:
        if not info.twins:
            yield None, f"{info.path} is called with other arguments than the block before it"
        yield Source(host.module.get_submodule(info.path), info), ""
        for other, slot in plane.slots.items():
            inner = other != info.name and path_of(other).startswith(info.name + ".")
            live = STAGES[slot.stage].contributes and not slot.merged
            if not live or "/" in other or not (inner or base_of(other) == info.name):
                continue
            if base_of(other) == base_of(path) and height_of(other) >= height_of(path):
                continue
            if isinstance(slot.seed, CopiedRun) and slot.mode is Mode.ATTACHED and not inner:
                for block in slot.seed.blocks:
                    assert isinstance(block, CopiedBlock)
                    yield Source(block.module, host.blocks()[block.origin], native=False), ""
            else:
                yield None, f"the seed at {other} ({slot.stage}) separates them"
