"""Registers the objectives that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import ObjectiveSpec

_SMOOTHING = Option(
    "label_smoothing",
    "float",
    0.0,
    "share of each target that is spread over all classes, in training only",
    minimum=0.0,
    maximum=0.999,
)
_WEIGHTS = Option("class_weights", "str", "", "one weight a class, separated by commas; empty: all alike")


def _tokens(name: str, summary: str) -> ObjectiveSpec:
    return ObjectiveSpec(
        name=name,
        summary=summary,
        factory=f"esper_plugins.objectives.tokens:{name}",
        options=(
            Option("metric", "str", "accuracy", "what is reported", choices=("accuracy", "bits-per-byte")),
            Option("bytes_per_token", "float", 1.0, "of the data, for bits per byte", minimum=1e-6),
            _SMOOTHING,
        ),
        capabilities=frozenset({"language", "sequence"}),
    )


@hookimpl
def esper_objectives() -> list[ObjectiveSpec]:
    """Every objective of this package."""
    return [
        ObjectiveSpec(
            name="classification",
            summary="cross-entropy over one class an example; accuracy",
            factory="esper_plugins.objectives.classes:Classification",
            options=(_SMOOTHING, _WEIGHTS),
            capabilities=frozenset({"classification"}),
            source="label smoothing: Szegedy et al., CVPR 2016, arXiv:1512.00567",
        ),
        _tokens("language", "next token, where the targets are shifted already; accuracy or bits per byte"),
        _tokens("causal", "next token, where the targets are the input's own tokens; accuracy or bits per byte"),
        _tokens("masked", "the masked tokens, all other targets being -100; accuracy or bits per byte"),
        ObjectiveSpec(
            name="regression",
            summary="squared, absolute or Huber error over numbers; mean absolute error",
            factory="esper_plugins.objectives.numbers:Regression",
            options=(
                Option("loss", "str", "mse", "what is minimised", choices=("mse", "mae", "huber")),
                Option("metric", "str", "mae", "what is reported", choices=("mae", "mse")),
                Option("delta", "float", 1.0, "where the Huber loss becomes linear", minimum=1e-12),
            ),
            capabilities=frozenset({"regression"}),
            source="Huber, Annals of Mathematical Statistics 35 (1964)",
        ),
        ObjectiveSpec(
            name="multilabel",
            summary="binary cross-entropy over labels that are 0 or 1; F1 of each example",
            factory="esper_plugins.objectives.labels:Multilabel",
            options=(
                Option("metric", "str", "f1", "what is reported", choices=("f1", "accuracy", "exact-match")),
                Option("positive_weight", "float", 1.0, "weight of a label that is 1, in training only", minimum=1e-6),
            ),
            capabilities=frozenset({"multilabel"}),
        ),
        ObjectiveSpec(
            name="dense",
            summary="cross-entropy over one class a position (segmentation); mean IoU or pixel accuracy",
            factory="esper_plugins.objectives.classes:Dense",
            options=(
                Option("metric", "str", "iou", "what is reported", choices=("iou", "accuracy")),
                _SMOOTHING,
                _WEIGHTS,
            ),
            capabilities=frozenset({"segmentation"}),
        ),
    ]
