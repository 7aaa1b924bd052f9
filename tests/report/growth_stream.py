"""Synthetic runs: event streams as a real run would emit them, without training anything."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from esper_core.leyline import events as ev
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.stages import Stage

BLUEPRINTS = {"depthwise": 4.0, "attention": 16.0, "conv_enhance": 36.0}


def resnet_points() -> list[InjectionSpec]:
    """The points of a resnet18 on 32×32 images."""
    points = []
    for layer, (channels, size) in enumerate(((64, 8), (128, 4), (256, 2), (512, 1)), 1):
        for block in range(2):
            points.append(
                InjectionSpec(
                    name=f"layer{layer}.{block}",
                    channels=channels,
                    layout="NCHW",
                    order=len(points),
                    feature_shape=(channels, size, size),
                    stride=32 // size,
                    role="block",
                    region=f"layer{layer}",
                )
            )
    return points


def lattice_points(count: int) -> list[InjectionSpec]:
    """The points of a deep language model: after attention and after FFN of every block."""
    roles = ("after_attention", "after_ffn")
    return [
        InjectionSpec(
            name=f"h.{i // 2}.{('attn', 'mlp')[i % 2]}",
            channels=256,
            layout="NLD",
            order=i,
            feature_shape=(128, 256),
            role=roles[i % 2],
            region=f"h.{i // 8}",
            tags={"causal"},
        )
        for i in range(count)
    ]


class GrowthStream:
    """Plays a heuristic-like run and yields its events.

    Args:
        points: where the host can grow. epochs, per_epoch: length in epochs and optimizer steps an epoch.
        decisions: decision steps an epoch. grow: germinate at most this many seeds. rollback: one catastrophe.
    """

    def __init__(
        self,
        points: list[InjectionSpec],
        *,
        epochs: int = 20,
        per_epoch: int = 24,
        decisions: int = 2,
        grow: int = 5,
        rollback: bool = True,
        seed: int = 0,
        host: str = "timm:resnet18",
        task: str = "digits",
    ) -> None:
        self.points, self.epochs, self.per_epoch, self.decisions = points, epochs, per_epoch, decisions
        self.random = random.Random(seed)
        self.host, self.task, self.seed = host, task, seed
        self.host_params, self.host_flops = 11_181_642, 75_000_000
        self.grow, self.rollback = grow, rollback
        self.seeds: dict[str, dict[str, Any]] = {}
        self.culled: set[str] = set()

    def events(self) -> Iterator[ev.Event]:
        """The whole stream, `run_started` to `run_ended`."""
        yield ev.RunStarted(
            step=0,
            host=self.host,
            task=self.task,
            controller="heuristic",
            seed=self.seed,
            host_params=self.host_params,
            host_flops=self.host_flops,
            points=[attrs.asdict(p) for p in self.points],
            steps=self.epochs * self.per_epoch,
        )
        stride = max(1, self.per_epoch // self.decisions)
        decision = 0
        for step in range(1, self.epochs * self.per_epoch + 1):
            self.progress = step / (self.epochs * self.per_epoch)
            if step % stride == 0:
                yield from self._decide(step, decision)
                decision += 1
            if self.rollback and step == int(0.56 * self.epochs * self.per_epoch):
                yield from self._catastrophe(step)
            if step % self.per_epoch == 0:
                yield self._epoch(step)
        gained = 0.15 * math.tanh(6 * sum(s["benefit"] for s in self.seeds.values()))
        yield ev.RunEnded(
            step=step,
            status="finished",
            reason="",
            test_loss=0.21 - gained,
            total_flops=self._flops(step),
            test_score=0.938 + gained / 4,
            params=self.host_params + self._params(),
            host_params=self.host_params,
        )

    def _losses(self) -> tuple[float, float, float]:
        gained = 0.15 * math.tanh(6 * sum(s["benefit"] * s["alpha"] for s in self.seeds.values()))
        train = 2.3 * math.exp(-4.5 * self.progress) + 0.05 + self.random.gauss(0, 0.012)
        validation = 2.2 * math.exp(-4.0 * self.progress) + 0.22 - gained + self.random.gauss(0, 0.015)
        return max(train, 0.01), max(validation, 0.02), min(0.995, max(0.1, 0.985 - 0.36 * validation))

    def _params(self) -> int:
        return sum(s["params"] for s in self.seeds.values())

    def _flops(self, step: int) -> float:
        return step * 64 * 3.0 * self.host_flops * (1 + 0.3 * self._params() / self.host_params)

    def _epoch(self, step: int) -> ev.EpochEnded:
        train, validation, accuracy = self._losses()
        return ev.EpochEnded(
            step=step,
            epoch=step // self.per_epoch - 1,
            train_loss=train,
            train_score=min(1.0, accuracy + 0.02),
            validation_loss=validation,
            validation_score=accuracy,
            seed_params=self._params(),
            learning_rate=0.001 * 0.5 * (1 + math.cos(math.pi * self.progress)),
            total_flops=self._flops(step),
            excess_params_ratio=self._params() / self.host_params,
        )

    def _move(self, step: int, path: str, after: Stage, source: str, reason: str) -> ev.StageChanged:
        seed = self.seeds[path]
        event = ev.StageChanged(
            step=step,
            slot=path,
            before=seed["stage"].value,
            after=after.value,
            blueprint=seed["blueprint"],
            blend="residual:cosine",
            source=source,
            reason=reason,
            params=seed["params"],
        )
        seed["stage"], seed["since"] = after, 0
        return event

    def _decide(self, step: int, decision: int) -> Iterator[ev.Event]:
        train, validation, accuracy = self._losses()
        commands: list[dict[str, Any]] = []
        for path, seed in list(self.seeds.items()):
            seed["since"] += 1
            yield from self._live(step, path, seed, commands)
        free = [p for p in self.points if p.name not in self.seeds and p.name not in self.culled]
        if free and decision % 2 == 1 and decision > 1 and len(self.seeds) < self.grow and self.progress < 0.7:
            point = self.random.choice(free)
            name = self.random.choice(sorted(BLUEPRINTS))
            self.seeds[point.name] = {
                "stage": Stage.DORMANT,
                "since": 0,
                "alpha": 0.0,
                "blueprint": name,
                "shown": 0,
                "params": int(point.channels * BLUEPRINTS[name] * 12),
                "benefit": self.random.choice((-0.004, 0.008, 0.02, 0.03)),
            }
            commands.append({"op": "germinate", "slot": point.name, "blueprint": name})
            yield self._move(step, point.name, Stage.GERMINATED, "heuristic", "largest gradient for its size")
        yield ev.HostRead(step=step, readings={"gradient_norm": 0.4 + self.random.random() * 0.1})
        yield ev.Decided(
            step=step,
            decision=decision,
            controller="heuristic",
            train_loss=train,
            validation_loss=validation,
            validation_score=accuracy,
            commands=commands,
            governor="calm",
        )
        yield ev.RewardMeasured(
            step=step,
            decision=decision,
            terms={"accuracy": 0.01, "rent": -0.02},
            weights={"accuracy": 1.0, "rent": 1.0},
            total=-0.01,
        )

    def _live(self, step: int, path: str, seed: dict[str, Any], commands: list[dict[str, Any]]) -> Iterator[ev.Event]:
        stage, since = seed["stage"], seed["since"]
        if stage is Stage.GERMINATED:
            yield self._move(step, path, Stage.TRAINING, "plane", "the seed has seen at least one batch")
        elif stage is Stage.TRAINING and since >= 3:
            commands.append({"op": "advance", "slot": path})
            yield self._move(step, path, Stage.BLENDING, "heuristic", "its own proxy loss falls")
        elif stage is Stage.BLENDING:
            seed["alpha"] = min(1.0, seed["alpha"] + 0.25)
            if seed["alpha"] >= 1.0:
                yield self._move(step, path, Stage.SHADOWING, "plane", "alpha has reached its target")
        elif stage is Stage.SHADOWING and seed["shown"] >= 2:
            yield self._move(step, path, Stage.PROBATIONARY, "plane", "the counterfactual was measured at full alpha")
        elif stage is Stage.PROBATIONARY and since >= 4:
            earns = seed["benefit"] > 0
            after = Stage.FOSSILIZED if earns else Stage.WITHERING
            reason = "earned more than its rent" if earns else "earns less than its rent"
            commands.append({"op": "advance" if earns else "wither", "slot": path})
            yield self._move(step, path, after, "heuristic" if earns else "emrakul", reason)
        elif stage is Stage.WITHERING:
            seed["alpha"] = max(0.0, seed["alpha"] - 0.5)
            if seed["alpha"] <= 0.0:
                yield ev.Audited(step=step, slot=path, churn=-0.003, churn_low=-0.006, churn_high=0.0, verdict="cull")
                yield self._move(step, path, Stage.CULLED, "emrakul", "removing it changed nothing")
        elif stage is Stage.CULLED and since >= 3:
            yield self._move(step, path, Stage.DORMANT, "plane", "the embargo is over")
            del self.seeds[path]
            return
        if stage in (Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED, Stage.WITHERING):
            seed["shown"] += 1
            mean = seed["benefit"] * seed["alpha"] + self.random.gauss(0, 0.002)
            width = 0.009 / math.sqrt(seed["shown"])
            yield ev.CounterfactualMeasured(
                step=step,
                slot=path,
                loss_mean=mean,
                loss_low=mean - width,
                loss_high=mean + width,
                examples=180,
                score_mean=mean / 2,
                score_low=(mean - width) / 2,
                score_high=(mean + width) / 2,
                rent=0.05 * seed["params"] / self.host_params,
            )
        yield ev.SlotRead(
            step=step,
            slot=path,
            stage=seed["stage"].value,
            alpha=seed["alpha"],
            readings={"gradient_norm": 0.2 + self.random.random() * 0.1, "proxy_loss": 1.0 / (since + 1)},
        )

    def _catastrophe(self, step: int) -> Iterator[ev.Event]:
        yield ev.GovernorAlarm(step=step, cause="loss beyond moving average + 3 sigma", value=4.71, limit=0.93)
        born = [p for p, s in self.seeds.items() if s["stage"] in (Stage.GERMINATED, Stage.TRAINING)]
        lost = born[-1:]
        for path in lost:
            del self.seeds[path]
            self.culled.add(path)
        guilty = {"op": "germinate", "slot": lost[0], "blueprint": "attention"} if lost else None
        yield ev.RolledBack(step=step, to_step=step - self.per_epoch // 2, lost=lost, guilty=guilty, penalty=-1.0)
        yield ev.CommandRefused(
            step=step + 1,
            op="germinate",
            slot=lost[0] if lost else self.points[0].name,
            source="heuristic",
            reason="embargoed after a rollback",
        )


COMPARE = {
    "metric": "accuracy",
    "arms": [
        {
            "name": "grown",
            "seeds": [0, 1, 2, 3, 4],
            "accuracy": [0.962, 0.958, 0.969, 0.961, 0.964],
            "loss": [0.14, 0.15, 0.13, 0.14, 0.14],
            "params": 11_402_000,
            "flops": 7.1e12,
            "wall_s": 71.0,
        },
        {
            "name": "host alone",
            "seeds": [0, 1, 2, 3, 4],
            "accuracy": [0.941, 0.944, 0.946, 0.938, 0.945],
            "loss": [0.21, 0.2, 0.2, 0.22, 0.21],
            "params": 11_181_642,
            "flops": 6.6e12,
            "wall_s": 58.0,
        },
        {
            "name": "static",
            "seeds": [0, 1, 2, 3, 4],
            "accuracy": [0.959, 0.955, 0.961, 0.957, 0.96],
            "loss": [0.15, 0.16, 0.15, 0.15, 0.15],
            "params": 11_402_000,
            "flops": 8.9e12,
            "wall_s": 80.0,
        },
        {
            "name": "static@FLOPs",
            "seeds": [0, 1, 2, 3, 4],
            "accuracy": [0.953, 0.95, 0.957, 0.951, 0.955],
            "loss": [0.17, 0.17, 0.16, 0.17, 0.17],
            "params": 11_402_000,
            "flops": 7.1e12,
            "wall_s": 64.0,
        },
        {
            "name": "random search",
            "seeds": [0, 1, 2, 3, 4],
            "accuracy": [0.951, 0.949, 0.957, 0.946, 0.952],
            "loss": [0.18, 0.18, 0.17, 0.19, 0.18],
            "params": 11_350_000,
            "flops": 7.1e12,
            "wall_s": 66.0,
        },
        {
            "name": "random controller",
            "seeds": [0, 1, 2, 3, 4],
            "accuracy": [0.945, 0.94, 0.955, 0.942, 0.946],
            "loss": [0.2, 0.2, 0.18, 0.2, 0.2],
            "params": 11_420_000,
            "flops": 7.3e12,
            "wall_s": 72.0,
        },
    ],
    "paired": [
        {"arm": "grown", "minus": "host alone", "mean": 0.02, "low": 0.0148, "high": 0.0252, "n": 5},
        {"arm": "grown", "minus": "static", "mean": 0.0044, "low": 0.0011, "high": 0.0077, "n": 5},
        {"arm": "grown", "minus": "static@FLOPs", "mean": 0.0096, "low": 0.0061, "high": 0.0131, "n": 5},
        {"arm": "grown", "minus": "random search", "mean": 0.0118, "low": 0.007, "high": 0.0166, "n": 5},
        {"arm": "grown", "minus": "random controller", "mean": 0.0172, "low": 0.009, "high": 0.0254, "n": 5},
    ],
}


def write_stream(folder: Path, stream: GrowthStream, *, compare: bool = False, keep: float = 1.0) -> Path:
    """Write a run folder: `run.json`, `events.jsonl` and, if asked, `compare.json`; `keep` cuts the events off."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [event.to_json() for event in stream.events()]
    lines = lines[: max(1, int(len(lines) * keep))]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "host": stream.host,
        "task": stream.task,
        "controller": "heuristic",
        "epochs": stream.epochs,
        "blueprints": sorted(BLUEPRINTS),
        "budget_params": "20%",
        "rent": 0.05,
        "seed": stream.seed,
    }
    manifest = {
        "config": config,
        "versions": {"esper-core": "0.1.0", "torch": "2.13.0"},
        "notes": ["no --task given: timm:resnet18 trains on digits"],
    }
    (folder / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    if compare:
        (folder / "compare.json").write_text(json.dumps(COMPARE), encoding="utf-8")
    return folder
