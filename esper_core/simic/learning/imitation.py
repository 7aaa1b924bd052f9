"""A warm start from demonstrations: the core first learns to say what a teacher did, weighted by how well it paid.

Advantage-weighted regression (Peng et al. 2019, arXiv:1910.00177) on whole episodes. Teachers of one group share host,
initial weights and batches, so that who did better is a paired comparison. An agent's lineage tells that it had one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from esper_core.kasmina.ranks import ALONE, Ranks
from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.stages import Op
from esper_core.simic.learning.ppo import CorePolicy, Episode, Policy, of_one_length, split
from esper_core.simic.learning.sharing import shared
from esper_core.tamiyo.observation import FIELDS, WAIT_INDEX, Observation


@attrs.frozen
class ImitationConfig:
    """How the core is taught before PPO.

    Attributes:
        iterations: of demonstrations; 0 for none. teacher: reference of the controller that demonstrates.
        variants: options of the teacher; environments of a group take them in turn, the plain teacher first. One that
            has a `teacher` of its own is of that controller.
        epochs: passes over one iteration's demonstrations. learning_rate: peak rate of these passes.
        sharpness: how much more the better of a group count: weight exp(sharpness * standardised return).
        value_weight: of the value's squared error. minibatch: episodes in a step.
        entropy_weights: a head each, in the order of FIELDS. A teacher that never errs would leave a core that never
            tries: with weight 0.5 about a tenth of a head's choices stay open for PPO to learn from.
        together: score the episodes of a minibatch that are of one length in one pass: what a GPU is fast at.
    """

    iterations: int = 0
    teacher: str = "heuristic"
    variants: Sequence[Mapping[str, Any]] = ({},)
    epochs: int = 2
    learning_rate: float = 1e-3
    sharpness: float = 1.0
    value_weight: float = 0.5
    minibatch: int = 8
    entropy_weights: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)
    together: bool = False

    def demonstrator(self, k: int) -> tuple[str, Mapping[str, Any]]:
        """Reference and options of the controller that demonstrates in the k-th environment of a group."""
        options = dict(self.variants[k % len(self.variants)])
        return str(options.pop("teacher", self.teacher)), options


class Scribe:
    """Writes one environment's commands as the rows that the core's heads would have to choose.

    The heads name blend and tempo when a seed begins to blend; a teacher may have named them at its birth, so they are
    remembered until then.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._born: dict[str, Command] = {}

    def write(self, commands: Sequence[Command], seen: Observation) -> NDArray[np.int64]:
        """(most, 5) rows in the order of `commands`; what the heads cannot say or what is beyond `most` is left out."""
        rows = np.zeros((self.most, len(FIELDS)), np.int64)
        rows[:, 0] = WAIT_INDEX
        taken: set[str] = set()
        for command in commands:
            row = None if command.slot in taken or len(taken) == self.most else self._row(command, seen)
            if row is not None:
                rows[len(taken)] = row
                taken.add(command.slot)
        return rows

    def _row(self, command: Command, seen: Observation) -> tuple[int, ...] | None:
        if command.op is Op.GERMINATE and seen.row(command) is not None:
            self._born[command.slot] = command
        born = self._born.get(command.slot, command)
        tempo = born.tempo if command.tempo is Tempo.STANDARD else command.tempo
        return seen.row(attrs.evolve(command, blend=command.blend or born.blend, tempo=tempo))


def demonstration_weights(episodes: Sequence[Episode], sharpness: float) -> list[float]:
    """One weight an episode, with mean 1 over all: by its return among those of its group."""
    raw = []
    for episode in episodes:
        returns = [other.total for other in episodes if other.group == episode.group]
        deviation = float(np.std(returns))
        standing = (episode.total - float(np.mean(returns))) / deviation if deviation > 1e-9 else 0.0
        raw.append(math.exp(min(sharpness * standing, 3.0)))
    mean = sum(raw) / max(len(raw), 1)
    return [weight / mean for weight in raw]


def imitate(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    config: ImitationConfig,
    generator: torch.Generator,
    *,
    reward_scale: float = 1.0,
    ranks: Ranks = ALONE,
    pieces: int = 1,
) -> dict[str, float]:
    """Raise the likelihood of what was demonstrated; returns means over all minibatches.

    Args:
        ranks, pieces: see `ppo.update`.
    """
    weights = demonstration_weights(episodes, config.sharpness)
    sums = {"log_likelihood": 0.0, "value_loss": 0.0}
    parameters, steps, norm_sum = list(policy.parameters()), 0, 0.0
    for _ in range(config.epochs):
        order = torch.randperm(len(episodes), generator=generator).tolist()
        for start in range(0, len(order), config.minibatch):
            chosen = order[start : start + config.minibatch]
            as_one = config.together and isinstance(policy, CorePolicy)
            parts = split(chosen, pieces) if as_one else [[i] for i in chosen]
            do = partial(_taught, policy, parameters, episodes, weights, config, reward_scale, parts, len(chosen))
            sizes = [sum(len(episodes[i].rewards) for i in part) for part in parts]
            optimizer.zero_grad(set_to_none=True)
            for gradients, figures in shared(ranks, sizes, partial(map, do), parameters[0].device):
                _add_to_gradients(parameters, gradients)
                for name, value in figures.items():
                    sums[name] += value
            norm_sum += float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            optimizer.step()
            steps += 1
    optimizer.zero_grad(set_to_none=True)
    count = max(config.epochs * len(episodes), 1)
    return {**{name: value / count for name, value in sums.items()},
            "gradient_norm": norm_sum / max(steps, 1), "steps": float(steps)}  # fmt: skip


def _taught(
    policy: Policy, parameters: Sequence[torch.Tensor], episodes: Sequence[Episode], weights: Sequence[float],
    config: ImitationConfig, reward_scale: float, parts: Sequence[list[int]], whole: int, number: int,
) -> tuple[list[torch.Tensor | None], dict[str, float]]:  # fmt: skip
    """The gradients of one part of a minibatch of `whole` episodes, and sums of its figures."""
    total: list[torch.Tensor | None] = [None] * len(parameters)
    likelihood = value_error = 0.0
    for lot in of_one_length(episodes, parts[number]):
        some = [episodes[i] for i in lot]
        decision = policy.score_all(some) if isinstance(policy, CorePolicy) else policy.score(some[0])
        device = decision.value.device
        to_go = np.concatenate([np.cumsum(e.rewards[::-1])[::-1] * reward_scale for e in some])
        error = (decision.value - torch.from_numpy(to_go).to(device)).square().mean()
        bonus = sum(
            weight * decision.entropy[head].mean() for head, weight in zip(FIELDS, config.entropy_weights, strict=True)
        )
        told = decision.log_prob.view(len(lot), -1).mean(1)  # (E,)
        worth = torch.tensor([weights[i] for i in lot], device=device)
        loss = (config.value_weight * error - (worth * told).mean() - bonus) * (len(lot) / whole)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        total = [a if b is None else b if a is None else a + b for a, b in zip(total, gradients, strict=True)]
        likelihood += float(told.detach().sum())
        value_error += float(error.detach()) * len(lot)
    return total, {"log_likelihood": likelihood, "value_loss": value_error}


def _add_to_gradients(parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
