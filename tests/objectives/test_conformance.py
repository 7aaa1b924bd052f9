"""Every objective that ships keeps the invariants, and its figures are those of scikit-learn and torch."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, mean_absolute_error
from torch.nn import functional as F

from esper_core.leyline.errors import EsperError
from esper_core.registry import load_registry
from esper_core.testing.objective import ObjectiveConformance


def build(name: str, outputs: int = 5, **options: object):
    return load_registry().build("objective", name, outputs=outputs, options=options)


class Classes(ObjectiveConformance):
    """Objectives of one class at each position of `shape`."""

    shape: ClassVar[tuple[int, ...]] = ()
    last = True

    def cases(self, count, generator):
        outputs = torch.randn(count, *self.shape, self.outputs, generator=generator)
        targets = torch.randint(0, self.outputs, (count, *self.shape), generator=generator)
        return outputs if self.last else outputs.movedim(-1, 1), targets

    def perfect(self, targets):
        hot = 9.0 * F.one_hot(targets.clamp(min=0), self.outputs).float()
        return hot if self.last else hot.movedim(-1, 1).contiguous()

    def misfits(self):
        outputs, targets = self.made()
        return [(outputs, targets.float()), (outputs, targets + self.outputs), (outputs, targets[:2])]


class TestClassification(Classes):
    spec = "classification"


class TestSmoothed(Classes):
    spec = "classification"
    options: ClassVar = {"label_smoothing": 0.1}


class TestWeighted(Classes):
    spec = "classification"
    options: ClassVar = {"class_weights": "1,2,3,1,0.5"}


class TestDense(Classes):
    spec = "dense"
    shape = (4, 3)
    last = False


class TestPixelAccuracy(TestDense):
    options: ClassVar = {"metric": "accuracy", "class_weights": "1,2,3,1,0.5"}


class TestLanguage(Classes):
    spec = "language"
    shape = (7,)


class TestBitsPerByte(TestLanguage):
    options: ClassVar = {"metric": "bits-per-byte", "bytes_per_token": 3.5}


class TestMasked(TestLanguage):
    spec = "masked"

    def cases(self, count, generator):
        outputs, targets = super().cases(count, generator)
        hidden = torch.rand(targets.shape, generator=generator) < 0.5
        hidden[:, 0] = True
        return outputs, torch.where(hidden, targets, -100)


class TestCausal(TestLanguage):
    spec = "causal"

    def perfect(self, targets):
        return super().perfect(targets.roll(-1, 1))


class TestRegression(ObjectiveConformance):
    spec = "regression"

    def cases(self, count, generator):
        return torch.randn(count, 5, generator=generator), torch.randn(count, 5, generator=generator)

    def perfect(self, targets):
        return targets.clone()

    def misfits(self):
        outputs, targets = self.made()
        return [(outputs, targets[:, :2]), (outputs, targets[:, 0]), (outputs, targets.long())]


class TestHuber(TestRegression):
    options: ClassVar = {"loss": "huber", "metric": "mse", "delta": 0.5}


class TestMultilabel(ObjectiveConformance):
    spec = "multilabel"

    def cases(self, count, generator):
        outputs = torch.randn(count, 5, generator=generator)
        return outputs, torch.randint(0, 2, (count, 5), generator=generator).float()

    def perfect(self, targets):
        return 18.0 * targets - 9.0

    def misfits(self):
        outputs, targets = self.made()
        return [(outputs, 2 * targets), (outputs, targets[:, 0])]


class TestExactMatch(TestMultilabel):
    options: ClassVar = {"metric": "exact-match"}


class TestLabelAccuracy(TestMultilabel):
    options: ClassVar = {"metric": "accuracy"}


def test_every_objective_that_ships_is_tested_here() -> None:
    here = {c.spec for c in globals().values() if isinstance(c, type) and hasattr(c, "spec")}
    assert here == {part.name for part in load_registry().specs("objective") if part.distribution == "esper-core"}


def test_f1_is_that_of_scikit_learn() -> None:
    outputs, targets = TestMultilabel().made(50)
    expected = f1_score(targets.numpy(), (outputs > 0).numpy(), average="samples", zero_division=1.0)
    assert float(build("multilabel").scores(outputs, targets)[1].mean()) == pytest.approx(expected)


def test_mean_iou_is_that_of_scikit_learn_over_the_classes_that_occur() -> None:
    outputs, targets = TestDense().made(20)
    targets[:, 0, 0] = -100
    found = build("dense").scores(outputs, targets)[1]
    for value, true, guess in zip(found, targets.flatten(1), outputs.argmax(1).flatten(1), strict=True):
        kept = true != -100
        labels = np.union1d(true[kept].numpy(), guess[kept].numpy())
        expected = jaccard_score(true[kept].numpy(), guess[kept].numpy(), labels=labels, average="macro")
        assert float(value) == pytest.approx(expected)


def test_mean_absolute_error_is_that_of_scikit_learn_for_columns_and_rows() -> None:
    outputs, targets = torch.randn(9, 1), torch.randn(9)
    losses, errors = build("regression").scores(outputs, targets)
    assert float(errors.mean()) == pytest.approx(mean_absolute_error(targets, outputs[:, 0]))
    assert float(losses.mean()) == pytest.approx(float(F.mse_loss(outputs[:, 0], targets)))


def test_causal_shifts_what_language_takes_shifted() -> None:
    outputs, tokens = TestLanguage().made()
    shifted = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    assert torch.equal(build("causal").loss(outputs, tokens), build("language").loss(outputs, shifted))
    bits = build("causal", metric="bits-per-byte", bytes_per_token=2.0).scores(outputs, tokens)
    assert torch.allclose(bits[1], bits[0] / math.log(2) / 2)


@pytest.mark.parametrize("weights", ["1,2", "a,b,c,d,e", "1,1,1,1,-1", "0,0,0,0,0", "1,1,1,1,nan"])
def test_class_weights_that_cannot_be_meant_are_refused(weights: str) -> None:
    with pytest.raises(EsperError, match="class_weights"):
        build("classification", class_weights=weights)
