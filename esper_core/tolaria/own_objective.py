"""The objective for the caller's own model: the one that is named, or the one that fits the targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from esper_core.kasmina.scoring import Function, OwnObjective, refuse_misfit
from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import Batch
from esper_core.leyline.objective import Objective
from esper_core.registry import Registry
from esper_core.tolaria.assembly import options_for
from esper_core.tolaria.config import RunConfig

Loss = str | Objective | Function | None
"""Name of an objective, an objective, a function of outputs and targets, or None to infer it from the targets."""

Judge = str | Function | None
"""The `metric` option of a named objective, a function of outputs and targets, or None for the objective's own."""


def choose_objective(
    config: RunConfig,
    registry: Registry,
    outputs: Tensor,
    sample: Batch,
    loss: Loss = None,
    metric: Judge = None,
    higher_is_better: bool = True,
) -> Objective:
    """The objective that `loss` and `metric` mean, tried on a sample.

    Args:
        config: its `objective` is the same as a name for `loss`.
        outputs: of the model for the first examples of `sample`.
        higher_is_better: of a metric that is a function.

    Raises:
        EsperError: it cannot be built or inferred, or does not fit the sample.
    """
    if config.objective and loss not in (None, config.objective):
        raise BadOption(f"objective={config.objective!r} and loss={loss!r}", "one of them")
    loss = loss if loss is not None else config.objective or None
    few = sample.head(len(outputs)).targets
    if loss is None:
        loss = _infer(outputs, sample.targets)
    if isinstance(loss, str):
        objective = _named(config, registry, loss, outputs, few, metric if isinstance(metric, str) else "")
    elif isinstance(metric, str):
        raise BadOption(f"metric={metric!r} with a loss that is no name", "a function of outputs and targets")
    elif isinstance(loss, Objective):
        objective = loss
    elif callable(loss):
        objective = OwnObjective(loss, metric, higher_is_better=higher_is_better)
        metric = None
    else:
        raise BadOption(f"loss={loss!r}", "the name of an objective, or a function of outputs and targets")
    if callable(metric):
        objective = OwnObjective(metric=metric, base=objective, higher_is_better=higher_is_better)
    refuse_misfit(objective, outputs, few)
    return objective


def _named(config: RunConfig, registry: Registry, name: str, outputs: Tensor, targets: Any, metric: str) -> Objective:
    options: Mapping[str, object] = options_for(config, registry, "objective", name)
    if metric:
        options = {**options, "metric": metric}
    return registry.build("objective", name, outputs=_width(outputs, targets), options=options)  # type: ignore[no-any-return]


def _width(outputs: Tensor, targets: Any) -> int | None:
    """Classes, tokens or values: the last dimension of outputs, or the second where positions follow it."""
    if outputs.dim() < 2:
        return 1
    dense = isinstance(targets, Tensor) and outputs.dim() > 2 and targets.shape == outputs.shape[:1] + outputs.shape[2:]
    language = isinstance(targets, Tensor) and targets.shape == outputs.shape[:-1]
    return int(outputs.shape[1] if dense and not language else outputs.shape[-1])


def _infer(outputs: Tensor, targets: Any) -> str:
    """Name of the only objective that fits outputs and targets.

    Args:
        outputs: of some examples. targets: of a whole batch.

    Raises:
        BadOption: several objectives fit, or none.
    """
    names = "loss=NAME (esper plugins list --kind objective) or a function of outputs and targets"
    if not isinstance(targets, Tensor):
        raise BadOption(f"targets that are a {type(targets).__name__} do not tell the objective", "a loss", names)
    given = f"outputs {tuple(outputs.shape)} and {str(targets.dtype).removeprefix('torch.')} targets"
    given = f"{given} {tuple(targets.shape)}"
    each, wanted = tuple(outputs.shape[1:]), tuple(targets.shape[1:])
    binary = bool(((targets == 0) | (targets == 1)).all())
    if targets.is_floating_point():
        if (each or (1,)) != (wanted or (1,)):
            raise BadOption(f"no objective is known for {given}", "targets of the outputs' shape, or a loss", names)
        if binary:
            raise BadOption(f"{given} that are only 0 and 1 do not tell the objective", "a loss", 'loss="multilabel"')
        return "regression"
    if len(each) == 1 and not wanted:
        return "classification"
    if len(each) == 2 and wanted == each[:1]:
        return "language"
    if len(each) >= 2 and wanted == each[1:]:
        return "dense"
    if len(each) == 1 and wanted == each and binary:
        return "multilabel"
    raise BadOption(f"no objective is known for {given}", "a loss", names)
