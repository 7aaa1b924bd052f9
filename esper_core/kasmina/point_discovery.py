"""Chooses injection points from a measured pass, by structure, shapes and data flow, never by names of classes.

Terms: a *matrix* is a parameter of rank two or more; a *composite* ran with at least two of them inside; composites
form a *chain* when each takes what the one before gave.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise, zip_longest
from typing import Final

import attrs

from esper_core.kasmina.feature_trace import Trace, Traced
from esper_core.kasmina.feature_view import FeatureView

_LONG: Final = 5
"""A block that is a chain of this many single layers is opened."""


@attrs.frozen
class Found:
    """One chosen place: the module behind which a seed may grow, the view of its feature, and what it is."""

    traced: Traced
    view: FeatureView
    role: str
    region: str


def discover(trace: Trace) -> list[Found]:
    """The injection points of a model, in the order in which the forward pass reaches them; may be empty."""
    finder = _Finder(trace)
    found = finder.blocks(once=True)
    chains = [f.traced for f in found if finder.is_long_chain(f.traced)]
    for chain in chains or ([] if found else [trace.root]):
        found = finder.merge(found, finder.layers(chain))
    if len(found) < 2:
        found = finder.merge(found, finder.blocks(once=False))
    return found or finder.blocks(once=False, logits=True)


def view_of(trace: Trace, traced: Traced) -> FeatureView | None:
    """The view of the feature of `traced` for a seed; None if there is none."""
    return _Finder(trace).view(traced)


class _Finder:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.votes = [(t, axis) for t in trace.ran if (axis := _agreed_axis(t)) is not None]
        last = next((t for t in reversed(trace.ran) if t.weights and not any(k.matrices for k in t.kids)), None)
        self.head = last if last is not None and _own_matrix(last) else None
        self._views: dict[str, FeatureView | None] = {}
        self._index()

    def _index(self) -> None:
        """The votes by what they gave and took, so that thousands of layers take no longer than each in turn."""
        self.by_output: dict[object, list[tuple[Traced, int]]] = defaultdict(list)
        self.by_input: dict[object, list[tuple[Traced, int]]] = defaultdict(list)
        self.ends: dict[object, list[tuple[int, int]]] = defaultdict(list)
        self.starts: dict[object, list[tuple[int, int]]] = defaultdict(list)
        for other, axis in self.votes:
            self.by_output[other.output_key].append((other, axis))
            for key in other.input_keys:
                self.by_input[key].append((other, axis))
            self.ends[other.shape].append((other.end, axis))
            self.starts[other.input_shape].append((other.start, axis))
        for times in (*self.ends.values(), *self.starts.values()):
            times.sort()

    # --- Which features a seed can live on ---

    def view(self, traced: Traced) -> FeatureView | None:
        if traced.path not in self._views:
            self._views[traced.path] = self._view(traced)
        return self._views[traced.path]

    def _view(self, traced: Traced) -> FeatureView | None:
        single, double = traced.single_shape, traced.shape
        if not traced.floating or not traced.steady or single is None or double is None or len(single) != len(double):
            return None
        grown = [i for i, (one, two) in enumerate(zip(single, double, strict=True)) if one != two]
        if len(grown) != 1 or (single[grown[0]], double[grown[0]]) != (1, 2) or not 2 <= len(double) <= 5:
            return None
        channel = self._channel_axis(traced)
        if channel is None or channel == grown[0] or min(double) == 0:
            return None
        return FeatureView.of(len(double), grown[0], channel)

    def _channel_axis(self, traced: Traced) -> int | None:
        """The axis along which the weights next to the feature work."""
        assert traced.shape is not None
        rank, shape = len(traced.shape), traced.shape
        found = self._near_axis(traced)
        if found is not None:
            return found
        near: list[tuple[int, int, int]] = []  # (rank of the evidence, distance in time, axis)
        for other, axis in self.votes:
            gives, takes = other.shape == shape, other.input_shape == shape
            if gives and other.output_key == traced.output_key:
                near.append((0, 0, axis))
            elif takes and traced.output_key in other.input_keys:
                near.append((1, other.start - traced.end, axis))
            elif gives and other.end <= traced.end:
                near.append((2, traced.end - other.end, axis))
            elif takes and other.start >= traced.end:
                near.append((3, other.start - traced.end, axis))
            elif (
                other.end <= traced.end
                and other.shape
                and len(other.shape) == rank
                and other.shape[axis] == shape[axis]
            ):
                near.append((4, traced.end - other.end, axis))  # pooled since
            elif gives or takes:
                near.append((5, abs(traced.end - other.end), axis))
        if near:
            return min(near)[2]
        sizes = {
            size[axis]
            for other, axis in self.votes
            for size in (other.shape, other.input_shape)
            if size and axis < len(size)
        }
        known = [axis for axis in range(1, rank) if shape[axis] in sizes]
        return 1 if rank == 2 else known[0] if len(known) == 1 else None

    def _near_axis(self, traced: Traced) -> int | None:
        """What the loop of `_channel_axis` would find of its first four kinds, without a look at every layer."""
        shape, time = traced.shape, traced.end
        given = [axis for other, axis in self.by_output.get(traced.output_key, ()) if other.shape == shape]
        if given:
            return min(given)
        taken = [
            (other.start - time, axis)
            for other, axis in self.by_input.get(traced.output_key, ())
            if other.input_shape == shape
        ]
        if taken:
            return min(taken)[1]
        before = self.ends.get(shape, [])
        place = bisect_right(before, (time, math.inf))
        if place:
            return before[bisect_left(before, (before[place - 1][0], -1))][1]
        after = self.starts.get(shape, [])
        place = bisect_left(after, (time, -1))
        return after[place][1] if place < len(after) else None

    def usable(self, traced: Traced, *, once: bool = True, logits: bool = False) -> bool:
        if not traced.flows or traced.parent is None or (once and traced.calls != 1) or self.view(traced) is None:
            return False
        if not logits and (traced is self.head or traced.output_key == self.trace.root.output_key):
            return False
        return logits or not (self.head and self.head.output_key == traced.output_key)

    # --- Blocks ---

    def blocks(self, *, once: bool, logits: bool = False) -> list[Found]:
        found: dict[tuple[int, int], Found] = {}
        for traced, inner in self._visit(self.trace.root, True):
            view = self.view(traced)
            if view is None or not self.usable(traced, once=once, logits=logits) or len(traced.shape or ()) < 3:
                continue
            if not traced.input_floating:  # an embedding
                continue
            role = self._role(traced, inner)
            before = found.get(traced.output_key)
            if before is not None:  # the same tensor seen from outside: the innermost name stays
                role = "stage" if role == "block" else role
            found[traced.output_key] = Found(traced, view, role, _region(traced, inner))
        return sorted(found.values(), key=lambda f: f.traced.end)

    def _visit(self, parent: Traced, free: bool) -> Iterator[tuple[Traced, bool]]:
        """Candidates under `parent` with whether each is an inner part of a block.

        `free`: any composite kid may be one; else `parent` is a block, and only its parts of its own shape are.
        """
        kids = [kid for kid in parent.kids if len(kid.matrices) >= 2]
        for kid in kids:
            if free:
                yield kid, False
            elif kid.shape == parent.shape and (len(kids) > 1 or kid.params < 0.9 * parent.params):
                yield kid, True
                if not self._is_container(kid):
                    continue
            yield from self._visit(kid, self._is_container(kid))

    def _is_container(self, traced: Traced) -> bool:
        kids = [kid for kid in traced.kids if len(kid.matrices) >= 2]
        if self.view(traced) is None:
            return True
        if len(kids) == 1:
            return kids[0].output_key == traced.output_key
        linked = sum(a.output_key in b.input_keys for a, b in pairwise(kids))
        return len(kids) >= 2 and 2 * linked >= len(kids) - 1

    def _role(self, traced: Traced, inner: bool) -> str:
        attending = [t for t in traced.subtree() if t.attends and len(t.matrices) >= 2]
        if attending and (inner or min(t.params for t in attending) >= 0.9 * traced.params):
            return "after_attention"
        beside = traced.parent is not None and any(t.attends for t in traced.parent.kids)
        if (inner or beside) and not traced.attends and self._is_pointwise(traced):
            return "after_ffn"
        return "after_mixing" if inner else "block"

    def _is_pointwise(self, traced: Traced) -> bool:
        """Whether every weighted layer inside works on one position at a time."""
        view = self.view(traced)
        width = None if view is None or traced.shape is None else traced.shape[view.channel]
        layers = [t for t in traced.subtree() if _own_matrix(t)]
        kernels = [max(w[2:], default=1) for t in layers for w in t.weights if _agreed_axis(t) == 1]
        return max(kernels, default=1) == 1 and any(width in weight for t in layers for weight in t.weights)

    # --- Single layers ---

    def is_long_chain(self, traced: Traced) -> bool:
        """Whether a block is nothing but many single layers one after the other."""
        kids = traced.kids
        linked = sum(a.output_key in b.input_keys for a, b in pairwise(kids))
        single = all(len(kid.matrices) < 2 for kid in kids)
        return single and sum(map(_own_matrix, kids)) >= _LONG and linked >= 0.8 * (len(kids) - 1)

    def layers(self, chain: Traced) -> list[Found]:
        """Inside `chain`, the last feature behind each layer with a matrix and before the next one."""
        leaves = sorted((t for t in chain.subtree() if not any(kid.weights for kid in t.kids)), key=lambda t: t.end)
        weighted = sorted((t for t in leaves if _own_matrix(t) and t.input_floating), key=lambda t: t.start)
        found: list[Found] = []
        for layer, following in zip_longest(weighted, weighted[1:]):
            limit = following.start if following else chain.end
            near = leaves[bisect_left(leaves, layer.end, key=_end) : bisect_right(leaves, limit, key=_end)]
            behind = [t for t in near if self.usable(t)]
            if behind:
                last = max(behind, key=lambda t: (self.positions(t) > 1, t.end))
                view = self.view(last)
                assert view is not None
                found.append(Found(last, view, "layer", _region(last, False)))
        return [f for f in found if self.positions(f.traced) > 1] or found

    def positions(self, traced: Traced) -> int:
        """Positions of one example's feature."""
        view, shape = self.view(traced), traced.single_shape
        return 0 if view is None or shape is None else math.prod(shape) // max(1, shape[view.channel])

    def merge(self, first: list[Found], second: list[Found]) -> list[Found]:
        """Both, without places that see the same tensor or, beside features of higher rank, mere vectors."""
        known = {f.traced.output_key for f in first}
        both = [*first, *(f for f in second if f.traced.output_key not in known)]
        maps = [f for f in both if len(f.traced.shape or ()) >= 3]
        return sorted(maps or both, key=lambda f: f.traced.end)


def _end(traced: Traced) -> int:
    return traced.end


def _own_matrix(traced: Traced) -> bool:
    return any(sum(size > 1 for size in weight) >= 2 for weight in traced.weights)


def _agreed_axis(traced: Traced) -> int | None:
    """The axis along which a layer's own weight works, from shapes alone; None unless both batch sizes agree."""
    one = _axis(traced, traced.single_input_shape, traced.single_shape)
    return one if one == _axis(traced, traced.input_shape, traced.shape) else None


def _axis(traced: Traced, given: tuple[int, ...] | None, answer: tuple[int, ...] | None) -> int | None:
    if not answer or given is None:
        return None
    last = len(answer) - 1
    for weight in traced.weights:
        if len(weight) >= 3 and len(weight) == len(answer) == len(given) and weight[0] in (answer[1], given[1]):
            return 1
        if len(weight) == 2 and given:
            if (given[-1], answer[-1]) in (weight, weight[::-1]):
                return last
            if not traced.input_floating and answer[-1] == weight[-1]:
                return last
        if len(weight) == 1 and given == answer and last >= 1:
            matching = {axis for axis in (1, last) if answer[axis] == weight[0]}
            if traced.running or len(matching) == 1:
                return 1 if traced.running else matching.pop()
    return None


def _region(traced: Traced, inner: bool) -> str:
    path = traced.parent.path if inner and traced.parent is not None else traced.path
    return path.rpartition(".")[0] or path
