"""An episode: a group of environments and their WAIT twin, from the first batch to the last decision.

The group shares initial weights, batches and order, so that a reward is a paired difference, and so that its hosts can
be computed once while they are equal (`simic.gym.cohort`). `EsperEnv` is a group of one with Gymnasium's interface.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.host import Batch, TaskProtocol
from esper_core.leyline.objective import Objective
from esper_core.leyline.outcome import RewardTerm, StepOutcome
from esper_core.leyline.stages import Op
from esper_core.leyline.view import RunView
from esper_core.registry import Registry, load_registry
from esper_core.simic.gym.cohort import Cohort
from esper_core.simic.gym.member import LentSensors, LentTolaria, Member, Puppet
from esper_core.simic.gym.reward import OutcomeMeter, Standing, compute_shaped_reward, slot_credits
from esper_core.tamiyo.blend_probe import BlendProbe
from esper_core.tamiyo.observation import FIELDS, OPS, Observation, observe
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.governor import Governor, GovernorConfig
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_core.tolaria.schedules import learning_rate_share
from esper_core.tolaria.trainer import decisions_per_epoch, steps_per_epoch


@attrs.frozen
class Ground:
    """What all environments of a group start from: task, plane and lengths.

    Attributes:
        plane: over a host with its initial weights; copied for each environment, never trained itself.
        steps: optimizer steps in an epoch. due: those of an epoch after which a decision is taken.
    """

    config: RunConfig
    registry: Registry
    task: TaskProtocol
    plane: Plane
    steps: int
    due: frozenset[int]
    objective: Objective

    @classmethod
    def lay(cls, config: RunConfig, registry: Registry, task: TaskProtocol | None = None) -> Ground:
        """Build task, host and plane as `esper run` would.

        Raises:
            EsperError: something in the configuration cannot be used.
        """
        task = task or assembly.build_task(config, registry)[0]
        host = assembly.build_host(config, registry, task.outputs, task.input_shape)
        objective = assembly.build_objective(config, registry, task)
        host.module.train()
        steps = steps_per_epoch(config, task)
        flops = assembly.host_flops(host, task, objective, torch.device("cpu"))
        plane = assembly.build_plane(config, registry, host, host_flops=flops, total_steps=steps * config.epochs)
        count = decisions_per_epoch(config, steps)
        return cls(
            config,
            registry,
            task,
            plane,
            steps,
            frozenset(round((i + 1) * steps / count) for i in range(count)),
            objective,
        )

    @property
    def decisions(self) -> int:
        """Decision steps of the whole run; the last one, at its end, changes nothing any more."""
        return len(self.due) * self.config.epochs

    def member(self) -> Member:
        """A fresh environment."""
        config, plane = self.config, copy.deepcopy(self.plane)
        optimizer = GrowthOptimizer(
            plane.host.module.parameters(), config, assembly.part_config(config, "optimizer", OptimizerConfig)
        )
        wanted = assembly.part_config(config, "sensors", assembly.SensorConfig).every
        every = min(wanted, max(1, self.steps * config.epochs // (2 * self.decisions)))
        tolaria = LentTolaria(
            plane, optimizer, Puppet(),
            Governor(assembly.part_config(config, "governor", GovernorConfig), self.objective.chance),
            self.objective,
            decisions=self.decisions, epochs=config.epochs, sensors=LentSensors(plane, every=every),
        )  # fmt: skip
        outer = torch.get_rng_state()
        torch.manual_seed(config.seed)
        random = torch.get_rng_state()
        torch.set_rng_state(outer)
        return Member(tolaria, random)

    def batches(self) -> Iterator[tuple[Batch, float, float, bool]]:
        """Every batch of the run with its learning rate, epochs done after it, and whether a decision is due then."""
        config, total = self.config, self.steps * self.config.epochs
        for epoch in range(config.epochs):
            split = self.task.train.batches(config.batch_size, seed=config.seed, epoch=epoch, shuffle=True)
            for number, batch in zip(range(1, self.steps + 1), split, strict=False):
                progress = (epoch * self.steps + number - 1) / total
                share = learning_rate_share(config.schedule, progress, config.warmup, config.decay)
                rate = config.learning_rate * share
                yield batch, rate, epoch + number / self.steps, number in self.due

    def validation(self) -> list[Batch]:
        """The validation batches that a decision reads, large ones: nothing is learnt from them."""
        chosen, seen, limit = [], 0, self.config.decision_examples
        for batch in self.task.validation.batches(min(limit or 512, 512)):
            chosen.append(batch)
            seen += batch.size
            if limit and seen >= limit:
                break
        return chosen


@attrs.define
class _Account:
    """What one environment has been paid so far."""

    meter: OutcomeMeter = attrs.Factory(OutcomeMeter)
    credited: dict[str, float] = attrs.Factory(dict)
    removed: dict[str, float] = attrs.Factory(dict)


@attrs.frozen
class Paid:
    """The reward of one environment for the time between two decisions, with its components before weights."""

    reward: float
    components: Mapping[str, float]
    outcome: StepOutcome


class EpisodeGroup:
    """N environments through one episode. `advance`, then `act` for each, until `done`.

    Args:
        ground: what they start from.
        size: N.
        rewards: term and weight by name.
        share: whether to share hosts; the figures are the same without, only slower.
    """

    def __init__(
        self, ground: Ground, size: int, rewards: Mapping[str, tuple[RewardTerm, float]], *, share: bool = True
    ) -> None:
        self.ground, self.done = ground, False
        self.terms = {name: term for name, (term, _) in rewards.items()}
        self.weights = {name: weight for name, (_, weight) in rewards.items()}
        self.cohort = Cohort(ground.member(), [ground.member() for _ in range(size)], share=share)
        self.steps = 0
        self._batches, self._validation = ground.batches(), ground.validation()
        self._accounts = [_Account() for _ in range(size)]
        self._decision = 0

    def advance(self) -> tuple[list[RunView], list[Paid]]:
        """Train up to the next decision; what every environment sees there, and what the time until there paid."""
        epoch = 0.0
        for batch, rate, epoch, due in self._batches:  # noqa: B007 - where the last batch stood is used below
            self.cohort.step(batch, rate)
            self.steps += 1
            if due:
                break
        self._decision += 1
        self.done = self._decision >= self.ground.decisions
        views = self.cohort.observe(self._validation, epoch)
        twin = self._standing(self.cohort.trunk)
        return views, [self._pay(k, twin) for k in range(len(self._accounts))]

    def act(self, k: int, commands: Sequence[Command]) -> list[Command]:
        """Have environment k carry out what is legal of `commands`."""
        member, account = self.cohort.members[k], self._accounts[k]
        worth = {path: g.loss.mean for path, g in member.plane.growths.items() if g.loss is not None}
        done = self.cohort.act(k, commands)
        account.removed |= {c.slot: worth[c.slot] for c in done if c.op is Op.WITHER and c.slot in worth}
        return done

    def _standing(self, member: Member) -> Standing:
        measured, ledger = member.measured, member.plane.ledger
        assert measured is not None
        return Standing(measured.loss, measured.score, ledger.excess_params_ratio, ledger.excess_flops_ratio)

    def _pay(self, k: int, twin: Standing) -> Paid:
        member, account = self.cohort.members[k], self._accounts[k]
        worth = {path: w.loss.mean for path, w in member.measured.worth.items()} if member.measured else {}
        gone = {p: v for p, v in account.removed.items() if member.plane.slots[p].seed is None}
        account.removed = {p: v for p, v in account.removed.items() if p not in gone}
        outcome = account.meter.measure(
            self._standing(member), twin, slot_gains=slot_credits(account.credited, worth), churn=gone,
            deaths=member.deaths(), final=self.done,
        )  # fmt: skip
        account.credited = worth
        reward, components = compute_shaped_reward(outcome, self.terms, self.weights)
        return Paid(reward, components, outcome)


class EsperEnv:
    """One environment with Gymnasium's interface (`reset`, `step`, `close`); observations are dicts of arrays.

    Each episode takes the next seed. An action is an array (K, 5) of indices in the order of `observation.FIELDS`, read
    until its first WAIT; `info["action_mask"]` and the observation's `legal` tell what is legal. An illegal command is
    refused, changes nothing, and is listed in `info["refused"]`.

    Args:
        config: the run that an episode is; its seed is that of the first episode.
        registry: where parts come from; None for what is installed.
        commands: K.
    """

    metadata: Mapping[str, Any] = {"render_modes": []}

    def __init__(self, config: RunConfig, registry: Registry | None = None, *, commands: int = 4) -> None:
        self.config, self.registry, self.commands = config, registry or load_registry(), commands
        self.rewards = assembly.build_rewards(config, self.registry)
        self._probe = BlendProbe(self.registry)
        self._episode, self._seen = -1, None
        self._group: EpisodeGroup | None = None
        self._last: Observation | None = None

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
        """Begin an episode and train up to its first decision. `options` override fields of the configuration."""
        self._episode = self._episode + 1 if seed is None else seed - self.config.seed
        config = attrs.evolve(self.config, seed=self.config.seed + self._episode, **dict(options or {}))
        self._group = EpisodeGroup(Ground.lay(config, self.registry), 1, self.rewards)
        views, paid = self._group.advance()
        return self._arrays(views[0]), self._info(paid[0], [])

    def step(
        self, action: Sequence[Sequence[int]] | np.ndarray[Any, Any]
    ) -> tuple[dict[str, np.ndarray[Any, Any]], float, bool, bool, dict[str, Any]]:
        """Act, train up to the next decision: observation, reward, terminated, truncated, info."""
        assert self._group is not None and self._last is not None, "reset first"
        commands = []
        for row in np.asarray(action, dtype=np.int64).reshape(-1, len(FIELDS))[: self.commands]:
            if OPS[int(row[0])] is Op.WAIT:
                break
            commands.append(self._last.command([int(i) for i in row], "agent"))
        done = self._group.act(0, commands)
        views, paid = self._group.advance()
        info = self._info(paid[0], [c for c in commands if c not in done])
        failed = bool(self._group.cohort.members[0].failed)
        return self._arrays(views[0]), paid[0].reward, self._group.done or failed, False, info

    def close(self) -> None:
        """Let go of the episode."""
        self._group = self._last = None

    def _arrays(self, view: RunView) -> dict[str, np.ndarray[Any, Any]]:
        self._last = observe(view, self._probe.describe(view.blends))
        names = ("slots", "run", "blueprints", "blends", "legal", "grows", "blending")
        return {name: getattr(self._last, name) for name in names}

    def _info(self, paid: Paid, refused: Sequence[Command]) -> dict[str, Any]:
        assert self._last is not None
        return {"components": dict(paid.components), "refused": list(refused), "action_mask": self._last.legal}
