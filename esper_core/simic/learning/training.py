"""Training Tamiyo: iterations of episodes and updates in a folder of its own, resumable bit for bit.

Everything that an iteration does follows from the manifest and the iteration's number, so that a training killed at
any moment resumes from its newest checkpoint bit for bit, with any number of worker processes.

Several processes, on one host or many, share out the episodes and the gradients of one learner (see `sharing`). What
each computes does not depend on how many there are, and neither does the result. The first has the folder.

`FOLDER/`: `training.json` (the manifest), `curves.jsonl` (one line an iteration), `checkpoints/`, `base.safetensors`
(the core that was started from, if any), `agent.safetensors` or `adapter.safetensors`, `report.html`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.ranks import ALONE, Ranks
from esper_core.leyline.errors import BadFile, BadOption, RunFailed, did_you_mean, os_error_as
from esper_core.simic.gym.cpu_engine import Inline, Task, WorkerPool, make_pool, one_thread
from esper_core.simic.gym.planted import gym_registry
from esper_core.simic.gym.stacked_cohort import grows_own_blocks
from esper_core.simic.learning.curriculum import Curriculum, curriculum_text, parse_curriculum
from esper_core.simic.learning.imitation import imitate
from esper_core.simic.learning.ppo import CorePolicy, Episode, PPOConfig, update, update_normalisers
from esper_core.simic.learning.rollout import (
    GroupPlayed,
    PackedCore,
    Played,
    demonstrate,
    occupy,
    rollout,
    stackable_parts,
    told,
)
from esper_core.simic.learning.sharing import shared
from esper_core.storage.tensor_file import expect_well_formed, read_json_file, write_json_file
from esper_core.tamiyo.adapter import Adapter, build_adapter
from esper_core.tamiyo.core import TamiyoCore
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.process_count import local_process_count
from esper_core.tolaria.processes import own_device
from esper_core.tolaria.run_folder import RunFolder

FORMAT: Final = "esper-training-1"
AGAIN: Final = "esper tamiyo resume continues from the newest checkpoint"
_ROUNDING: Final = 1e-3
"""By how much the tensors of two processes may differ after an iteration, over their largest value."""
BACKENDS: Final = ("processes", "inline", "stacked")
_ADAPTER_RATE: Final = 10.0
"""Learning rate of an adapter over that of a whole core: the best for LoRA is about ten times the best for all weights
(Schulman et al., "LoRA Without Regret", 2025)."""
_ALONE: Final = 8
"""How much longer a group takes by itself on the CPU than a stack on a device, for the order of jobs alone."""
Record = dict[str, Any]


@attrs.frozen(kw_only=True)
class Manifest:
    """The parameters of a training; with the code, they determine every bit of its result.

    Attributes:
        curriculum: name, for display. text: its TOML. seed: of everything that is drawn.
        iterations: policy updates, demonstrations included; 0 for the curriculum's own number.
        domain: train on the worlds of this domain alone; empty for all.
        adapter: kind of adapter to train on a frozen base; empty to train the core itself.
        base: fingerprint of the core in `base.safetensors`; empty for a fresh one.
        backend: what computes episodes: `processes`, `inline`, or `stacked` on `device`.
        device: `cpu` or `cuda`; with `stacked` also where the learner is.
        worlds_at_once: most groups in one stack. group_size: environments in a group; 0 for the curriculum's number.
        pieces: into which a minibatch that is scored together is split, for several processes to share out.
    """

    curriculum: str
    text: str
    seed: int = 0
    iterations: int = 0
    domain: str = ""
    adapter: str = ""
    base: str = ""
    backend: str = "processes"
    device: str = "cpu"
    worlds_at_once: int = 16
    group_size: int = 0
    pieces: int = 1

    def __attrs_post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise BadOption(f"backend {self.backend!r}", ", ".join(BACKENDS), did_you_mean(self.backend, BACKENDS))
        if self.device != "cpu" and self.backend != "stacked":
            raise BadOption(f"device {self.device!r} with backend {self.backend}, which computes on the CPU",
                            "device cpu, or --backend stacked")  # fmt: skip


class Training:
    """One training in a folder. `start` or `resume`, then `run`.

    Attributes:
        path: the folder. manifest, curriculum: what to do. core: the network, with the adapter in training attached.
        ranks: the processes that train it. device: of this one's stacked worlds and learner.
        done: iterations behind us. records: one for each of them, as in `curves.jsonl`.
    """

    def __init__(self, path: Path, manifest: Manifest, ranks: Ranks = ALONE) -> None:
        self.path, self.manifest, self.ranks = path, manifest, ranks
        self.device = manifest.device if ranks.size == 1 else own_device(manifest.device)
        occupy(self.device)
        self.curriculum: Curriculum = parse_curriculum(manifest.text, manifest.curriculum)
        self.folder = RunFolder(path, keep=2)
        self.done, self.records, self.notices = 0, list[Record](), set[str]()
        self._registry = gym_registry()
        self.core, self.adapter = self._network()
        self.core.to(self.device)
        self.policy = CorePolicy(self.core, anchored=self.core.config.advised and self.ppo.anchor > 0)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), eps=1e-5)

    _work: Task = staticmethod(told)
    """What a worker is asked for: to play, and to tell what it took."""

    # --- Beginning ---

    @classmethod
    def start(
        cls, path: str | Path, manifest: Manifest, base: str | Path | None = None, *, ranks: Ranks = ALONE
    ) -> Training:
        """A new training.

        Args:
            base: agent file to start from, or to adapt. ranks: the processes that train; every one of them calls.

        Raises:
            BadOption: the folder holds a training already, or cannot be written to.
            BadFile, UnknownName: the base or the curriculum cannot be used.
        """
        path = Path(path)
        with ranks.together(forward=False):
            if ranks.first:
                manifest = _write_manifest(path, manifest, base)
        return cls(path, Manifest(**ranks.share(attrs.asdict(manifest))), ranks)

    @classmethod
    def resume(cls, path: str | Path, *, ranks: Ranks = ALONE) -> Training:
        """A training that was stopped, as its newest whole checkpoint left it.

        Args:
            ranks: the processes that go on with it, of whatever number; every one of them calls.

        Raises:
            BadFile: no training is there, or its files are damaged.
        """
        path = Path(path)
        about: dict[str, Any] = {}
        with ranks.together(forward=False):
            if ranks.first:
                about = _read_manifest(path)
        with expect_well_formed(path / "training.json"):
            training = cls(path, Manifest(**ranks.share(about)), ranks)
        found = None
        with ranks.together(forward=False):
            if ranks.first:
                found = training.folder.checkpoints.newest()
        found = ranks.gather_objects(found)[0]
        if found is not None:
            with expect_well_formed(path / "checkpoints"):
                training._restore(*found)
        return training

    def _network(self) -> tuple[TamiyoCore, Adapter | None]:
        if not self.manifest.base:
            return TamiyoCore(self.curriculum.core, seed=self.manifest.seed), None
        packed: PackedCore | None = None
        with self.ranks.together(forward=False):
            if self.ranks.first:
                core = TamiyoCore.load(self.path / "base.safetensors")
                if core.fingerprint != self.manifest.base:
                    given = f"{self.path / 'base.safetensors'} is not the core that this training began with"
                    raise BadFile(given)
                packed = PackedCore.pack(core)
        core = self.ranks.gather_objects(packed)[0].unpack()
        if not self.manifest.adapter:
            return core, None
        adapter = build_adapter(core, self.manifest.adapter, self.manifest.domain or "all")
        core.attach(adapter)
        return core, adapter

    # --- Resuming ---

    @property
    def iterations(self) -> int:
        """How many there will be."""
        return self.manifest.iterations or self.curriculum.iterations

    @property
    def demonstrations(self) -> int:
        """How many iterations imitate a teacher: none where there is a core to go on from."""
        return 0 if self.manifest.base else self.curriculum.imitation.iterations

    @property
    def ppo(self) -> PPOConfig:
        """How the policy is updated: with a core to go on from, as `tuning` says."""
        return self.curriculum.tuning if self.manifest.base else self.curriculum.ppo

    @property
    def product(self) -> Path:
        """The file that the training is for: the agent, or the adapter."""
        return self.path / ("adapter.safetensors" if self.adapter is not None else "agent.safetensors")

    def run(
        self, workers: int = 0, notify: Callable[[Record], None] = lambda record: None,
        pool: Inline | WorkerPool | None = None,
    ) -> Path:  # fmt: skip
        """Go on to the end; returns the product.

        Args:
            workers: processes; 0 for one a core, 1 for this one alone. The answer is the same for any number.
            notify: told of every iteration, in the first of several processes.
            pool: workers that were started before, and go on afterwards; instead of `workers`.

        Raises:
            BadFile: another process trains here.
            RunFailed: not one episode of an iteration could be played, or a process was lost or computes otherwise.
        """
        ranks = self.ranks
        if not workers and ranks.size > 1:
            workers = max(1, len(os.sched_getaffinity(0)) // local_process_count())
        with ranks.together(forward=False):
            if ranks.first:
                self.folder.hold()
        try:
            with ranks.together(forward=False):
                if ranks.first:
                    self._rewrite_curves()
            with one_thread(), nullcontext(pool) if pool is not None else make_pool(workers) as workplace:
                while self.done < self.iterations:
                    record = self._iterate(workplace)
                    self._agree()
                    self.records.append(record)
                    self.done += 1
                    with ranks.together(forward=False):
                        if ranks.first:
                            self._keep(record)
                    if ranks.first:
                        notify(record)
        finally:
            if ranks.first:
                self.folder.release()
        return self.product

    def _iterate(self, pool: Inline | WorkerPool) -> Record:
        began, plan, i = time.monotonic(), self.curriculum, self.done
        teaching = i < self.demonstrations
        draws = [plan.draw(self.manifest.seed, i, g, domain=self.manifest.domain) for g in range(plan.groups)]
        answers, spent = self._play(pool, [run for _, run in draws], teaching)
        episodes: list[Episode] = [episode for found, _ in answers for episode in found]
        if not episodes:
            raise RunFailed("every host of the iteration failed without any growth", "", "a lower learning rate")
        played = time.monotonic()
        generator = torch.Generator().manual_seed(self.manifest.seed * 1_000_003 + i)
        self._set_rate(teaching)
        shares: Any = {"ranks": self.ranks, "pieces": self.manifest.pieces}
        if teaching:
            notes = imitate(self.policy, self.optimizer, episodes, plan.imitation, generator,
                            reward_scale=plan.ppo.reward_scale, **shares)  # fmt: skip
        else:
            notes = update(self.policy, self.optimizer, episodes, self.ppo, generator, **shares)
        if self.adapter is None:  # a frozen core keeps its normalisers
            update_normalisers(self.core, episodes)
        results = [(world.name, one) for (world, _), (_, many) in zip(draws, answers, strict=True) for one in many]
        before = self.records[-1] if self.records else {}
        steps = sum(
            len(found) * run.steps_per_epoch * run.epochs for (_, run), (found, _) in zip(draws, answers, strict=True)
        )
        return {
            "iteration": i, "phase": "imitation" if teaching else "ppo", **_summary(results),
            "update": notes, "episodes": before.get("episodes", 0) + len(episodes),
            "environment_steps": before.get("environment_steps", 0) + steps,
            "seconds": {"play": played - began, "update": time.monotonic() - played,
                        "total": _seconds(before) + time.monotonic() - began, **spent},
        }  # fmt: skip

    @property
    def group_size(self) -> int:
        """Environments in a group."""
        return self.manifest.group_size or self.curriculum.group_size

    def _play(
        self, pool: Inline | WorkerPool, runs: Sequence[RunConfig], teaching: bool
    ) -> tuple[list[GroupPlayed], dict[str, float]]:
        """What came of one group for each of `runs`, and seconds of all workers together by what they did."""
        plan, manifest, i = self.curriculum, self.manifest, self.done
        dice = random.Random(f"{manifest.seed}|rollout|{i}")
        seeds = [dice.randrange(1 << 31) for _ in runs]
        stacked = manifest.backend == "stacked"
        parts = self._parts(runs) if stacked else [[g] for g in range(len(runs))]
        packed, jobs = PackedCore.pack(self.core), list[tuple[Task, tuple[Any, ...]]]()
        for part in parts:
            some, device = [runs[g] for g in part], self.device if stacked else None
            if teaching:
                more = (plan.imitation, self.core.config, some, self.group_size, part, device)
                jobs.append((self._work, (demonstrate, *more)))
            else:
                jobs.append(
                    (self._work, (rollout, packed, some, self.group_size, [seeds[g] for g in part], part, device))
                )
        answers: list[GroupPlayed] = [([], []) for _ in runs]
        spent: dict[str, float] = defaultdict(float)
        sizes = [sum(self._cost(runs[g]) for g in part) for part in parts]
        played = shared(self.ranks, sizes, lambda mine: pool.run([jobs[n] for n in mine]))
        for part, (found, seconds, notes) in zip(parts, played, strict=True):
            for g, answer in zip(part, found, strict=True):
                answers[g] = answer
            for name, value in seconds.items():
                spent[name] += value
            self.notices |= set(notes)
        self._notice_idle(len(parts), (plan.imitation if teaching else self.ppo).together)
        return answers, spent

    def _cost(self, run: RunConfig) -> float:
        """About how long a group of `run` plays, to share groups out among processes."""
        alone = self.manifest.backend == "stacked" and grows_own_blocks(run, self._registry)
        return run.epochs * max(1, run.steps_per_epoch) * (_ALONE if alone else 1)

    def _parts(self, runs: Sequence[RunConfig]) -> list[list[int]]:
        """Indices of the runs of each job: what is stacked together, and each of the others by itself.

        Those that take longest come first, so that no worker begins with one when the rest are done.
        """
        parts: list[tuple[int, list[int]]] = []
        for part in stackable_parts(runs, self.manifest.worlds_at_once):
            alone = any(grows_own_blocks(runs[g], self._registry) for g in part)
            steps = runs[part[0]].steps_per_epoch * runs[part[0]].epochs
            if alone:
                parts += [(steps * _ALONE, [g]) for g in part]
            else:
                parts.append((steps, part))
        return [part for _, part in sorted(parts, key=lambda one: -one[0])]

    def _notice_idle(self, parts: int, together: bool) -> None:
        """Tell where there is less to share out than there are processes."""
        count = self.ranks.size
        if parts < count:
            self.notices.add(f"{count} processes had {parts} stacks of groups to play in an iteration, so some played "
                             "none: more groups, or a smaller --worlds-at-once")  # fmt: skip
        if together and self.manifest.pieces < count:
            pieces = self.manifest.pieces
            self.notices.add(f"{count} processes had {pieces} pieces of a minibatch to learn from, so some learnt from "
                             f"none: --pieces {count} in a new training")  # fmt: skip

    def _set_rate(self, teaching: bool) -> None:
        plan, taught = self.curriculum, self.demonstrations
        if teaching:
            rate = plan.imitation.learning_rate
        else:
            share = (self.done - taught) / max(self.iterations - taught - 1, 1)
            rate = self.ppo.learning_rate * (1 + (self.ppo.final_rate - 1) * share)
            rate *= _ADAPTER_RATE if self.adapter is not None else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    # --- Keeping ---

    def _keep(self, record: Record) -> None:
        self._append(record)
        if self.done % self.curriculum.checkpoint_every == 0 or self.done == self.iterations:
            self.folder.checkpoints.save(self.done, self._tensors(), {"records": self.records}, None)
            self.write_product()

    def _agree(self) -> None:
        """After an iteration: every process holds what the first holds, to the bit.

        Processors of other kinds may round the steps of the optimizer otherwise; that is told, and more is refused.

        Raises:
            RunFailed: a process has learnt something else.
        """
        ranks = self.ranks
        if ranks.size == 1:
            return
        tensors = self._tensors()
        marks = [zlib.crc32(t.contiguous().numpy().tobytes()) for t in tensors.values()]
        rows = ranks.gather([len(marks), zlib.crc32(json.dumps(marks).encode())])
        if all(row == rows[0] for row in rows):
            return
        first: dict[str, Tensor] = ranks.gather_objects(tensors if ranks.first else None)[0]
        alike = first.keys() == tensors.keys()
        gap = max(_gap(first[name], tensors[name]) for name in first) if alike else math.inf
        gaps = [row[0] for row in ranks.gather([gap])]
        if not max(gaps) <= _ROUNDING:
            given = f"process {gaps.index(max(gaps))} has learnt another core than process 0 by iteration {self.done}"
            raise RunFailed(given, "processes that compute alike", "the same versions everywhere, then " + AGAIN)
        self.notices.add("processes round differently, since they are on other hardware: the core is that of the first")
        self._load(first)

    def _tensors(self) -> dict[str, Tensor]:
        """Core, adapter and moments on the CPU, by name."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"core.{name}": t for name, t in self.core.state_dict().items()}
        if self.adapter is not None:
            tensors |= {f"adapter.{name}": t for name, t in self.adapter.state_dict().items()}
        tensors |= {f"adam.{i}.{name}": t for i, moments in state.items() for name, t in moments.items()}
        return {name: t.cpu() for name, t in tensors.items()}

    def _restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        self._load(tensors)
        self.records = list(plain["records"])
        self.done = int(plain["step"])

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor.clone()
        self.core.load_state_dict(parts["core"])
        if self.adapter is not None:
            self.adapter.load_state_dict(parts["adapter"])
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in parts["adam"].items():
            index, _, kind = name.partition(".")
            moments[int(index)][kind] = tensor
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**state, "state": dict(moments)})

    def write_product(self) -> None:
        """Write agent or adapter as it is now, with its lineage, and the report."""
        from esper_core.simic.learning.curve_report import write_curve_report

        lineage = self.lineage()
        if self.adapter is not None:
            self.adapter.lineage = lineage
            self.adapter.save(self.product)
        else:
            self.core.lineage = lineage
            self.core.save(self.product)
        write_curve_report(self.path / "report.html", lineage, self.records)

    def lineage(self) -> dict[str, Any]:
        """Where the product comes from: what an agent file tells of its training."""
        last, worlds = (self.records[-1] if self.records else {}), self.curriculum.chosen(
            held_out=False, domain=self.manifest.domain
        )  # fmt: skip
        offered = [w.run.get("blueprints", ()) for w in worlds]
        pools = [o.get("pool", ()) if isinstance(o, Mapping) else o for o in offered]
        parent = TamiyoCore.load(self.path / "base.safetensors").lineage if self.manifest.base else {}
        command = f"esper tamiyo {'adapt' if self.adapter else 'train'} --curriculum {self.manifest.curriculum}"
        command += f" --seed {self.manifest.seed}"
        command += f" --iterations {self.manifest.iterations}" if self.manifest.iterations else ""
        command += f" --domain {self.manifest.domain}" if self.manifest.domain else ""
        return {
            "command": command, "curriculum": self.manifest.curriculum, "seed": self.manifest.seed,
            "curriculum_sha256": hashlib.sha256(self.manifest.text.encode()).hexdigest(),
            "iterations": self.done, "of": self.iterations,
            "imitation": {"teacher": self.curriculum.imitation.teacher,
                          "iterations": min(self.done, self.demonstrations)} if self.demonstrations else None,
            "episodes": last.get("episodes", 0), "environment_steps": last.get("environment_steps", 0),
            "seconds": round(_seconds(last)), "rewards": list(self.curriculum.rewards),
            "domain": self.manifest.domain or None, "worlds": [w.name for w in worlds],
            "backend": self.manifest.backend, "device": self.manifest.device,
            "pieces": self.manifest.pieces if self.manifest.pieces > 1 else None,
            "blueprints": sorted({name for pool in pools for name in pool}),
            "versions": {name: metadata.version(name) for name in ("esper-core", "torch")},
            "base": {"fingerprint": self.manifest.base, "lineage": parent} if self.manifest.base else None,
        }  # fmt: skip

    def _rewrite_curves(self) -> None:
        """Forget lines of iterations that will be done again."""
        path = self.path / "curves.jsonl"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
        os.replace(temporary, path)

    def _append(self, record: Record) -> None:
        with open(self.path / "curves.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _write_manifest(path: Path, manifest: Manifest, base: str | Path | None) -> Manifest:
    """Begin the folder of a training; see `Training.start`."""
    if (path / "training.json").exists():
        raise BadOption(f"{path} holds a training already", "a new folder", f"esper tamiyo resume {path}")
    parse_curriculum(manifest.text, manifest.curriculum).chosen(held_out=False, domain=manifest.domain)
    core = TamiyoCore.load(base) if base is not None else None
    with os_error_as(BadOption, f"{path} cannot be written to", "a folder with space", "--out DIR"):
        path.mkdir(parents=True, exist_ok=True)
        if core is not None:
            core.save(path / "base.safetensors")
            manifest = attrs.evolve(manifest, base=core.fingerprint)
        write_json_file(path / "training.json", {"format": FORMAT, **attrs.asdict(manifest)})
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    """The fields of the manifest in a folder; see `Training.resume`."""
    if not (path / "training.json").is_file():
        raise BadFile(f"there is no training at {path}", "a folder with a training.json", "esper tamiyo train")
    about: dict[str, Any] = read_json_file(path / "training.json")
    with expect_well_formed(path / "training.json"):
        if about.pop("format") != FORMAT:
            raise BadFile(f"{path} holds no training of format {FORMAT}")
    return about


def _gap(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, over the largest absolute value of the first."""
    if one.shape != other.shape:
        return math.inf
    scale = float(one.abs().max()) if one.numel() else 0.0
    return float((one - other).abs().max()) / max(scale, 1e-12) if one.numel() else 0.0


def _seconds(record: Mapping[str, Any]) -> float:
    return float(record.get("seconds", {}).get("total", 0.0))


def _summary(results: Sequence[tuple[str, Played]]) -> Record:
    """Means over all environments of an iteration, and the mean return by world."""
    by_world: dict[str, list[float]] = defaultdict(list)
    commands: dict[str, int] = defaultdict(int)
    for world, one in results:
        by_world[world].append(one.total)
        for op, count in one.commands.items():
            commands[op] += count
    everyone = [one for _, one in results]
    return {
        "return": fmean(one.total for one in everyone),
        "worlds": {world: fmean(totals) for world, totals in sorted(by_world.items())},
        "loss_gain": fmean(one.twin_loss - one.loss for one in everyone),
        "accuracy_gain": fmean(one.score_gain for one in everyone),
        "params_ratio": fmean(one.params_ratio for one in everyone),
        "deaths": sum(one.deaths for one in everyone),
        "commands": {op: count / len(everyone) for op, count in sorted(commands.items())},
    }


def new_manifest(curriculum: str, **told: Any) -> Manifest:
    """The manifest of a training on a curriculum that ships with Esper, or on the TOML file of that path."""
    return Manifest(curriculum=curriculum, text=curriculum_text(curriculum), **told)
