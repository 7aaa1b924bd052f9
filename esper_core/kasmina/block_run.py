"""Finds the blocks before the points of a module, and which follow one another, measured on one example.

A block maps a feature to one of the same shape. Blocks form a *run* when each takes the same tensor
object that the one before returned. Such a run, or any end of it, may be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.calls import Call, Place
from esper_core.kasmina.feature_trace import feature_of
from esper_core.kasmina.modes import evaluating


@attrs.define(eq=False)
class Pass:
    """Call and output of one module in the observed pass.

    Attributes:
        call: its arguments. answer: the feature that it gave, before any slot behind it saw it.
        handed_on: the feature as the slots behind it left it. calls: how often it ran. order: when it was done.
    """

    call: Call
    answer: Tensor | None = None
    handed_on: Tensor | None = None
    calls: int = 0
    order: int = 0


@attrs.frozen
class BlockInfo:
    """One block of a host.

    Attributes:
        name: of the point behind it. path: of the module.
        place: where its feature stands among its arguments.
        before: the point behind the block whose feature it takes; empty if there is none.
        reason: why it cannot be copied; empty if it can.
        twins: it gets the same arguments, its feature aside, as the block before.
    """

    name: str
    path: str
    place: Place = 0
    before: str = ""
    reason: str = ""
    twins: bool = True


@contextmanager
def quiet_pass(model: nn.Module) -> Iterator[None]:
    """A context of eval mode without gradients, after which random states are restored."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
        yield


def trace_blocks(model: nn.Module, run: Callable[[], object], paths: Iterable[str]) -> dict[str, Pass]:
    """Calls and outputs of the modules at `paths` during `run`; paths that do not run are left out."""
    seen: dict[str, Pass] = {}
    with quiet_pass(model), ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            for handle in (
                module.register_forward_pre_hook(_BeforeBlock(seen, path), with_kwargs=True, prepend=True),
                module.register_forward_hook(_AfterBlock(seen, path, "answer"), prepend=True),
                module.register_forward_hook(_AfterBlock(seen, path, "handed_on")),
            ):
                stack.callback(handle.remove)
        run()
    return seen


def find_blocks(seen: Mapping[str, Pass], points: Mapping[str, tuple[str, str]]) -> dict[str, BlockInfo]:
    """Every point's block, or why it has none.

    Args:
        seen: the pass by path. points: name to (path, role), in any order.
    """
    found: dict[str, BlockInfo] = {}
    ordered = sorted((seen[path].order, name) for name, (path, _) in points.items() if path in seen)
    for name in points.keys() - {name for _, name in ordered}:
        found[name] = BlockInfo(name, points[name][0], reason=f"{points[name][0]} did not run on the example")
    for _, name in ordered:
        path, role = points[name]
        found[name] = _block(name, path, role, seen, {n: points[n][0] for _, n in ordered if n != name})
    return found


def _block(name: str, path: str, role: str, seen: Mapping[str, Pass], others: Mapping[str, str]) -> BlockInfo:
    did = seen[path]
    answer = did.answer
    if role.startswith("after_"):
        return BlockInfo(name, path, reason=f"{path} is a part of a block, not a block")
    if did.calls > 1:
        return BlockInfo(name, path, reason=f"{path} runs {did.calls} times in a pass with the same weights")
    if answer is None:
        return BlockInfo(name, path, reason=f"{path} gives no tensor")
    inside = [n for n, p in others.items() if p.startswith(path + ".") and seen[p].answer is answer]
    if inside:
        return BlockInfo(name, path, reason=f"{path} holds the block {others[inside[0]]}")
    tensors = [(place, value) for place, value in did.call.items() if isinstance(value, Tensor)]
    before = next(
        ((n, place) for n, p in others.items() for place, value in tensors if value is seen[p].handed_on), None
    )
    same = [place for place, value in tensors if value.shape == answer.shape and value.dtype == answer.dtype]
    if not same or (before and before[1] not in same):
        given = tuple(tensors[0][1].shape) if tensors else ()
        return BlockInfo(name, path, reason=f"{path} maps {given} to {tuple(answer.shape)}, and a copy needs one shape")
    if before is None:
        return BlockInfo(name, path, same[0])
    return BlockInfo(name, path, before[1], before[0], "", _twins(did.call, seen[others[before[0]]].call, before[1]))


def _twins(call: Call, before: Call, place: Place) -> bool:
    """Whether two calls differ in nothing but the feature."""
    mine, theirs = dict(call.items()), dict(before.items())
    return mine.keys() == theirs.keys() and all(_same(v, theirs[k]) for k, v in mine.items() if k != place)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return one is other or bool(one == other)
    except Exception:  # noqa: BLE001 - foreign objects compare in any way they like
        return False


@attrs.frozen(eq=False)
class _BeforeBlock:
    seen: dict[str, Pass]
    path: str

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        did = self.seen.setdefault(self.path, Pass(Call(args, dict(kwargs))))
        did.calls += 1


@attrs.frozen(eq=False)
class _AfterBlock:
    seen: dict[str, Pass]
    path: str
    field: str

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        did = self.seen[self.path]
        setattr(did, self.field, feature_of(output))
        did.order = max(other.order for other in self.seen.values()) + 1
