"""Made-up views: enough variety for properties of encoders and policies."""

from __future__ import annotations

import random

from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.stages import STAGES, Op, Stage, legal_ops
from esper_core.leyline.view import BlueprintView, Interval, RunView, SlotView

BLUEPRINTS = (
    ("depthwise", "convolution", frozenset({"spatial"}), 400, 50_000),
    ("attention", "attention", frozenset({"sequence", "spatial"}), 4_000, 400_000),
    ("norm", "normalization", frozenset(), 60, 4_000),
)


def make_slot(rng: random.Random, order: int, stage: Stage | None = None) -> SlotView:
    stage = stage or rng.choice(list(Stage))
    occupied = STAGES[stage].occupied
    name, family, tags, params, flops = rng.choice(BLUEPRINTS)
    candidates = tuple(BlueprintView(n, f, t, p * (order + 1), c) for n, f, t, p, c in BLUEPRINTS)
    measured = stage in (Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED)
    mean = rng.gauss(0, 0.02)
    width = 8 * (order + 1)
    spec = InjectionSpec(f"block{order}", width, "NCHW", order, (width, 4, 4))
    return SlotView(
        path=spec.name, spec=spec,
        stage=stage, alpha=rng.random() if STAGES[stage].contributes else 0.0, age=rng.randrange(9),
        stage_age=rng.randrange(5), blueprint=name if occupied else "", blend="residual:cosine" if occupied else "",
        params=params if occupied else 0, flops=flops if occupied else 0, legal=legal_ops(stage),
        blueprints=candidates if Op.GERMINATE in legal_ops(stage) else (),
        counterfactual=Interval(mean, mean - 0.01, mean + 0.01, 300) if measured else None,
        accuracy_counterfactual=Interval(mean / 3, -0.01, 0.01, 300) if measured else None,
        readings={"gradient_norm": rng.random(), "proxy_progress": rng.gauss(0, 1)} if occupied else {},
        embargo_left=rng.randrange(2), seed_family=family if occupied else "",
        seed_tags=tags if occupied else frozenset(),
    )  # fmt: skip


def make_view(seed: int = 0, slots: int = 3, decision: int = 3, stages: tuple[Stage, ...] | None = None) -> RunView:
    rng = random.Random(seed)
    views = tuple(make_slot(rng, i, stages[i] if stages else None) for i in range(slots))
    return RunView(
        decision=decision, decisions=12, epoch=decision / 4, epochs=3,
        train_loss=rng.random() + 0.1 if decision else None,
        validation_loss=rng.random() + 0.1, validation_accuracy=rng.random(),
        history=tuple((rng.random(), rng.random(), rng.random()) for _ in range(decision)),
        host_params=2_000, host_flops=300_000, seed_params=sum(s.params for s in views),
        seed_flops=sum(s.flops for s in views), params_left=5_000, flops_left=None, rent=0.05, learning_rate=0.8,
        governor="calm", rollbacks=0, slots=views, blends=("residual:cosine", "gated:linear"),
    )  # fmt: skip


BLENDS = ((0.15, 0.5, 0.85, 0.0, 0.0), (0.25, 0.5, 0.75, 1.0, 1.0))
"""Descriptors of the two blends of `make_view`."""
