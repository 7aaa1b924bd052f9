"""P5's arms beside those of `esper run --compare`, each at the FLOPs of the grown run of the same seed.

- *one-shot stacking*: train a shallow GPT, put every block behind itself once more, train on;
- *deeper GPT*: the model of twice as many blocks from scratch, which a user without Esper would take;
- *static@FLOPs, own rate*: the grown run's final architecture at the learning rate that suits it best;
- *host@FLOPs*: the host alone, trained for longer on more data.

Source of stacking: Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019: the upper half of
the deeper model begins as a copy of the lower half; the optimizer's moments begin anew with it. All arms see the same
batches in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from esper_core.registry import load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.setup import set_up
from esper_core.tolaria.timetable import Timetable
from esper_core.trials.static import StaticSeed, batches_of, implant, read_split, step_flops, train_static, train_steps

LANGUAGE_ARMS: Final = ("one-shot stacking", "deeper GPT", "static@FLOPs, own rate", "host@FLOPs")
OWN_RATE: Final = 0.002
"""The best of 0.001, 0.002, 0.003 and 0.006 for that architecture, by validation on seeds outside the protocol."""
_BLOCK = re.compile(r"(\.h\.)(\d+)(\.)")


def stack_once(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of a model of twice as many blocks: block i of `layers` is also block `layers` + i."""
    deeper = dict(state)
    for name, weight in state.items():
        if found := _BLOCK.search(name):
            deeper[_BLOCK.sub(rf"\g<1>{int(found[2]) + layers}\g<3>", name)] = weight
    return deeper


def outcome_of(arm: str, config: RunConfig, grown: Mapping[str, Any]) -> dict[str, Any]:
    """What comes of one of `LANGUAGE_ARMS`, in the form of the other arms' outcomes.

    Args:
        config: of the grown run. grown: what came of it, with its `organs` and `flops`.
    """
    torch.set_num_threads(1)
    if arm == "static@FLOPs, own rate":
        organs = [StaticSeed(**organ) for organ in grown["organs"]]
        return train_fixed(attrs.evolve(config, learning_rate=OWN_RATE), organs, grown["flops"])
    if arm == "host@FLOPs":
        return train_fixed(config, (), grown["flops"])
    shallow_share = float(config.settings["heuristic.start"]) if arm == "one-shot stacking" else 0.0
    return train_stacked(config, grown["flops"], shallow_share)


def train_stacked(config: RunConfig, flops: float, share: float) -> dict[str, Any]:
    """The outcome of one-shot stacking, in the form of the other arms' outcomes.

    Args:
        config: of the grown run; its host, `transformers:gpt2`, is the shallow model.
        flops: to spend in all. share: of all steps that the shallow model takes; at 0 the deeper one is trained
            from scratch.
    """
    registry = load_registry()
    layers = int(config.settings["transformers.layers"])
    settings = {**config.settings, "transformers.layers": 2 * layers}
    shallow = set_up(config, registry)
    deep = set_up(attrs.evolve(config, settings=settings), registry)
    steps = round(flops / (share * step_flops(shallow) + (1 - share) * step_flops(deep)))
    first, timetable = round(share * steps), Timetable.of_steps(config, steps)
    if first:
        train_steps(shallow, batches_of(shallow), range(first), timetable)
        deep.plane.host.module.load_state_dict(stack_once(shallow.plane.host.module.state_dict(), layers))
    train_steps(deep, islice(batches_of(deep), first, None), range(first, steps), timetable)
    found = read_split(deep, "test")
    return {
        "seed": config.seed,
        "loss": found.loss,
        "accuracy": found.score,
        "params": deep.plane.host_params,
        "flops": first * step_flops(shallow) + (steps - first) * step_flops(deep),
        "steps": steps,
    }


def train_fixed(config: RunConfig, organs: Sequence[StaticSeed], flops: float) -> dict[str, Any]:
    """The host with `organs` in it from the first step, trained from scratch until `flops` are spent."""
    setup = set_up(config, load_registry())
    implant(setup.plane, organs)
    found = train_static(setup, round(flops / step_flops(setup)))
    return {
        "seed": config.seed,
        "loss": found.test_loss,
        "accuracy": found.test_score,
        "params": found.params,
        "flops": found.flops,
        "steps": found.steps,
    }
