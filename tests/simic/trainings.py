"""Trainings that the tests start in one process and in several."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import attrs
import torch

from esper_core.kasmina.ranks import ALONE, Ranks
from esper_core.leyline.errors import EsperError
from esper_core.simic.gym.cpu_engine import Inline
from esper_core.simic.learning.training import Manifest, Training
from esper_core.tolaria.processes import join_to_play, leave

from .tiny import TOML

TOGETHER = (
    TOML.replace("[imitation]", "[imitation]\ntogether = true\nminibatch = 3")
    .replace("groups = 2", "groups = 3").replace('"digits"', '"synthetic:texture"')
)  # fmt: skip
"""Demonstrations in minibatches of three that are scored together, and PPO in minibatches of single episodes."""

MANIFEST = Manifest(curriculum="tiny", text=TOGETHER, seed=3, pieces=4, iterations=3)


def train(
    folder: str, upto: int = 0, base: str = "", told: Mapping[str, Any] = {}, **more: Any
) -> dict[str, Any]:  # fmt: skip
    """What a training comes to; `upto`: iterations after which it is left."""
    manifest = attrs.evolve(MANIFEST, **told, **more)
    return _finished(lambda ranks: Training.start(folder, manifest, base or None, ranks=ranks), upto)


def resume(folder: str) -> dict[str, Any]:
    """The same of one that goes on."""
    return _finished(lambda ranks: Training.resume(folder, ranks=ranks))


def differ(folder: str, what: str) -> dict[str, Any]:
    """A training whose second process comes to other weights by rounding, or by learning something else."""
    keep = Training._agree

    def apart(self: Training) -> None:
        if self.ranks.rank == 1 and self.done == 1:
            with torch.no_grad():
                weight = self.core.op_head.weight
                weight.mul_(1 + 2**-23 if what == "rounding" else 1.5)
        keep(self)

    Training._agree = apart  # type: ignore[method-assign]
    return train(folder)


def fall(folder: str) -> dict[str, Any]:
    """A training whose second process cannot play."""
    run = Inline.run

    def broken(self: Inline, jobs: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise ZeroDivisionError("out of order")
        return run(self, jobs)

    Inline.run = broken  # type: ignore[method-assign]
    return train(folder)


class _Enough(Exception):
    """As many iterations as were asked for."""


def _finished(begin: Callable[[Ranks], Training], upto: int = 0) -> dict[str, Any]:
    several = "RANK" in os.environ
    ranks = join_to_play("the test again") if several else ALONE
    played, run = [0], Inline.run

    def counted(self: Inline, jobs: Any) -> Any:
        played[0] += len(jobs)
        return run(self, jobs)

    Inline.run = counted  # type: ignore[method-assign]
    try:
        training = begin(ranks)
        begun = training.done

        def stop(record: Mapping[str, Any]) -> None:
            if upto and training.done >= upto:
                raise _Enough

        with suppress(_Enough):
            training.run(1, stop)
    except (EsperError, ZeroDivisionError) as error:
        return {"failed": str(error)}
    finally:
        Inline.run = run  # type: ignore[method-assign]
        if several:
            leave()
    digest = hashlib.sha256()
    for _, tensor in sorted(training._tensors().items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    records = [{key: value for key, value in one.items() if key != "seconds"} for one in training.records]
    return {
        "core": training.core.fingerprint, "moments": digest.hexdigest(), "records": records, "played": played[0],
        "begun": begun, "notices": sorted(training.notices), "product": str(training.product),
    }  # fmt: skip
