"""Depth by copying: clones of the host's own blocks, called with the arguments of the originals.

Source: stacking: Gong et al., "Efficient Training of BERT by Progressively Stacking", 2019; Du et al., "Stacking Your
Transformers", 2024, arXiv:2405.15319; deeper networks from identity blocks: Chen, Goodfellow & Shlens, "Net2Net", 2016,
arXiv:1511.05641.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.block_run import BlockInfo, Pass, quiet_pass
from esper_core.kasmina.caches import block_count, is_cache, number_of, own_view
from esper_core.kasmina.calls import Call, Place
from esper_core.kasmina.feature_trace import feature_of
from esper_core.kasmina.feature_view import FeatureView
from esper_core.kasmina.flops import count_flops
from esper_core.kasmina.module_copy import computed_tensors
from esper_core.kasmina.plane_hooks import drop_hooks, plane_hooks
from esper_core.kasmina.ranks import whole_weights
from esper_core.leyline.errors import BadOption, IllegalCommand

_TOLERANCE: Final = 1e-3
_OWN: Final = (nn.Module, Tensor, dict, list, tuple, set, str, int, float, bool, types.NoneType)
"""What a clone gets a copy of, even where others hold the same object."""


class CopiedBlock(nn.Module):
    """A clone of one block, called as the host calls the original.

    Args:
        module: the clone.
        origin: the point behind the host's block that it is a clone of, if perhaps of a clone.
        place: where the feature stands among the block's arguments.
        view: how slots see the block's feature.
        key: names the clone; no other in the model has it.
        number: of the original in a cache; None if it has none. count: of the host's blocks in one.
    """

    def __init__(
        self, module: nn.Module, origin: str, place: Place, view: FeatureView, key: str, number: int | None, count: int
    ) -> None:
        super().__init__()
        self.module = module
        self.origin, self.place, self.view = origin, place, view
        self.key, self.number, self.count = key, number, count

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """Feature in, the block's feature out; `call` is the original's."""
        given = h if self.view.plain else self.view.restore(h, h)
        if call is None:
            return self._see(self.module(given))
        changes: dict[Place, Any] = {
            place: own_view(value, self.key, self.number, self.count)
            for place, value in call.items()
            if is_cache(value)
        }
        changes[self.place] = given
        mine = call.replaced(changes)
        return self._see(self.module(*mine.args, **mine.kwargs))

    def _see(self, output: Any) -> Tensor:
        feature = feature_of(output)
        assert feature is not None
        return feature if self.view.plain else self.view.see(feature)


class CopiedRun(nn.Module):
    """Clones of blocks, one after the other: feature and call in, feature out.

    Attributes:
        inherits: each new parameter with the one that it is a copy of, so that an optimizer can copy their state.
    """

    def __init__(self, blocks: Sequence[CopiedBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.inherits: tuple[tuple[nn.Parameter, nn.Parameter], ...] = ()

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """The feature behind the last clone."""
        for block in self.blocks:
            h = block(h, call)
        return h

    @property
    def origins(self) -> tuple[str, ...]:
        """The host's block that each clone comes from, by its point."""
        return tuple(block.origin for block in self.blocks)  # type: ignore[misc]


@attrs.frozen(eq=False)
class Source:
    """One block that may be cloned: the host's own, or a clone that has grown.

    Attributes:
        module: the block itself. info: of the host's block that it is, or comes from.
        native: it is the host's own.
    """

    module: nn.Module
    info: BlockInfo
    native: bool = True


@attrs.frozen(eq=False)
class BlockRun:
    """The blocks that end at a slot, in the order in which they run, and how to clone them.

    Attributes:
        sources: shallowest first; the last one's feature is the slot's.
        path: of the slot.
        host: the module that the blocks belong to. view: how the slot sees the feature.
        observe: runs the host's example and answers what the blocks at some points did, by point.
    """

    sources: tuple[Source, ...]
    path: str
    host: nn.Module
    view: FeatureView
    observe: Callable[[Sequence[str]], Mapping[str, Pass]]
    cut: str = ""

    def last(self, blocks: str) -> BlockRun:
        """The run of as many blocks as `blocks` says, a number or `all`, that ends where this does.

        Raises:
            BadOption: no such number.
            IllegalCommand: there are fewer.
        """
        if blocks == "all":
            return self
        if not blocks.isdecimal() or int(blocks) < 1:
            raise BadOption(f"blocks={blocks!r} cannot be read", "a number or all", "--set copy.blocks=all")
        if int(blocks) > len(self.sources):
            why = f": {self.cut}" if self.cut else ""
            raise IllegalCommand(
                f"only {len(self.sources)} blocks end at {self.path}, not {blocks}{why}", "fewer, or blocks=all"
            )
        return attrs.evolve(self, sources=self.sources[-int(blocks) :])

    def clone(self) -> CopiedRun:
        """Clones of all, with weights and buffers, that depend on nothing of the originals.

        Raises:
            IllegalCommand: a block shares weights with others, or cannot be copied.
        """
        count = block_count(self.host)
        blocks: list[CopiedBlock] = []
        pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for index, source in enumerate(self.sources):
            module = clone_module(source.module, self.host, source.info.path)
            pairs += _pairs(module, source.module)
            key = f"{self.path}#{index}"
            number = number_of(module)
            blocks.append(CopiedBlock(module, source.info.name, source.info.place, self.view, key, number, count))
        run = CopiedRun(blocks)
        run.inherits = tuple(pairs)
        return run

    def example(self) -> tuple[Tensor, Call]:
        """A feature as the slot sees it, and the call of the block before the slot, for a batch of one."""
        did = self.observe([self.sources[-1].info.name])[self.sources[-1].info.name]
        assert did.answer is not None
        return self.view.see(did.answer), did.call

    def cost(self) -> tuple[int, int]:
        """Parameters and forward FLOPs for one example of all clones together."""
        seen = self.observe([source.info.name for source in self.sources])
        params = sum(p.numel() for source in self.sources for p in source.module.parameters())
        each: dict[str, int] = {}
        for source in self.sources:
            if source.info.name not in each:
                each[source.info.name] = _flops(self.host.get_submodule(source.info.path), seen[source.info.name].call)
        return params, sum(each[source.info.name] for source in self.sources)

    def check(self, run: CopiedRun) -> None:
        """Make sure that the clones of the host's own blocks compute what the blocks did on the example.

        Raises:
            IllegalCommand: one does not: the block depends on more than its arguments and weights.
        """
        native = [(s, c) for s, c in zip(self.sources, run.blocks, strict=True) if s.native]
        seen = self.observe([source.info.name for source, _ in native])
        for source, block in native:
            did = seen[source.info.name]
            assert did.answer is not None and isinstance(block, CopiedBlock)
            feature = dict(did.call.items())[source.info.place]
            with quiet_pass(block):
                answer = block(self.view.see(feature), did.call)
            expected = self.view.see(did.answer)
            if answer.shape != expected.shape or not torch.allclose(answer, expected, _TOLERANCE, _TOLERANCE):
                raise IllegalCommand(
                    f"a copy of {source.info.path} computes something else than the block: it depends on more than its "
                    "arguments and weights",
                    "a block without state shared between layers",
                )


def _flops(module: nn.Module, call: Call) -> int:
    with quiet_pass(module), whole_weights(module):
        return count_flops(partial(module.forward, *call.args, **call.kwargs))


def _pairs(module: nn.Module, source: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    theirs = dict(source.named_parameters())
    for name, parameter in module.named_parameters():
        yield parameter, theirs[name]


def clone_module(block: nn.Module, model: nn.Module, path: str) -> nn.Module:
    """An independent copy of `block`, without the slots that stand in it; it trains even where the block is frozen.

    Objects that the block shares with the rest of the model and that hold no tensors, such as a configuration, stay
    shared. Its hooks are copied with it; those that are methods of other modules stay theirs.

    Args:
        block: a module of `model`, or a clone of one. path: of the original in `model`, for errors.

    Raises:
        IllegalCommand: it shares weights with the rest of the model, or Python cannot copy it.
    """
    inside = {id(module) for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    theirs = {id(p) for module in outside for p in module._parameters.values()}
    ours = [name for name, p in block.named_parameters() if id(p) in theirs] + _shared(block, model, path)
    if ours:
        raise IllegalCommand(
            f"{path} shares {ours[0]} with other parts of the model", "a block with weights of its own"
        )
    known = {id(value) for module in outside for value in vars(module).values()}
    # what leads out of the block, such as a hook that is a method of the model, leads to the same place from its clone
    memo: dict[int, Any] = {**computed_tensors(block), **{id(module): module for module in outside}}
    for module in block.modules():
        memo |= {id(v): v for v in vars(module).values() if id(v) in known and not (isinstance(v, _OWN) or callable(v))}
    memo |= {id(hook): None for hook in plane_hooks(block)}
    try:
        twin = copy.deepcopy(block, memo)
    except Exception as error:
        raise IllegalCommand(
            f"{path} cannot be copied: {type(error).__name__}: {error}", "a module that copy.deepcopy takes"
        ) from error
    drop_hooks(twin)
    parameters = [p for p in twin.parameters() if p.is_floating_point()]
    if not any(p.requires_grad for p in parameters):
        for parameter in parameters:
            parameter.requires_grad_(True)
    for parameter in parameters:
        parameter.grad = None
    return twin


def _shared(block: nn.Module, model: nn.Module, path: str) -> list[str]:
    """Names of modules with weights that stand in `block` and elsewhere in `model`."""
    mine = {id(module): name for name, module in block.named_modules() if any(True for _ in module.parameters())}
    return [
        mine[id(module)]
        for place, module in model.named_modules(remove_duplicate=False)
        if id(module) in mine and place != path and not place.startswith(path + ".") and mine[id(module)]
    ]
