"""Conformance of tasks: subclass `TaskConformance`, set `spec` (and `argument`), and pytest checks every invariant."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Final

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import IGNORED, Batch, Split, TaskProtocol
from esper_core.leyline.specs import TaskSpec
from esper_core.testing.base import Conformance
from esper_core.testing.cases import installed

_SHAPES: Final[Mapping[str, Callable[[TaskProtocol], tuple[int, ...]]]] = MappingProxyType(
    {
        "classification": lambda task: (),
        "language-modelling": lambda task: task.input_shape,
        "multilabel": lambda task: (task.outputs,),
    }
)
"""Shape of one example's target, for the kinds of task where it is known."""

_CLASSES: Final = frozenset({"classification", "language-modelling", "segmentation"})
"""Kinds of task whose targets are class or token numbers."""

_FEW = 6
"""Batches that are compared of splits that may be long."""


def tensors(batch: Batch) -> list[Tensor]:
    """Targets and inputs of a batch, in a fixed order."""
    *inputs, targets = batch.tensors()
    return [targets, *inputs]


def same_batch(left: Batch, right: Batch) -> bool:
    """Whether two batches are equal, bit for bit."""
    pairs = zip(tensors(left), tensors(right), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


class TaskConformance(Conformance):
    """The invariants of a task.

    Inputs may be several tensors of different shapes, of which one has the task's `input_shape`. Targets of kinds other
    than classification and language modelling may have any shape, such as a class for each pixel.

    Attributes:
        spec: name of the task, or `distribution/name`.
        argument: what stands after `:` in `--task name:argument`; a property may make files for it.
        options: options to build it with, beside their defaults.
        batch_size: of the batches that are looked at; each split should have several.
    """

    kind = "task"
    argument: str = ""
    options: ClassVar[dict[str, Any]] = {}
    batch_size: ClassVar[int] = 16

    @property
    def data(self) -> TaskSpec:
        """The spec as registered."""
        spec = installed().find("task", self.spec).spec
        assert isinstance(spec, TaskSpec)
        return spec

    def build(self, argument: str | None = None) -> TaskProtocol:
        """The task, built as a run builds it."""
        where = self.argument if argument is None else argument
        return installed().build("task", self.spec, where, options=self.options, seed=0)  # type: ignore[no-any-return]

    def few(self, split: Split, count: int = _FEW, **how: Any) -> list[Batch]:
        """The first batches of a split."""
        return list(islice(split.batches(self.batch_size, **how), count))

    def splits(self, task: TaskProtocol) -> Iterator[Split]:
        """The three splits."""
        yield from (task.train, task.validation, task.test)

    def test_declares_itself(self) -> None:
        for option in self.data.options:
            assert option.parse(option.default) == option.default
        assert self.build().kind in self.data.capabilities

    def test_batches_are_what_the_task_says(self) -> None:
        task = self.build()
        for split in self.splits(task):
            for batch in self.few(split):
                targets, *inputs = tensors(batch)
                assert all(len(x) == batch.size for x in (targets, *inputs)), "examples come first"
                assert any(tuple(x.shape[1:]) == task.input_shape for x in inputs), "no input has `input_shape`"
                assert all(x.isfinite().all() for x in (targets, *inputs))
                assert all(x.is_floating_point() or x.dtype in (torch.int64, torch.bool) for x in inputs)
                if task.kind in _SHAPES:
                    assert targets.shape == (batch.size, *_SHAPES[task.kind](task)), "a target for each output"
                if task.kind in _CLASSES:
                    assert targets.dtype == torch.int64
                if task.kind == "regression":
                    assert targets.is_floating_point(), "numbers as floats"
                counted = targets[targets != IGNORED]
                if task.kind == "multilabel":
                    assert ((counted == 0) | (counted == 1)).all(), "each label 0 or 1"
                elif targets.dtype == torch.int64:
                    assert counted.numel() == 0 or 0 <= counted.min() <= counted.max() < task.outputs
                else:
                    assert targets.is_floating_point(), "classes as int64, numbers as floats"

    def test_the_same_arguments_give_the_same_batches(self) -> None:
        first, second = self.build(), self.build()
        for a, b in zip(self.splits(first), self.splits(second), strict=True):
            how = {"seed": 3, "epoch": 2, "shuffle": True}
            for left, right in zip(self.few(a, **how), self.few(b, **how), strict=True):
                assert same_batch(left, right)

    @pytest.mark.parametrize("start", [1, 3])
    def test_starting_late_gives_the_batches_that_remain(self, start: int) -> None:
        split = self.build().train
        for epoch in (0, 1):
            whole = self.few(split, _FEW, seed=1, epoch=epoch, shuffle=True)
            late = self.few(split, max(0, len(whole) - start), seed=1, epoch=epoch, shuffle=True, start=start)
            assert len(late) == max(0, len(whole) - start)
            assert all(same_batch(a, b) for a, b in zip(whole[start:], late, strict=True))

    def test_seed_and_epoch_change_the_training_order(self) -> None:
        split = self.build().train
        keys = [(0, 0), (0, 1), (1, 0)]
        found = [self.few(split, 1, seed=seed, epoch=epoch, shuffle=True)[0] for seed, epoch in keys]
        assert not any(same_batch(a, b) for a, b in [*pairwise(found), (found[0], found[2])])

    def test_held_out_splits_stay_as_they_are(self) -> None:
        task = self.build()
        for split in (task.validation, task.test):
            pairs = zip(self.few(split), self.few(split, seed=9, epoch=9), strict=True)
            assert all(same_batch(a, b) for a, b in pairs)

    def test_counts_are_true(self) -> None:
        task = self.build()
        for split in self.splits(task):
            expected = split.batch_count(self.batch_size)
            if expected is None or expected > 2000:
                continue
            sizes = [batch.size for batch in split.batches(self.batch_size)]
            assert len(sizes) == expected and set(sizes[:-1]) <= {self.batch_size}
            assert split.examples is not None and sum(sizes) <= split.examples
            assert split is task.train or sum(sizes) == split.examples

    def test_global_random_state_is_left_alone(self) -> None:
        states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # type: ignore[index]
        self.few(self.build().train, shuffle=True)
        assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
        assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[index]

    def test_a_consumer_that_stops_leaves_no_thread_behind(self) -> None:
        task, before = self.build(), threading.active_count()
        for split in self.splits(task):
            batches = split.batches(self.batch_size, shuffle=True)
            next(iter(batches))
            batches.close()  # type: ignore[attr-defined]
        assert threading.active_count() <= before

    def test_missing_data_is_one_clear_error(self) -> None:
        if self.data.argument:
            for argument in ("", "/nowhere/at/all"):
                with pytest.raises(EsperError) as caught:
                    self.build(argument)
                assert "\n" not in str(caught.value)
