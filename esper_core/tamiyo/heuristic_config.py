"""The thresholds of the heuristic controller, each settable with `--set heuristic.NAME=VALUE`."""

from __future__ import annotations

import attrs

from esper_core.leyline.options import option_field


@attrs.frozen
class HeuristicConfig:
    """When, where and what the heuristic grows. Shares are of the run's decision steps."""

    start: float = option_field(0.3, "share of the run before the first germination", 0.0, 1.0)
    last: float = option_field(0.7, "share of the run after which nothing new germinates", 0.0, 1.0)
    deepen_last: float = option_field(
        0.25, "share of a budget of FLOPs that is spent when depth doubles for the last time", 0.0, 1.0
    )
    deepen_order: str = option_field(
        "stack", "order of copies: stack (ABCABC), better with adamw, or interleave (AABBCC), better with muon",
        choices=("stack", "interleave"),
    )  # fmt: skip
    at_once: int = option_field(
        0,
        "largest number of seeds that are alive and not yet fossilised; 0: 8, or half of the slots if that is more",
        0,
    )
    isolation: float = option_field(
        0.0, "share of the run that a seed trains in isolation (at least one decision)", 0.0, 1.0
    )
    learning_patience: int = option_field(
        4, "decisions after which a seed that has not learnt in isolation is culled", 1
    )
    trial: float = option_field(
        0.15, "share of the run in which a blended seed is withered only if it clearly harms", 0.0, 1.0
    )
    verdict: float = option_field(
        0.7, "share of the run from which a seed is judged even where its gain is uncertain", 0.0, 1.0
    )
    harm: float = option_field(0.02, "lower bound of the loss (nats), rent included, that counts as clear harm", 0.0)
    ramp: float = option_field(0.1, "share of the run that blending is expected to take", 0.0, 1.0)
    prior_gain: float = option_field(0.1, "gain (nats) expected of a seed of a tenth of the host, at prior 1", 0.0)
    prior_weight: float = option_field(1.0, "how many measured seeds the prior of a family counts for", 0.0)
    elasticity: float = option_field(0.3, "exponent of a seed's size in its expected gain", 0.0, 1.0)
    need_power: float = option_field(
        0.5, "exponent of a slot's measured need in the expected gain; 0 ignores it", 0.0, 2.0
    )
    failure_factor: float = option_field(
        0.5, "factor on the gain expected of a slot and blueprint for each time that they failed", 0.0, 1.0
    )
