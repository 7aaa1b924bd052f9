"""The feature table: written once, documented from there, unknown never read as zero."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.leyline.stages import Op, Stage
from esper_core.tamiyo import features
from esper_core.tamiyo.observation import OPS, Normaliser, collate, observe

from .views import BLENDS, make_view

DOCUMENT = Path(__file__).parents[2] / "docs" / "observation.md"


def test_the_document_is_what_the_table_says() -> None:
    assert DOCUMENT.read_text() == features.observation_document()


def test_names_are_unique_within_a_table_and_meanings_are_given() -> None:
    names = features.schema()
    assert len(names) == len(set(names))
    assert all(f.meaning for table in features.TABLES.values() for f in table)


def test_unknown_becomes_nan_and_then_a_mask_bit() -> None:
    view = make_view(stages=(Stage.DORMANT, Stage.PROBATIONARY, Stage.FOSSILIZED))
    seen = observe(view, BLENDS)
    column = next(i for i, f in enumerate(features.SLOT_FEATURES) if f.name == "counterfactual")
    assert np.isnan(seen.slots[0, column]) and np.isfinite(seen.slots[1:, column]).all()

    normaliser = Normaliser(features.SLOT_FEATURES)
    out = normaliser(torch.from_numpy(seen.slots))
    assert out.isfinite().all()
    bit = len(features.SLOT_FEATURES) + normaliser.masked.tolist().index(column)
    assert out[:, bit].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("transform", list(features.Transform))
@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_a_feature_is_finite_or_unknown(transform: features.Transform, value: float) -> None:
    answer = transform.apply(value)
    assert not np.isinf(answer)  # what is unknown is not a number


def test_flags_are_never_unknown() -> None:
    for seed in range(20):
        view = make_view(seed, slots=4)
        for slot in view.slots:
            row = features.read_features(features.SLOT_FEATURES, slot, view)
            for feature, value in zip(features.SLOT_FEATURES, row, strict=True):
                assert feature.transform is not features.FLAG or value in (0.0, 1.0)


def test_names_of_blueprints_do_not_reach_the_arrays() -> None:
    view = make_view(stages=(Stage.DORMANT,) * 3)
    others = [tuple(attrs.evolve(b, name=f"other-{b.name}") for b in s.blueprints) for s in view.slots]
    slots = tuple(attrs.evolve(s, blueprints=b) for s, b in zip(view.slots, others, strict=True))
    renamed = attrs.evolve(view, slots=slots)
    ours, theirs = observe(view, BLENDS), observe(renamed, BLENDS)
    assert np.array_equal(ours.blueprints, theirs.blueprints, equal_nan=True)
    assert np.array_equal(ours.slots, theirs.slots, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), slots=st.integers(1, 6))
def test_the_mask_is_the_views_own(seed: int, slots: int) -> None:
    view = make_view(seed, slots)
    seen = observe(view, BLENDS)
    for i, slot in enumerate(view.slots):
        for j, op in enumerate(OPS):
            expected = op in slot.legal and op is not Op.WAIT and (op is not Op.GERMINATE or bool(slot.blueprints))
            assert seen.legal[i, j] == expected


def test_padding_is_never_legal_nor_present() -> None:
    batch = collate([observe(make_view(1, 2), BLENDS), observe(make_view(2, 5), BLENDS)])
    assert batch.slots.shape[:2] == (2, 5)
    assert batch.present[0].tolist() == [True, True, False, False, False]
    assert not batch.legal[0, 2:].any() and not batch.grows[0, 2:].any()


def test_the_normaliser_agrees_with_the_whole_sample() -> None:
    table = [f for f in features.GLOBAL_FEATURES if f.transform.normalised][:2]
    normaliser = Normaliser(table)
    sample = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 3 + 7
    sample[::5, 1] = float("nan")
    for chunk in sample.split(33):
        normaliser.update(chunk)
    known = sample[~sample[:, 1].isnan(), 1]
    assert normaliser.mean[1].item() == pytest.approx(known.mean().item(), rel=1e-5)
    assert (normaliser.square / normaliser.count)[1].sqrt().item() == pytest.approx(
        known.std(correction=0).item(), rel=1e-5
    )
    assert normaliser(sample)[:, 0].std().item() == pytest.approx(1.0, abs=0.02)
