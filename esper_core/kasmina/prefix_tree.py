"""Evaluate a host under many masks of its slots, computing shared prefixes once.

Masks that first differ at some slot share everything that the network computed before it. Each further mask is a
forward pass in which the modules that had finished by then return stored outputs, so its result is the full pass's,
bit for bit. It needs no knowledge of the host: the order of its modules is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from esper_core.kasmina.caches import uncached
from esper_core.kasmina.slot import SeedSlot
from esper_core.leyline.host import HostProtocol, map_tensors

if TYPE_CHECKING:
    from esper_core.leyline.host import Inputs

Mask = frozenset[str]
"""Paths of the slots that are muted."""


@attrs.define
class _Frame:
    """One module call in progress and the calls inside it that have finished: (node, its raw output)."""

    finished: list[tuple[_Node, Any]] = attrs.Factory(list)


@attrs.define(eq=False)
class _Node:
    """Stands in for one module's `forward` while a tree is evaluated."""

    tree: PrefixTree
    original: Callable[..., Any]
    calls: int = 0
    repeated: bool = False
    mutated: bool = False
    needed: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tree = self.tree
        if self in tree.answers:
            answer = tree.answers[self]
            tree.frames[-1].finished.append((self, answer))
            return _clone(answer) if self.mutated else answer
        self.calls += 1
        tree.frames.append(_Frame())
        try:
            output = self.original(*args, **kwargs)
        finally:
            tree.frames.pop()
        if not self.mutated:
            tree.frames[-1].finished.append((self, output))
        elif self.needed:  # a copy is kept only of what a later pass would ask for
            tree.frames[-1].finished.append((self, _clone(output)))
        return output


class PrefixTree:
    """Evaluates masks on one batch after another. Use as a context: inside it the host's `forward`s are observed.

    Args:
        host: in eval mode; called through `forward_with_slots`.
        slots: the slots that masks may mute, by path.
    """

    def __init__(self, host: HostProtocol, slots: Mapping[str, SeedSlot]) -> None:
        self.host, self.slots = host, slots
        self.frames: list[_Frame] = []
        self.answers: dict[_Node, Any] = {}
        self._nodes: list[tuple[nn.Module, _Node]] = []
        self._order: list[str] = []
        self._finished_at: dict[str, list[tuple[_Node, Any]]] = {}
        self._keep: frozenset[str] = frozenset()

    def __enter__(self) -> PrefixTree:
        self._nodes = [(module, _Node(self, module.forward)) for module in self.host.module.modules()]
        for module, node in self._nodes:
            module.__dict__["forward"] = node
        for slot in self.slots.values():
            slot.tracer = self._slot_reached
        return self

    def __exit__(self, *exc: object) -> None:
        for module, node in self._nodes:
            if getattr(node.original, "__self__", None) is module:
                del module.__dict__["forward"]
            else:  # the forward was an instance's own already
                module.__dict__["forward"] = node.original
        for slot in self.slots.values():
            slot.tracer, slot.muted = None, False
        self.frames.clear()
        self.answers = {}
        self._finished_at = {}

    @torch.no_grad()
    def observe(self, inputs: Inputs) -> list[str]:
        """Learn from a small batch the order of the slots and which outputs of modules cannot be cached.

        Returns:
            Paths of the slots that the forward pass reached, in the order in which it did.
        """
        self._order = []
        outputs: list[tuple[_Node, Tensor, int]] = []
        everywhere = frozenset(self.slots)
        for _, node in self._nodes:
            node.calls, node.mutated, node.needed = 0, False, False

        def note(node: _Node, output: Any) -> Any:
            outputs.extend((node, leaf, leaf._version) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            return output

        originals = [(node, node.original) for _, node in self._nodes]
        for node, original in originals:
            node.original = lambda *a, _n=node, _o=original, **k: note(_n, _o(*a, **k))
        try:
            self._forward(_copy(inputs), frozenset(), {}, keep=everywhere)
            for _, node in self._nodes:
                node.repeated = node.calls > 1
            for node in (node for entries in self._finished_at.values() for node, _ in entries):
                node.needed = True
            # a muted slot hands on the host's own feature, which what comes next may work on in place
            self._forward(_copy(inputs), everywhere, {})
        finally:
            for node, original in originals:
                node.original = original
        for node, leaf, version in outputs:
            node.mutated |= leaf._version != version  # something later worked on it in place
        return list(self._order)

    @torch.no_grad()
    def run(self, inputs: Inputs, masks: Iterable[Mask]) -> Iterator[tuple[Mask, Tensor]]:
        """Logits under the empty mask and under every mask of `masks`, each once; `observe` must have run.

        Args:
            inputs: one batch.
            masks: sets of paths to mute; slots that the pass does not reach are ignored.
        """
        rank = {path: i for i, path in enumerate(self._order)}
        wanted = {tuple(sorted((p for p in mask if p in rank), key=rank.__getitem__)) for mask in masks} | {()}
        prefixes = {mask[:length] for mask in wanted for length in range(len(mask) + 1)}
        yield from self._explore(inputs, (), {}, wanted, prefixes, rank)

    def _explore(
        self,
        inputs: Inputs,
        muted: tuple[str, ...],
        answers: dict[_Node, Any],
        wanted: set[tuple[str, ...]],
        prefixes: set[tuple[str, ...]],
        rank: Mapping[str, int],
    ) -> Iterator[tuple[Mask, Tensor]]:
        branches = sorted((p[-1] for p in prefixes if p and p[:-1] == muted), key=rank.__getitem__)
        logits = self._forward(inputs, frozenset(muted), answers, keep=frozenset(branches))
        finished = self._finished_at
        if muted in wanted:
            yield frozenset(muted), logits
        for path in branches:
            # a slot inside a muted seed is not reached: muting it too changes nothing
            entries = finished.pop(path) if path in finished else list(answers.items())
            known = {node: output for node, output in entries if not node.repeated}
            yield from self._explore(inputs, (*muted, path), known, wanted, prefixes, rank)

    def _forward(
        self,
        inputs: Inputs,
        muted: Mask,
        answers: dict[_Node, Any],
        keep: frozenset[str] = frozenset(),
    ) -> Tensor:
        self.answers, self.frames, self._finished_at, self._keep = answers, [_Frame()], {}, keep
        for path, slot in self.slots.items():
            slot.muted = path in muted
        with uncached(self.host.module):  # a block whose answer is known would leave its part of a cache empty
            return self.host.forward_with_slots(inputs)

    def _slot_reached(self, slot: SeedSlot) -> None:
        if slot.path not in self._order:
            self._order.append(slot.path)
        if slot.path in self._keep:
            self._finished_at[slot.path] = [entry for frame in self.frames for entry in frame.finished]


def _copy(inputs: Inputs) -> Inputs:
    copied: Inputs = map_tensors(torch.clone, inputs)
    return copied


def _clone(output: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, output)
