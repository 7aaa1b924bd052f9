"""Records the features of every module of a model on one example; injection points are chosen from them.

The model is run on one and on two examples, in eval mode. Where possible this happens on a copy whose weights are
fake tensors (shapes without data), so that a large model costs no arithmetic and the model itself is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from esper_core.kasmina.modes import evaluating
from esper_core.leyline.host import map_tensors

if TYPE_CHECKING:
    from esper_core.leyline.host import Inputs

_ATTENTION: Final = (functional.scaled_dot_product_attention, functional.multi_head_attention_forward)
_SOFTMAX: Final = (functional.softmax, torch.softmax, Tensor.softmax)
FAKE_FROM: Final = 50_000_000
"""Parameters from which on a pass over fake tensors is cheaper than a real one."""
_NEVER_ENDS: Final = 2**62
"""Later than any sequence number."""


@attrs.define(eq=False)
class Traced:
    """The record of one module.

    Attributes:
        path: its path in the model; empty for the model itself.
        parent: the module that called it first.
        kids: modules that it called first, in the order of their completion.
        calls: how often it ran.
        start, end: ticks of its first call.
        shape: of its feature, batch of two; None when its output begins with no tensor.
        single_shape: the same for a batch of one.
        floating: whether the feature is of a floating dtype.
        input_shape, single_input_shape: of its first tensor argument; `input_floating` whether that is floating.
        output_key: identity of the feature tensor, content included: (id, version).
        input_keys: identities of every tensor argument.
        node: the autograd node of the feature, and which of its outputs that is.
        ended: sequence number of autograd when the module was done.
        flows: whether the logits depend on the feature through what ran after the module.
        attends: whether softmax or dot-product attention ran inside it; attended: the tick at which it last did.
        matrices: names and shapes of its subtree's parameters of rank two or more.
        weights: shapes of its own direct parameters. running: whether it holds running statistics.
        params: size of its subtree.
    """

    path: str
    parent: Traced | None = None
    kids: list[Traced] = attrs.Factory(list)
    calls: int = 0
    start: int = 0
    end: int = 0
    shape: tuple[int, ...] | None = None
    single_shape: tuple[int, ...] | None = None
    floating: bool = False
    steady: bool = True
    input_shape: tuple[int, ...] | None = None
    single_input_shape: tuple[int, ...] | None = None
    input_floating: bool = True
    output_key: tuple[int, int] = (0, 0)
    input_keys: frozenset[tuple[int, int]] = frozenset()
    node: tuple[Any, int] | None = None
    ended: int = 0
    flows: bool = False
    attends: bool = False
    attended: int = 0
    matrices: tuple[tuple[int, ...], ...] = ()
    weights: tuple[tuple[int, ...], ...] = ()
    running: bool = False
    params: int = 0

    def subtree(self) -> Iterator[Traced]:
        """This and everything that ran inside it, outermost first."""
        yield self
        for kid in self.kids:
            yield from kid.subtree()


@attrs.frozen
class Trace:
    """One measured pass.

    Attributes:
        root: the model itself. ran: every module that ran, in order of completion.
        logits_shape: for a batch of two.
        fuses: torch's own multi-head attention ran; without gradients it may take another, fused way.
    """

    root: Traced
    ran: tuple[Traced, ...]
    logits_shape: tuple[int, ...]
    fuses: bool = False


def feature_of(output: Any) -> Tensor | None:
    """The feature in a module's output: the tensor itself, or the first element of a sequence or mapping."""
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()), None)
        elif isinstance(output, tuple | list) and output:
            output = output[0]
        else:
            return None
    return output


def pick_logits(output: Any) -> Tensor:
    """The logits in a model's output: `logits` where there is such a field, else the first floating tensor."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not leaves:
        raise TypeError(f"the model returns a {type(output).__name__} without a tensor")
    return next((leaf for leaf in leaves if leaf.is_floating_point()), leaves[0])


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run `model` on a tensor, on a mapping as keyword arguments, or on a tuple or list as positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


@contextmanager
def unfused() -> Iterator[None]:
    """Disable the fused kernels that torch's attention layers use without gradients when they have no hooks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def repeat_example(inputs: Inputs, count: int) -> Inputs:
    """The first example of `inputs`, `count` times."""
    repeated: Inputs = map_tensors(lambda t: torch.cat([t[:1]] * count), inputs)
    return repeated


def trace_features(model: nn.Module, example: Inputs, to_logits: Any = pick_logits) -> Trace:
    """Record a pass of `model` on the first example of `example`; the model is unchanged.

    Raises:
        Exception: any that the model raises on the example.
    """
    if sum(0 if p.is_meta else p.numel() for p in model.parameters()) >= FAKE_FROM:
        try:
            return _trace_fake(model, example, to_logits)
        except Exception:  # noqa: BLE001 - foreign code that needs values, or cannot be copied: run it for real
            pass
    with torch.random.fork_rng(devices=[]), eval_mode(model):
        return _trace(model, repeat_example(example, 1), repeat_example(example, 2), to_logits)


def _trace_fake(model: nn.Module, example: Inputs, to_logits: Any) -> Trace:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in tensors}
    twin = copy.deepcopy(model, memo).eval()

    single, double = (map_tensors(mode.from_tensor, repeat_example(example, count)) for count in (1, 2))
    with mode, eval_mode(twin):  # a frozen model's, too: what flows where is read off the gradients' graph
        return _trace(twin, single, double, to_logits)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context of eval mode in which every floating parameter requires gradients."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    with evaluating(model):
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


def _trace(model: nn.Module, single: Inputs, double: Inputs, to_logits: Any) -> Trace:
    with torch.no_grad():
        alone = _Recorder(model)
        with alone:
            call(model, single)
    both = _Recorder(model)
    with torch.enable_grad(), both:
        logits = to_logits(call(model, double))
    used = _last_uses(logits)
    for path, traced in both.seen.items():
        other = alone.seen.get(path)
        if other is not None:
            traced.single_shape, traced.single_input_shape = other.shape, other.input_shape
        traced.flows = traced.node is not None and used.get(traced.node, -1) >= traced.ended
        traced.node = None
    ran = tuple(sorted(both.seen.values(), key=lambda t: t.end))
    for traced in ran:
        if traced.parent is not None:
            traced.parent.kids.append(traced)
    return Trace(both.seen[""], ran, tuple(logits.shape), both.fuses)


def _last_uses(logits: Tensor) -> dict[tuple[Any, int], int]:
    """For each output of an autograd node that the logits depend on: the sequence number of what used it last."""
    if logits.grad_fn is None:
        return {}
    used: dict[tuple[Any, int], int] = {(logits.grad_fn, logits.output_nr): _NEVER_ENDS}
    seen, waiting = {logits.grad_fn}, [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        number = node._sequence_nr()
        for following, output in node.next_functions:
            if following is not None:
                used[following, output] = max(used.get((following, output), 0), number)
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return used


class _Recorder(TorchFunctionMode):
    """Hooks every module for one pass; as a torch function mode it sees attention wherever it runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: dict[str, Traced] = {}
        self.stack: list[Traced] = []
        self.tick = 0
        self.fuses = False
        self.alive: list[Any] = []  # keeps tensors, so that an id names one tensor only
        self.handles: list[Any] = []
        self.one = torch.ones((), requires_grad=True)

    def clock(self) -> int:
        """The sequence number that autograd has reached."""
        node: Any = (self.one * 1).grad_fn
        return int(node._sequence_nr())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ATTENTION or (func in _SOFTMAX and args and _mixes_positions(args[0])):
            self.fuses |= func is functional.multi_head_attention_forward
            for traced in self.stack:
                traced.attends = True
                traced.attended = self.tick
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> _Recorder:
        for path, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(_Before(self, path), with_kwargs=True))
            self.handles.append(module.register_forward_hook(_After(self, path)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.alive.clear()


def _mixes_positions(scores: Any) -> bool:
    """Whether softmax of `scores` looks like attention: rank 4, or squares in rank 3; a router's scores are neither."""
    shape = tuple(getattr(scores, "shape", ()))
    return len(shape) >= 4 or (len(shape) == 3 and shape[-1] == shape[-2])


@attrs.frozen(eq=False)
class _Before:
    recorder: _Recorder
    path: str

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder = self.recorder
        traced = recorder.seen.get(self.path)
        if traced is None:
            traced = recorder.seen[self.path] = Traced(self.path, recorder.stack[-1] if recorder.stack else None)
            traced.start = recorder.tick
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            recorder.alive.append(tensors)
            traced.input_keys = frozenset((id(t), t._version) for t in tensors)
            if tensors:
                traced.input_shape, traced.input_floating = tuple(tensors[0].shape), tensors[0].is_floating_point()
            parameters = list(module.parameters())
            traced.matrices = tuple(tuple(p.shape) for p in parameters if sum(size > 1 for size in p.shape) >= 2)
            traced.weights = tuple(tuple(p.shape) for p in module.parameters(recurse=False))
            traced.running = any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))
            traced.params = sum(p.numel() for p in parameters)
        recorder.tick += 1
        recorder.stack.append(traced)


@attrs.frozen(eq=False)
class _After:
    recorder: _Recorder
    path: str

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder
        traced = recorder.seen[self.path]
        while recorder.stack.pop() is not traced:  # a module inside raised and its caller continued
            pass
        recorder.tick += 1
        traced.calls += 1
        traced.end = recorder.tick
        feature = feature_of(output)
        shape = None if feature is None else tuple(feature.shape)
        if traced.calls > 1:
            traced.steady &= shape == traced.shape
        traced.shape = shape
        if feature is not None:
            recorder.alive.append(feature)
            traced.floating = feature.is_floating_point()
            traced.output_key = (id(feature), feature._version)
            if feature.grad_fn is not None:
                traced.node, traced.ended = (feature.grad_fn, feature.output_nr), recorder.clock()
