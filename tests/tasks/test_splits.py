"""Splits, augmentation, prefetching and what is held out."""

from __future__ import annotations

import hashlib
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.leyline.errors import EsperError
from esper_plugins.tasks.augment import Augment, crop_at_once, crop_one_by_one
from esper_plugins.tasks.digits import digits
from esper_plugins.tasks.documentation import documentation
from esper_plugins.tasks.holdout import hold_out
from esper_plugins.tasks.image_task import Cut, Pool, image_task
from esper_plugins.tasks.prefetch import prefetch
from esper_plugins.tasks.splits import ResidentSplit, Scale, StreamedSplit
from esper_plugins.tasks.tokens import WindowSplit, language_task


def whole(split) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in split.batches(64)])


def test_digits_keep_their_splits_for_ever() -> None:
    """Figures of different days compare only if this digest never moves."""
    task = digits(validation=0.2)
    assert [task.train.examples, task.validation.examples, task.test.examples] == [1078, 269, 450]
    stored = [split.inputs.numpy().tobytes() for split in (task.train, task.validation, task.test)]
    assert [hashlib.sha256(data).hexdigest()[:12] for data in stored] == DIGITS
    labels = torch.cat([b.targets for b in task.test.batches(450)])
    assert torch.bincount(labels).min() >= 43, "stratified"


DIGITS = ["197da3a6cc8a", "07a37e9dac57", "e3452c6e88f0"]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_holding_out_keeps_the_shares_of_classes(sizes: list[int], data: st.DataObject) -> None:
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    if len(labels) < 2:
        return
    count = data.draw(st.integers(1, len(labels) - 1))
    kept, held = hold_out(labels, count)
    assert len(held) == count and np.array_equal(np.union1d(kept, held), np.arange(len(labels)))
    assert not np.intersect1d(kept, held).size
    exact = np.asarray(sizes) * count / len(labels)
    assert (np.abs(np.bincount(labels[held], minlength=len(sizes)) - exact) < 1).all()


def test_augmentation_is_crop_after_padding_and_flip() -> None:
    augment = Augment(pad=2, flip=True)
    images = torch.randint(0, 255, (50, 3, 8, 6), dtype=torch.uint8)
    draws = augment.draw(50, seed=3, epoch=4)
    got = augment.apply(images, draws)
    for image, (down, right, flip), result in zip(images, draws.tolist(), got, strict=True):
        padded = torch.zeros(3, 12, 10, dtype=torch.uint8)
        padded[:, 2:10, 2:8] = image
        expected = padded[:, down : down + 8, right : right + 6]
        assert torch.equal(result, expected.flip(-1) if flip else expected)
    assert draws[:, :2].min() == 0 and draws[:, :2].max() == 4 and 10 < draws[:, 2].sum() < 40
    assert torch.equal(draws, augment.draw(50, seed=3, epoch=4))
    assert not torch.equal(draws, augment.draw(50, seed=3, epoch=5))


def test_an_example_is_augmented_by_its_position_whatever_the_batch_size() -> None:
    images, labels = torch.randint(0, 255, (96, 1, 8, 8), dtype=torch.uint8), torch.arange(96)
    split = ResidentSplit(images, labels, augment=Augment(1, True))
    wide, narrow = (
        torch.cat([b.inputs for b in split.batches(size, seed=1, epoch=1, shuffle=True)]) for size in (32, 8)
    )
    assert torch.equal(wide, narrow)


def test_a_training_epoch_shows_each_example_once() -> None:
    labels = torch.arange(100)
    split = ResidentSplit(torch.zeros(100, 1), labels, whole_batches=True)
    seen = torch.cat([b.targets for b in split.batches(32, seed=1, epoch=1, shuffle=True)])
    assert len(seen) == 96 and len(seen.unique()) == 96
    assert torch.equal(torch.cat([b.targets for b in split.batches(50)]), labels)
    assert next(split.batches(500)).size == 100, "fewer than one batch still are one"


def test_scale_gives_mean_zero_and_deviation_one() -> None:
    images = torch.randint(0, 255, (500, 3, 6, 6), dtype=torch.uint8)
    images[:, 2] = 7
    values = Scale.of(images, chunk=64).apply(images)
    assert values[:, :2].mean((0, 2, 3)).abs().max() < 1e-5
    assert (values[:, :2].std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert values[:, 2].abs().max() < 1e-5, "a channel without variance is not blown up"


def test_streaming_gives_the_bits_of_residing() -> None:
    images = torch.randint(0, 255, (90, 3, 8, 8), dtype=torch.uint8)
    options = {"scale": Scale.of(images), "augment": Augment(2, True), "whole_batches": True}
    labels = torch.arange(90) % 7
    resident, streamed = ResidentSplit(images, labels, **options), StreamedSplit(lambda i: images[i], labels, **options)
    for how in ({"shuffle": True, "seed": 2, "epoch": 5}, {"start": 2}):
        for a, b in zip(resident.batches(16, **how), streamed.batches(16, **how), strict=True):
            assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_prefetching_overlaps_is_bounded_and_raises_where_it_happened() -> None:
    made = []

    def source():
        for i in range(10):
            if i == 5:
                raise KeyError("the sixth")
            made.append(i)
            yield i

    items = prefetch(source, ahead=2)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(made) <= 5, "at most the queue, one in hand and one used"
    assert list(islice(items, 4)) == [1, 2, 3, 4]
    with pytest.raises(KeyError, match="sixth"):
        next(items)


def test_prefetching_ends_its_thread_and_its_source() -> None:
    closed, before = [], threading.active_count()

    def source():
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    items = prefetch(source, ahead=2)
    next(items)
    items.close()
    assert closed == [True] and threading.active_count() == before


def test_a_loader_that_raises_is_heard_at_its_batch() -> None:
    def load(indices: torch.Tensor) -> torch.Tensor:
        if 40 in indices:
            raise OSError("bad sector")
        return torch.zeros(len(indices), 1)

    split = StreamedSplit(load, torch.arange(64), ahead=3)
    batches = split.batches(16)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(OSError, match="bad sector"):
        next(batches)


def test_windows_cover_the_text_and_targets_follow_inputs() -> None:
    split = WindowSplit(torch.arange(0, 101, dtype=torch.uint8), 10)
    batch = next(split.batches(64))
    assert torch.equal(batch.inputs.flatten(), torch.arange(100)) and torch.equal(batch.targets, batch.inputs + 1)


def test_training_windows_shift_from_epoch_to_epoch_and_stay_inside() -> None:
    split = WindowSplit(torch.arange(0, 101, dtype=torch.uint8), 10, training=True)
    offsets = set()
    for epoch in range(30):
        rows = torch.cat([b.inputs for b in split.batches(3, epoch=epoch, shuffle=True)])
        offsets.add(int(rows.min() % 10))
        assert rows.max() <= 99 and (rows[:, 1:] - rows[:, :-1] == 1).all()
    assert len(offsets) > 5


def test_memory_mapped_tokens_give_the_same_windows(tmp_path) -> None:
    row = np.random.RandomState(0).randint(0, 256, 1000).astype(np.uint8)
    (tmp_path / "t").write_bytes(row.tobytes())
    mapped = np.memmap(tmp_path / "t", np.uint8, "r")
    for a, b in zip(
        WindowSplit(torch.from_numpy(row), 16, training=True).batches(8, shuffle=True),
        WindowSplit(mapped, 16, training=True).batches(8, shuffle=True),
        strict=True,
    ):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_text_splits_follow_each_other_without_overlap() -> None:
    task = language_task("t", torch.arange(1000), 1000, 10, validation=0.1, test=0.1)
    ends = [(whole(s).min().item(), whole(s).max().item()) for s in (task.train, task.validation, task.test)]
    assert ends[0][1] < 800 <= ends[1][0] and ends[1][1] < 900 <= ends[2][0]
    with pytest.raises(EsperError, match="validation split"):
        language_task("t", torch.arange(100), 100, 10, validation=0.1, test=0.1)


def test_characters_of_held_out_text_that_training_lacks_are_one_token() -> None:
    task = documentation(tokens="char", length=32)
    assert task.outputs < 256 and whole(task.test).max() < task.outputs


def pool(count: int) -> Pool:
    images = torch.arange(count, dtype=torch.int32)
    stored = torch.stack([images // 256, images % 256], 1).to(torch.uint8).view(count, 2, 1, 1)
    return Pool.of(stored, torch.arange(count) % 10)


def identities(split: ResidentSplit) -> np.ndarray:
    return (split.inputs[:, 0].int() * 256 + split.inputs[:, 1].int()).flatten().numpy()


@pytest.mark.parametrize("source", ["remainder", "inside"])
def test_a_subset_is_the_first_of_the_published_permutation(source: str) -> None:
    order = np.random.RandomState(0).permutation(2000)
    task = image_task(
        "t", pool(2000), classes=10, cut=Cut(0.1, 300, source), augment="none", memory_mb=1, test=pool(50)
    )
    train, held = identities(task.train), identities(task.validation)
    if source == "remainder":
        assert np.array_equal(train, order[:300]) and np.array_equal(held, order[300:330])
    else:
        assert len(train) == 270 and np.array_equal(np.sort(np.concatenate([train, held])), np.sort(order[:300]))
    with pytest.raises(EsperError, match="validation_from=inside"):
        Cut(0.1, 1950).divide(np.zeros(2000))


def test_own_splits_are_kept_and_missing_ones_are_carved_without_overlap() -> None:
    task = image_task("t", pool(500), classes=10, cut=Cut(0.1), augment="none", memory_mb=1)
    parts = [identities(split) for split in (task.train, task.validation, task.test)]
    assert [len(p) for p in parts] == [360, 40, 100]
    assert len(np.unique(np.concatenate(parts))) == 500
    task = image_task(
        "t", pool(50), classes=10, cut=Cut(0.1), augment="none", memory_mb=1, validation=pool(20), test=pool(30)
    )
    assert [s.examples for s in (task.train, task.validation, task.test)] == [50, 20, 30]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_bits_of_the_cpu() -> None:
    images = torch.randint(0, 255, (64, 3, 8, 8), dtype=torch.uint8)
    split = ResidentSplit(images, torch.arange(64), augment=Augment(2, True))
    for a, b in zip(split.batches(16, shuffle=True), split.batches(16, shuffle=True, device="cuda"), strict=True):
        assert torch.equal(a.inputs, b.inputs.cpu()) and torch.equal(a.targets, b.targets.cpu())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_both_ways_of_cropping_agree(dtype: torch.dtype) -> None:
    padded, draws = torch.randint(0, 255, (40, 3, 13, 11)).to(dtype), Augment(2, True).draw(40, 1, 1)
    shape = torch.Size((40, 3, 9, 7))
    assert torch.equal(crop_at_once(padded, draws, shape), crop_one_by_one(padded, draws, shape))
