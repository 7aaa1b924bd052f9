"""PPO against an independent reference, on its invariants, and on a problem whose answer is known."""

from __future__ import annotations

import math
import random

import attrs
import numpy as np
import pytest
import torch
from tamiyo.views import BLENDS, make_view
from torch import nn

from esper_core.leyline.stages import Stage
from esper_core.simic.learning import ppo
from esper_core.simic.learning.ppo import CorePolicy, Episode, PPOConfig
from esper_core.tamiyo.advice import Adviser
from esper_core.tamiyo.core import CoreConfig, Decision, TamiyoCore
from esper_core.tamiyo.observation import FIELDS, OPS, Observation, collate, observe


def reference_gae(rewards: list[float], values: list[float], discount: float, lam: float) -> list[float]:
    """The definition itself: a double sum over temporal-difference errors, no recursion."""
    length = len(rewards)
    errors = [rewards[t] + discount * (values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
    return [sum((discount * lam) ** (k - t) * errors[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.7, 0.0)])
def test_advantages_agree_with_the_definition(discount: float, lam: float) -> None:
    rng = random.Random(1)
    rewards, values = [rng.gauss(0, 1) for _ in range(17)], [rng.gauss(0, 1) for _ in range(17)]
    ours = ppo.advantages(np.array(rewards), np.array(values), discount, lam)
    assert ours.tolist() == pytest.approx(reference_gae(rewards, values, discount, lam), abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, 1.2), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8), (1.1, 2.0, 2.2)],
)
def test_the_surrogate_is_the_papers(ratio: float, advantage: float, expected: float) -> None:
    assert ppo.surrogate(torch.tensor(ratio), torch.tensor(advantage), 0.2).item() == pytest.approx(expected)


class Lookup(nn.Module):
    """A policy over two actions as a table of logits, whose gradients can be written down by hand."""

    def __init__(self, decisions: int) -> None:
        super().__init__()
        self.logits, self.value = nn.Parameter(torch.zeros(decisions, 2)), nn.Parameter(torch.zeros(decisions))

    def score(self, episode: Episode) -> Decision:
        log_probs = self.logits.log_softmax(-1)
        chosen = log_probs.gather(-1, torch.from_numpy(episode.actions[:, 0, :1])).squeeze(-1)
        entropy = {h: torch.zeros(len(chosen)) for h in FIELDS} | {"op": -(log_probs.exp() * log_probs).sum(-1)}
        asked = {h: torch.zeros(len(chosen)) for h in FIELDS} | {"op": torch.ones(len(chosen))}
        return Decision(torch.from_numpy(episode.actions), chosen, entropy, asked, self.value, torch.zeros(1, 1))


def lookup_episodes(count: int, length: int) -> list[Episode]:
    rng = np.random.default_rng(0)
    half = np.full(length, math.log(0.5), np.float32)
    return [
        Episode([None] * length, rng.integers(0, 2, (length, 1, 5)), half,  # type: ignore[list-item]
                np.zeros(length, np.float32), rng.normal(size=length).astype(np.float32))
        for _ in range(count)
    ]  # fmt: skip


def reference_steps(episodes: list[Episode], config: PPOConfig, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Plain numpy PPO on `Lookup` with stochastic gradient descent: gradients written out by hand."""
    length = len(episodes[0].rewards)
    logits, value = np.zeros((length, 2)), np.zeros(length)
    raw = [
        np.array(reference_gae(e.rewards.tolist(), e.values.tolist(), config.discount, config.gae_lambda))
        for e in episodes
    ]
    shift, scale = np.concatenate(raw).mean(), np.concatenate(raw).std() + 1e-6
    for _ in range(config.epochs):
        total_logits, total_value = np.zeros_like(logits), np.zeros_like(value)
        for episode, estimate in zip(episodes, raw, strict=True):
            advantage, action = (estimate - shift) / scale, episode.actions[:, 0, 0]
            probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            ratio = probs[np.arange(length), action] / np.exp(episode.log_prob)
            outside = ((ratio > 1 + config.clip) & (advantage > 0)) | ((ratio < 1 - config.clip) & (advantage < 0))
            push = np.where(outside, 0.0, ratio * advantage) / length
            score = np.eye(2)[action] - probs
            entropy = -(probs * np.log(probs)).sum(-1, keepdims=True)
            slope = -probs * (np.log(probs) + entropy) / length
            grad_logits = -push[:, None] * score - config.entropy_weights[0] * slope
            grad_value = config.value_weight * 2 * (value - estimate - episode.values) / length
            norm = math.sqrt((grad_logits**2).sum() + (grad_value**2).sum())
            factor = min(1.0, config.gradient_norm / (norm + 1e-8)) / len(episodes)
            total_logits += grad_logits * factor
            total_value += grad_value * factor
        logits, value = logits - rate * total_logits, value - rate * total_value
    return logits, value


def test_updates_agree_with_the_reference() -> None:
    episodes, rate = lookup_episodes(6, 5), 0.8
    config = PPOConfig(epochs=4, minibatch=6, target_kl=100.0, gradient_norm=0.3)
    policy = Lookup(5)
    notes = ppo.update(policy, torch.optim.SGD(policy.parameters(), rate), episodes, config, torch.Generator())
    logits, value = reference_steps(episodes, config, rate)
    assert notes["steps"] == 4
    assert policy.logits.detach().numpy() == pytest.approx(logits, abs=1e-5)
    assert policy.value.detach().numpy() == pytest.approx(value, abs=1e-5)


def test_it_stops_before_the_step_that_starts_too_far_away() -> None:
    episodes = lookup_episodes(4, 5)
    policy, config = Lookup(5), PPOConfig(epochs=50, minibatch=4, target_kl=0.02, gradient_norm=10.0)
    notes = ppo.update(policy, torch.optim.SGD(policy.parameters(), 5.0), episodes, config, torch.Generator())
    assert notes["kl_stop"] == 1.0 and 1 <= notes["steps"] < 50
    assert notes["kl"] <= 0.02 < notes["kl_worst"]  # no step was taken from beyond the bound


def test_one_environments_nan_stays_its_own() -> None:
    episodes = lookup_episodes(3, 5)
    policy, config = Lookup(5), PPOConfig(epochs=1, minibatch=3)
    poisoned = attrs.evolve(episodes[1], log_prob=np.full(5, np.nan, np.float32))
    notes = ppo.update(policy, torch.optim.SGD(policy.parameters(), 1.0), [episodes[0], poisoned, episodes[2]], config,
                       torch.Generator())  # fmt: skip
    assert notes["dropped"] == 1.0
    assert policy.logits.isfinite().all() and policy.logits.abs().sum() > 0


def test_no_environments_gradient_outweighs_its_bound() -> None:
    calm = lookup_episodes(1, 5)[0]
    wild = attrs.evolve(calm, rewards=calm.rewards * 1e6)
    policy, config = Lookup(5), PPOConfig(epochs=1, minibatch=2, gradient_norm=0.5)
    ppo.update(policy, torch.optim.SGD(policy.parameters(), 1.0), [calm, wild], config, torch.Generator())
    moved = torch.cat([policy.logits.flatten(), policy.value]).norm().item()
    assert moved <= 0.5 + 1e-4


# --- The core itself ---


def play(core: TamiyoCore, observations: list[Observation], generator: torch.Generator, reward) -> Episode:
    hidden, rows, logs, values, rewards = core.initial(1), [], [], [], []
    with torch.no_grad():
        for seen in observations:
            decision = core.decide(collate([seen]), hidden, generator=generator)
            hidden = decision.hidden
            rows.append(decision.actions[0].numpy())
            logs.append(decision.log_prob.item())
            values.append(decision.value.item())
            rewards.append(reward(seen, rows[-1]))
    return Episode(observations, np.stack(rows), *(np.array(x, np.float32) for x in (logs, values, rewards)))


def scenes(rng: random.Random, count: int) -> list[Observation]:
    return [observe(make_view(rng.randrange(10**6), rng.randrange(1, 5), t), BLENDS) for t in range(count)]


def test_rollout_and_update_see_the_same_policy() -> None:
    core, rng = TamiyoCore(seed=0), random.Random(0)
    generator = torch.Generator().manual_seed(0)
    episodes = [play(core, scenes(rng, 9), generator, lambda *_: rng.random()) for _ in range(4)]
    for episode in episodes:
        scored = CorePolicy(core).score(episode)
        assert scored.log_prob.detach().numpy() == pytest.approx(episode.log_prob, abs=2e-5)
        assert scored.value.detach().numpy() == pytest.approx(episode.values, abs=2e-5)
    config = PPOConfig(epochs=1, minibatch=4)
    notes = ppo.update(CorePolicy(core), torch.optim.Adam(core.parameters(), 1e-9), episodes, config, generator)
    assert notes["kl_worst"] < 1e-6 and notes["clipped"] == 0.0


def test_normalisers_move_only_between_updates() -> None:
    core, rng = TamiyoCore(seed=0), random.Random(3)
    before = {k: v.clone() for k, v in core.normalisers.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    episode = play(core, scenes(rng, 6), generator, lambda *_: 1.0)
    ppo.update(CorePolicy(core), torch.optim.Adam(core.parameters()), [episode], PPOConfig(epochs=1), generator)
    assert all(torch.equal(v, before[k]) for k, v in core.normalisers.state_dict().items())
    ppo.update_normalisers(core, [episode])
    assert core.normalisers["run"].count.max() == 6


def test_it_learns_a_known_problem() -> None:
    """Germinate the cheapest blueprint and do nothing else: the best return is known, and chance is far below."""
    core = TamiyoCore(CoreConfig(width=16, layers=1, heads=2, commands=1), seed=0)
    optimizer = torch.optim.Adam(core.parameters(), 3e-3)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    germinate = OPS.index("germinate")

    def reward(seen: Observation, row: np.ndarray) -> float:
        return float(row[0, 0] == germinate and seen.names[row[0, 1]][row[0, 2]] == "norm")

    def episode() -> Episode:
        dormant = (Stage.DORMANT,) * 3
        views = [observe(make_view(rng.randrange(10**6), 3, t, dormant), BLENDS) for t in range(5)]
        return play(core, views, generator, reward)

    totals = []
    for _ in range(20):
        episodes = [episode() for _ in range(16)]
        totals.append(np.mean([e.total for e in episodes]))
        ppo.update(CorePolicy(core), optimizer, episodes, PPOConfig(target_kl=0.1), generator)
        ppo.update_normalisers(core, episodes)
    assert totals[0] < 1.6 and np.mean(totals[-3:]) > 4.5, totals


def test_the_group_baseline_is_what_the_others_got() -> None:
    own = [np.array([1.0, 2.0, 3.0]), np.array([0.0, 4.0]), np.array([5.0, 0.0, 1.0]), np.array([7.0])]
    found = ppo.relative(own, [0, 0, 0, 1])
    assert found[0].tolist() == [1 - 2.5, 2 - 2, 3 - 1] and found[1].tolist() == [0 - 3, 4 - 1]
    assert found[2].tolist() == [5 - 0.5, 0 - 3, 1 - 3] and found[3].tolist() == [7.0]  # alone: nothing to compare


def test_a_minibatch_scored_together_has_the_gradient_of_its_episodes() -> None:
    core, rng = TamiyoCore(seed=0), random.Random(0)
    generator = torch.Generator().manual_seed(0)
    episodes = [play(core, scenes(rng, n), generator, lambda *_: rng.random()) for n in (5, 7, 5, 7, 7)]
    merits = [np.array([rng.gauss(0, 1) for _ in e.rewards], np.float32) for e in episodes]
    config = PPOConfig(gradient_norm=1e9, entropy_weights=(0.0,) * 5)
    one, kl, _ = ppo._minibatch(CorePolicy(core), episodes, merits, merits, config)
    all_, kl_all, notes = ppo._together(CorePolicy(core), episodes, merits, merits, config)
    assert kl == pytest.approx(kl_all, abs=1e-6) and notes["dropped"] == 0.0
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(one, all_, strict=True))
    episodes[1].log_prob[:] = np.nan  # one environment's NaN stays its own
    rest, _, notes = ppo._together(CorePolicy(core), episodes, merits, merits, config)
    assert notes["dropped"] == 1.0 and all(bool(g.isfinite().all()) for g in rest)


def two_worlds(small: float) -> list[Episode]:
    """Two groups of one decision table: in one the first decision pays 1 nat, in the other the second pays `small`."""
    half, found = np.full(2, math.log(0.5), np.float32), []
    for group, pay in ((0, (1.0, 0.0)), (1, (0.0, small))):
        for k in range(4):
            actions = np.zeros((2, 1, 5), np.int64)
            actions[:, 0, 0] = (k % 2, k // 2)
            rewards = np.array([pay[0] * (k % 2), pay[1] * (k // 2)], np.float32)
            found.append(Episode([None, None], actions, half, np.zeros(2, np.float32), rewards, group))  # type: ignore[list-item]
    return found


@pytest.mark.parametrize(("scale", "least", "most"), [(0.0, 0.0, 0.06), (0.001, 0.6, 1.4)])
def test_a_world_of_small_returns_teaches_as_much_as_one_of_large_ones(scale: float, least: float, most: float) -> None:
    policy = Lookup(2)
    config = PPOConfig(group_baseline=True, group_scale=scale, gae_lambda=0.0, gradient_norm=1e9, epochs=1,
                       entropy_weights=(0.0,) * 5, reward_scale=5.0)  # fmt: skip
    ppo.update(policy, torch.optim.SGD(policy.parameters(), 0.1), two_worlds(0.05), config, torch.Generator())
    moved = (policy.logits[:, 1] - policy.logits[:, 0]).tolist()
    assert moved[0] > 0 and least < moved[1] / moved[0] < most


def test_differences_below_the_floor_stay_small_and_one_death_drowns_nobody() -> None:
    own = [np.array([0.3, -0.3], np.float32), np.array([0.001, -0.001], np.float32)]
    large, small = ppo.rescaled(own, [0, 1], 0.02)
    assert large[0] == pytest.approx(0.3 / 0.32) and small[0] == pytest.approx(0.001 / 0.021)
    rest = [np.array([0.1, -0.1], np.float32) for _ in range(7)]
    found = ppo.rescaled([np.array([-5.0, -5.0], np.float32), *rest], [0] * 8, 0.02)
    assert found[0].tolist() == [-4.0, -4.0] and found[1][0] > 0.8


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_an_anchor_draws_an_advised_core_back_to_what_is_proposed(anchor: float) -> None:
    core = TamiyoCore(CoreConfig(width=32, layers=1, heads=2, advised=True), seed=0)
    with torch.no_grad():
        core.trust.bias.fill_(0.5)
    seen = [observe(Adviser().advise(make_view(key, 4)), BLENDS) for key in range(8)]
    policy = CorePolicy(core, anchored=anchor > 0)
    decision = core.decide(collate(seen), core.initial(8), generator=torch.Generator().manual_seed(0))
    zeros = np.zeros(1, np.float32)
    episodes = [Episode([one], rows[None].numpy(), decision.log_prob.detach()[k : k + 1].numpy(), zeros, zeros, k)
                for k, (one, rows) in enumerate(zip(seen, decision.actions, strict=True))]  # fmt: skip
    config = PPOConfig(anchor=anchor, entropy_weights=(0.0,) * 5, epochs=20, together=True, target_kl=9.0)

    def agreement() -> float:
        tokens, summary = core.perceive(collate(seen))
        found = core.agreement(collate(seen), tokens, core.memory(summary, core.initial(8)))
        return found.mean().item()

    before = agreement()
    notes = ppo.update(policy, torch.optim.Adam(policy.parameters(), 1e-2), episodes, config, torch.Generator())
    if anchor:
        assert before < notes["agreement"] < agreement() < 0 and agreement() - before > 0.5
    else:
        assert notes["agreement"] == 0.0 and agreement() - before < 0.5
