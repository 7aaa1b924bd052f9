"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) on whole episodes, in one file.

An episode is one environment's run; the core's memory starts empty at its first decision and is recomputed over all
of it, so that rollout and update see the same network. Shapes: T decisions, K commands a decision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper_core.kasmina.ranks import ALONE, Ranks
from esper_core.simic.learning.sharing import shared
from esper_core.tamiyo.core import Decision, TamiyoCore
from esper_core.tamiyo.observation import FIELDS, Normaliser, Observation, ObservationBatch, collate

_AT_ONCE: Final = 32
"""Episodes that the normalisers take in at once."""
_MOST: Final = 4.0
"""Bound on rescaled advantages."""


@attrs.frozen
class PPOConfig:
    """What PPO is told. Every field is used as the paper uses it unless said otherwise."""

    learning_rate: float = 3e-4
    discount: float = 1.0  # episodes are short and end: what growth earns late counts fully
    gae_lambda: float = 0.95  # Schulman et al. 2015, arXiv:1506.02438
    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weights: tuple[float, ...] = (0.01, 0.01, 0.01, 0.005, 0.005)  # a head each, in the order of FIELDS
    epochs: int = 3
    minibatch: int = 8  # episodes
    gradient_norm: float = 0.5  # bound on each environment's own gradient
    target_kl: float = 0.03  # stop before a step that starts from a policy further away than this
    reward_scale: float = 1.0
    group_baseline: bool = False  # subtract what the other environments of the group got at the same decision
    group_scale: float = 0.0  # nats; divide a group's advantages by this plus their own spread; 0: one scale for all
    anchor: float = 0.0  # weight of the log-probability of what an advised core is proposed: it departs where that pays
    together: bool = False  # score a minibatch as one and bound its gradient as a whole: what a GPU is fast at
    final_rate: float = 1.0  # learning rate of the last iteration over that of the first; linear between


@attrs.frozen
class Episode:
    """What one environment saw, did and got.

    Attributes:
        observations: T of them. actions: (T, K, 5). log_prob, values, rewards: (T,).
        group: episodes of one group share host, init and batches.
    """

    observations: Sequence[Observation]
    actions: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    values: NDArray[np.float32]
    rewards: NDArray[np.float32]
    group: int = 0

    @property
    def total(self) -> float:
        """The return: the sum of rewards."""
        return float(self.rewards.sum())


class Policy(Protocol):
    """What PPO needs of a policy; `CorePolicy` is the one that Simic trains."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the optimizer moves."""

    def score(self, episode: Episode) -> Decision:
        """Log-probabilities, entropies and values (T,) of what was done in `episode`, with gradients."""


class CorePolicy:
    """A Tamiyo core over whole episodes: the slots of all decisions at once, then the memory through time.

    `anchored`: scores tell, too, how likely it is that the core does what it was proposed.
    """

    def __init__(self, core: TamiyoCore, *, anchored: bool = False) -> None:
        self.core, self.anchored = core, anchored

    def parameters(self) -> list[nn.Parameter]:
        """The core's own, or those of its active adapters when the core is frozen."""
        modules: list[nn.Module] = [self.core, *self.core.adapters.values()]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def score(self, episode: Episode) -> Decision:
        """See `Policy.score`."""
        return self.score_all([episode])

    def score_all(self, episodes: Sequence[Episode]) -> Decision:
        """The same (E·T,) of E episodes of T decisions each, one after the other."""
        device = next(iter(self.core.parameters())).device
        batch = collate([seen for episode in episodes for seen in episode.observations]).to(device)
        tokens, summary = self.core.perceive(batch)
        hidden, memories = self.core.initial(len(episodes)), []
        for now in summary.view(len(episodes), -1, summary.shape[-1]).unbind(1):  # (E, D)
            hidden = self.core.memory(now, hidden)
            memories.append(hidden)
        actions = torch.from_numpy(np.concatenate([episode.actions for episode in episodes])).to(device)
        memory = torch.stack(memories, 1).flatten(0, 1)
        decision = self.core.answer(batch, tokens, memory, actions=actions)
        if not self.anchored:
            return decision
        return attrs.evolve(decision, agreement=self.core.agreement(batch, tokens, memory))


def advantages(rewards: NDArray[Any], values: NDArray[Any], discount: float, gae_lambda: float) -> NDArray[np.float32]:
    """Generalised advantage estimates (T,) of an episode that ends after its last reward (equation 16)."""
    out = np.zeros(len(rewards), np.float32)
    following, running = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        error = rewards[t] + discount * following - values[t]
        running = error + discount * gae_lambda * running
        out[t], following = running, values[t]
    return out


def relative(estimates: Sequence[NDArray[np.float32]], groups: Sequence[int]) -> list[NDArray[np.float32]]:
    """Advantages less the mean of the group's others at the same decision (Kool, van Hoof & Welling 2019).

    The others' actions are drawn apart from one's own, so nothing is biased; and what they share, which is how much
    growing is worth on their host at all, no longer drowns what sets them apart. A decision that nobody else lived to
    see keeps its estimate.
    """
    out = []
    for k, own in enumerate(estimates):
        others = [e for j, e in enumerate(estimates) if j != k and groups[j] == groups[k]]
        mean = [
            float(np.mean(values)) if (values := [o[t] for o in others if t < len(o)]) else 0.0 for t in range(len(own))
        ]
        out.append(own - np.array(mean, np.float32))
    return out


def rescaled(
    estimates: Sequence[NDArray[np.float32]], groups: Sequence[int], floor: float
) -> list[NDArray[np.float32]]:
    """Advantages over the third quartile of their size in their group plus `floor`, within ±`_MOST`.

    Groups live in worlds of very different returns. With one scale for all, the one that gains most is most of the
    gradient, and what a policy loses where nothing should grow is too little to be seen. Differences well below the
    floor are taken for noise and stay small. A quartile and a bound, since one environment that dies by a dangerous
    seed loses a hundred times what sets the others of its group apart.
    """
    sizes: dict[int, list[float]] = {}
    for estimate, group in zip(estimates, groups, strict=True):
        sizes.setdefault(group, []).extend(np.abs(estimate))
    spread = {group: float(np.quantile(values, 0.75)) if values else 0.0 for group, values in sizes.items()}
    return [
        np.clip(e / (spread[g] + floor), -_MOST, _MOST).astype(np.float32)
        for e, g in zip(estimates, groups, strict=True)
    ]


def surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped objective to be maximised (equation 7), elementwise."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


Share = tuple[list[Tensor | None] | None, dict[str, float]]
"""What comes of a part of a minibatch: the gradient of each parameter (None: there is none), and figures to add up."""


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    config: PPOConfig,
    generator: torch.Generator,
    *,
    ranks: Ranks = ALONE,
    pieces: int = 1,
) -> dict[str, float]:
    """Improve `policy` on `episodes`; returns means over the minibatches that were stepped.

    Entropies are reported by head over the decisions in which the head had a choice, so that a collapse is seen.

    Args:
        ranks: the processes that share out each minibatch; all have the same policy and episodes, before and after.
        pieces: into which a minibatch that is scored together is split; without `together` an episode is a piece.
    """
    estimates = [advantages(e.rewards * config.reward_scale, e.values, config.discount, config.gae_lambda)
                 for e in episodes]  # fmt: skip
    groups = [e.group for e in episodes]
    merits = relative(estimates, groups) if config.group_baseline else estimates
    if config.group_scale > 0:
        merits = rescaled(merits, groups, config.group_scale * config.reward_scale)
    flat = np.concatenate(merits)
    shift, scale = float(flat.mean()), float(flat.std()) + 1e-6
    seen: dict[str, list[float]] = {}
    steps, stopped, worst = 0, False, 0.0
    for _ in range(config.epochs):
        order = torch.randperm(len(episodes), generator=generator).tolist()
        for start in range(0, len(order), config.minibatch):
            chosen = order[start : start + config.minibatch]
            told = ([episodes[i] for i in chosen], [(merits[i] - shift) / scale for i in chosen],
                    [estimates[i] for i in chosen], config)  # fmt: skip
            if config.together and isinstance(policy, CorePolicy):
                total, kl, notes = _together(policy, *told, ranks, pieces)
            else:
                total, kl, notes = _minibatch(policy, *told, ranks)
            worst = max(worst, kl)
            if kl > config.target_kl:
                stopped = True  # the gradient is thrown away: no step from a policy that has moved too far
                break
            for parameter, gradient in zip(policy.parameters(), total, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
            for name, value in notes.items():
                seen.setdefault(name, []).append(value)
        if stopped:
            break
    means = {name: sum(values) / len(values) for name, values in seen.items()}
    return {**means, "steps": float(steps), "kl_stop": float(stopped), "kl_worst": worst}


def split(items: Sequence[int], pieces: int) -> list[list[int]]:
    """`items` in that many runs of about one length; fewer where there are fewer items."""
    bounds = [number * len(items) // pieces for number in range(pieces + 1)]
    return [list(items[a:b]) for a, b in pairwise(bounds) if b > a]


def _minibatch(
    policy: Policy,
    episodes: Sequence[Episode],
    scaled: Sequence[NDArray[np.float32]],
    raw: Sequence[NDArray[np.float32]],
    config: PPOConfig,
    ranks: Ranks = ALONE,
) -> tuple[list[Tensor], float, dict[str, float]]:
    """Summed gradient with every environment's share clipped on its own, mean KL, and what to report."""
    parameters = list(policy.parameters())
    decisions = sum(len(e.rewards) for e in episodes)

    def share_of(i: int) -> Share:
        episode = episodes[i]
        decision = policy.score(episode)
        losses = _losses(decision, episode.log_prob, scaled[i], raw[i] + episode.values, config)
        loss = losses.policy + config.value_weight * losses.value - losses.bonus
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        if not torch.isfinite(norm):
            return None, {"dropped": 1.0}  # one environment's NaN must not reach the others
        factor = (config.gradient_norm / (norm + 1e-8)).clamp(max=1.0) / len(episodes)
        figures = _figures(losses, decision, config, decisions)
        for name in _MEANS:
            figures[name] /= len(episodes)
        return [None if g is None else g * factor for g in gradients], figures

    sizes = [len(e.rewards) for e in episodes]
    total, sums = _sum(shared(ranks, sizes, lambda mine: map(share_of, mine), parameters[0].device), parameters)
    return total, sums.get("kl", 0.0), _notes(sums, sums.get("dropped", 0.0))


def _sum(shares: Iterable[Share], parameters: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, float]]:
    """The sums of gradients and figures, in order."""
    total, sums = [torch.zeros_like(p) for p in parameters], dict[str, float]()
    for gradients, figures in shares:
        for sum_of, gradient in zip(total, gradients or (), strict=gradients is not None):
            if gradient is not None:
                sum_of.add_(gradient)
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value
    return total, sums


def _notes(sums: Mapping[str, float], dropped: float) -> dict[str, float]:
    """What is reported of a minibatch."""
    heads = {
        f"entropy_{head}": sums[f"spread_{head}"] / sums[f"asked_{head}"]
        for head in FIELDS
        if sums.get(f"asked_{head}")
    }
    return {**{name: sums.get(name, 0.0) for name in _MEANS}, "dropped": dropped, "kl": sums.get("kl", 0.0), **heads}


@attrs.frozen
class _Losses:
    """Of some decisions: their ratio and its logarithm (T,), and the terms of the loss, 0-dim.

    `bonus` is for entropy, and for agreement with what was proposed.
    """

    ratio: Tensor
    log_ratio: Tensor
    policy: Tensor
    value: Tensor
    bonus: Tensor


def _losses(
    decision: Decision, log_prob: NDArray[Any], advantage: NDArray[Any], target: NDArray[Any], config: PPOConfig
) -> _Losses:
    old, better, aim = (
        torch.from_numpy(np.asarray(v, np.float32)).to(decision.value.device) for v in (log_prob, advantage, target)
    )
    log_ratio = decision.log_prob - old
    ratio = log_ratio.exp()
    bonus = torch.stack([
        weight * decision.entropy[head].sum() / decision.asked[head].sum().clamp(min=1)
        for head, weight in zip(FIELDS, config.entropy_weights, strict=True)
    ]).sum()  # fmt: skip
    if decision.agreement is not None:
        bonus = bonus + config.anchor * decision.agreement.mean()
    policy_loss = -surrogate(ratio, better, config.clip).mean()
    return _Losses(ratio, log_ratio, policy_loss, (decision.value - aim).square().mean(), bonus)


_MEANS: Final = ("policy_loss", "value_loss", "clipped", "agreement")


@torch.no_grad()
def _figures(losses: _Losses, decision: Decision, config: PPOConfig, decisions: int) -> dict[str, float]:
    """Of some of the `decisions` of a minibatch: their part of its KL, means over them, and sums over each head."""
    names = ["kl", *_MEANS, *(f"spread_{head}" for head in FIELDS), *(f"asked_{head}" for head in FIELDS)]
    values = torch.stack([
        # Schulman's k3 estimate of KL(old, new): unbiased and never negative
        (losses.ratio - 1 - losses.log_ratio).sum(), losses.policy, losses.value,
        ((losses.ratio - 1).abs() > config.clip).float().mean(),
        losses.ratio.new_zeros(()) if decision.agreement is None else decision.agreement.mean(),
        *(decision.entropy[head].sum() for head in FIELDS), *(decision.asked[head].sum() for head in FIELDS),
    ]).tolist()  # fmt: skip
    found = dict(zip(names, values, strict=True))
    found["kl"] /= decisions
    return found


def _together(
    policy: CorePolicy,
    episodes: Sequence[Episode],
    scaled: Sequence[NDArray[np.float32]],
    raw: Sequence[NDArray[np.float32]],
    config: PPOConfig,
    ranks: Ranks = ALONE,
    pieces: int = 1,
) -> tuple[list[Tensor], float, dict[str, float]]:
    """As `_minibatch`, in one pass for a piece's episodes of one length, with one bound on the gradient of all.

    Episodes that are not finite are left out beforehand, since they would spoil the gradient of the whole batch.
    """
    parameters = list(policy.parameters())
    fine = [i for i, e in enumerate(episodes) if all(np.isfinite(v).all() for v in (e.log_prob, scaled[i], raw[i]))]
    decisions, parts = sum(len(e.rewards) for e in episodes), split(fine, pieces)

    def share_of(number: int) -> Share:
        some = of_one_length(episodes, parts[number])
        gradients, figures = _sum((share_of_lot(lot) for lot in some), parameters)
        return list(gradients), figures

    def share_of_lot(some: list[int]) -> Share:
        decision, share = policy.score_all([episodes[i] for i in some]), len(some) / len(episodes)
        losses = _losses(
            decision, np.concatenate([episodes[i].log_prob for i in some]), np.concatenate([scaled[i] for i in some]),
            np.concatenate([raw[i] + episodes[i].values for i in some]), config,
        )  # fmt: skip
        loss = losses.policy + config.value_weight * losses.value - losses.bonus
        gradients = torch.autograd.grad(loss * share, parameters, allow_unused=True)
        figures = _figures(losses, decision, config, decisions)
        for name in _MEANS:
            figures[name] *= share
        return list(gradients), figures

    sizes = [sum(len(episodes[i].rewards) for i in part) for part in parts]
    total, sums = _sum(shared(ranks, sizes, lambda mine: map(share_of, mine), parameters[0].device), parameters)
    factor = (config.gradient_norm / (torch.stack([g.norm() for g in total]).norm() + 1e-8)).clamp(max=1.0)
    return [g * factor for g in total], sums.get("kl", 0.0), _notes(sums, float(len(episodes) - len(fine)))


def of_one_length(episodes: Sequence[Episode], chosen: Sequence[int]) -> list[list[int]]:
    """The numbers of `chosen` episodes, in lots of as many decisions."""
    lengths: dict[int, list[int]] = {}
    for i in chosen:
        lengths.setdefault(len(episodes[i].rewards), []).append(i)
    return list(lengths.values())


def update_normalisers(core: TamiyoCore, episodes: Sequence[Episode]) -> None:
    """Take what was seen into the running normalisers: after the policy's update, never between rollout and update."""
    device = next(core.parameters()).device
    for start in range(0, len(episodes), _AT_ONCE):
        seen = [one for episode in episodes[start : start + _AT_ONCE] for one in episode.observations]
        batch: ObservationBatch = collate(seen).to(device)
        rows = {
            "run": batch.run,
            "slots": batch.slots[batch.present],
            "blueprints": batch.blueprints[batch.grows],
            "blends": batch.blends[batch.blend_present],
        }
        for kind, normaliser in core.normalisers.items():
            assert isinstance(normaliser, Normaliser)
            normaliser.update(rows[kind])
