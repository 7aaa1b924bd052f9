"""Trainers of other libraries grow the same model in several processes as in one, or are refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import call

pytestmark = pytest.mark.slow
HUGGING, LIGHTNING = "tests.distributed.trainers:hugging_face", "tests.distributed.trainers:lightning"


def alike(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Two processes hold the same bits, and what one process holds to rounding; events come from the first."""
    first, second = found
    assert first["digest"] == second["digest"]
    assert one["seeds"] > 0 and first["seeds"] == one["seeds"] and first["told"] == one["told"]
    assert not second["told"]
    for name in ("validation", "trained"):
        assert len(first[name]) == len(one[name]) >= 8
        assert max(abs(a - b) for a, b in zip(first[name], one[name], strict=True)) < 1e-5
    assert first["weights"].keys() == one["weights"].keys()
    for name, values in one["weights"].items():
        assert max((abs(a - b) for a, b in zip(first["weights"][name], values, strict=True)), default=0.0) < 1e-5
    assert first["flops"] == pytest.approx(one["flops"])


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_transformers_trainer(tmp_path: Path, accumulate: int) -> None:
    (one,) = call(1, HUGGING, str(tmp_path), accumulate)
    alike(call(2, HUGGING, str(tmp_path), accumulate), one)
    if accumulate == 2:  # and from a checkpoint of its own
        alike(call(2, HUGGING, str(tmp_path), accumulate, 7), one)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_what_transformers_trainer_cannot_grow_is_refused(tmp_path: Path) -> None:
    for found in call(2, HUGGING, str(tmp_path), 1, 0, True):
        assert "2 processes do not train with DistributedDataParallel" in found["failed"]
    for found in call(2, HUGGING, str(tmp_path), 1, 0, False, True):
        assert "different validation batches" in found["failed"]


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning_trainer(tmp_path: Path) -> None:
    (one,) = call(1, LIGHTNING, str(tmp_path))
    alike(call(2, LIGHTNING, str(tmp_path)), one)
    alike(call(2, LIGHTNING, str(tmp_path), "ddp", 8), one)  # at the end of an epoch, as Lightning resumes
