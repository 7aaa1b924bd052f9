"""Checks of objectives against a model and its targets, and the objective made of a user's functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.host import IGNORED, list_tensors, map_tensors
from esper_core.leyline.objective import Metric, Objective

Function = Callable[[Tensor, Any], Tensor]
"""Maps outputs (N, …) and targets to one value for each example, (N,) or (N, …), or to their mean, 0-dim."""


class BadScores(BadOption):
    """An objective's scores are not one loss and one metric for each example."""


def refuse_misfit(objective: Objective, outputs: Tensor, targets: Any) -> None:
    """Make sure that `objective` can judge such outputs by such targets; nothing is trained.

    Args:
        outputs: of the model, (N, …). targets: of the same examples.

    Raises:
        EsperError: it cannot, or what it computes is not what an objective computes.
    """
    objective.check(outputs, targets)
    count, name = len(outputs), describe_objective(objective)
    given = f"on outputs {_words(outputs)} and targets {', '.join(map(_words, list_tensors(targets)))}"
    with torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        loss = _call(f"{name} {given}: the loss", lambda: objective.loss(leaf, targets))
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise BadOption(f"{name} {given}: the loss is {_words(loss)}", "one number, 0-dim")
    if not loss.requires_grad:
        raise BadOption(
            f"{name} {given}: the loss has no gradient", "a loss that torch can differentiate by the outputs"
        )
    with torch.no_grad():
        scores = _call(f"{name} {given}: the scores", lambda: objective.scores(outputs.detach(), targets))
    refuse_scores(scores, count, f"{name} {given}")


def refuse_scores(scores: Any, count: int, where: str) -> None:
    """Make sure that `scores` are loss and metric of each of `count` examples. Looks at shapes alone.

    Raises:
        BadScores: their shape is another one. A single number would be broadcast to all examples.
    """
    if not isinstance(scores, tuple | list) or len(scores) != 2:
        raise BadScores(f"{where}: the scores are {_words(scores)}", "loss and metric of each example")
    for what, each in zip(("loss", "metric"), scores, strict=True):
        if not isinstance(each, Tensor) or each.shape != (count,):
            raise BadScores(f"{where}: the {what} of each example is {_words(each)}", f"shape ({count},)")


def describe_objective(objective: Objective) -> str:
    """The objective in an error message."""
    return str(getattr(objective, "name", "") or f"objective {type(objective).__name__}")


class OwnObjective:
    """An objective made of functions.

    A function returns one value for each example, (N,) or (N, …), or with their mean, 0-dim. One that gives the
    mean only is called once for each example where examples are paired; a `torch.nn` loss is asked not to reduce.

    Args:
        loss: trains. Replaced by `base`'s where there is one.
        metric: judges beside the loss; None for the loss itself.
        higher_is_better: of the metric. base: an objective of which only the metric is replaced.
    """

    def __init__(
        self,
        loss: Function | None = None,
        metric: Function | None = None,
        *,
        higher_is_better: bool = True,
        base: Objective | None = None,
    ) -> None:
        if (loss is None) == (base is None):
            raise ValueError("either a loss or a base")
        self._loss, self._metric, self._base = loss, metric, base
        unit = base.metric.loss_unit if base is not None else ""
        self.metric = (
            Metric(_name(metric), higher_is_better, share=False, loss_unit=unit)
            if metric is not None
            else Metric("loss", higher_is_better=False, share=False, loss_unit=unit)
        )
        self.name = describe_objective(base) if base is not None else f"loss {_name(loss)}"
        self._means = False  # the loss function gives the mean of a batch, of the positions that count

    @property
    def chance(self) -> float | None:
        """None: unknown for a function of the user's."""
        return self._base.chance if self._base is not None else None

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Accepts everything; `refuse_misfit` calls the functions."""
        if self._base is not None:
            self._base.check(outputs, targets)

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """The mean of what the function gives, 0-dim."""
        if self._base is not None:
            return self._base.loss(outputs, targets)
        assert self._loss is not None
        value = self._loss(outputs, targets)
        self._means = isinstance(value, Tensor) and value.dim() == 0
        return value.mean() if isinstance(value, Tensor) and value.dim() else value

    def weigh(self, targets: Any) -> Tensor | None:
        """How much each example counts where several are averaged, (N,); None if all count alike.

        As many as its positions that count, where the targets are integers (N, …) and the loss is a mean over them.
        """
        if self._base is not None:
            weigh = getattr(self._base, "weigh", None)
            return weigh(targets) if weigh is not None else None
        if not self._means or not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dim() < 2:
            return None
        return (targets != getattr(self._loss, "ignore_index", IGNORED)).flatten(1).sum(1)

    def scores(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Loss and metric of each example, (N,) each."""
        if self._base is not None:
            losses = self._base.scores(outputs, targets)[0]
        else:
            assert self._loss is not None
            losses = _of_each(self._loss, outputs, targets)
        return losses, losses if self._metric is None else _of_each(self._metric, outputs, targets)

    def tally(self, outputs: Tensor, targets: Any) -> None:
        """None: the cost of the functions is unknown."""


def _of_each(function: Function, outputs: Tensor, targets: Any) -> Tensor:
    """The function's value for each example, float32 (N,)."""
    if isinstance(function, nn.Module) and getattr(function, "reduction", "none") != "none":
        whole = copy.copy(function)
        whole.reduction = "none"  # type: ignore[assignment]
        values = whole(outputs, targets).flatten(1) if len(outputs) else outputs.new_zeros(0, 1)
        if function.reduction != "mean":
            return values.sum(1).float()
        ignored = getattr(function, "ignore_index", None)
        if ignored is None or targets.dim() < 2:
            return values.mean(1).float()
        counted: Tensor = (targets != ignored).flatten(1).sum(1).clamp(min=1)
        return (values.sum(1) / counted).float()
    value = function(outputs, targets)
    if isinstance(value, Tensor) and value.dim():
        return value.float() if value.dim() == 1 else value.flatten(1).mean(1).float()
    each = [
        torch.as_tensor(function(outputs[i : i + 1], map_tensors(lambda t, i=i: t[i : i + 1], targets)))  # type: ignore[misc]
        for i in range(len(outputs))
    ]
    return torch.stack(each).to(outputs.device).float()


def _name(function: object) -> str:
    return str(getattr(function, "__name__", "") or type(function).__name__)


def _words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def _call(what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except EsperError:
        raise
    except Exception as error:  # objectives are plugins, and this is their first call
        raise BadOption(
            f"{what} raised {type(error).__name__}: {error}", "an objective that fits model and targets"
        ) from error
