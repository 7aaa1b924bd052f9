"""Batches from the items of any loader, with labels aligned as in the model's own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_core.kasmina.feature_trace import eval_mode, pick_logits
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import IGNORED, Batch, map_tensors

ToBatch = Callable[[Any], Batch]
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def to_batch(item: Any, *, shifted: bool | None = None) -> Batch:
    """Convert an item of a loader to a batch: `(inputs, …, targets)`, or a mapping with `labels`.

    Several inputs go to the model as its positional arguments.

    Args:
        shifted: whether a label of a mapping belongs to the position before it, as for causal language models. None:
            if the labels are the `input_ids` themselves (where they are not ignored), since a model that sees a token
            is not asked for it. `grow` and `accompany` measure it instead; see `own_convention`.

    Raises:
        EsperError: neither.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping) and "labels" in item:
        inputs = {name: value for name, value in item.items() if name != "labels"}
        targets = item["labels"]
        if _are_inputs(targets, inputs.get("input_ids")) if shifted is None else shifted:
            targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], dim=1)
        return Batch(inputs, targets)
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) >= 2:
        return Batch(item[0] if len(item) == 2 else tuple(item[:-1]), item[-1])
    raise EsperError(
        f"the loader yields a {type(item).__name__}", "(inputs, targets) or a mapping with labels", "convert="
    )


def settle(convert: ToBatch, model: nn.Module, item: Any) -> ToBatch:
    """`convert`, or where that is `to_batch`, the same by the model's own convention.

    Args:
        item: what the loader yields, by which it is measured.
    """
    if convert is not to_batch:
        return convert
    shifted = own_convention(model, item)
    return convert if shifted is None else partial(to_batch, shifted=shifted)


def own_convention(model: nn.Module, item: Any) -> bool | None:
    """Whether the model compares each position with the label of the next one, by the loss that it gives itself.

    A model that gives no loss is judged by its configuration and the name of its class.

    Returns:
        None where labels are not one for each position of the logits, or nothing tells.
    """
    labels = item.get("labels") if isinstance(item, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point() or labels.shape[1] < 2:
        return None
    device = next((p.device for p in model.parameters()), labels.device)
    few: Any = map_tensors(lambda t: t[:4].to(device), dict(item))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(model):
            output = model(**few)
            logits, loss = pick_logits(output), _loss_of(output)
    except Exception:  # noqa: BLE001 - a model that takes no labels says so in any way it likes
        loss, logits = None, None
    if loss is not None and logits is not None and logits.shape[:2] == few["labels"].shape and logits.dim() == 3:
        own, plain, moved = (float(x) for x in (loss, *_both(logits.float(), few["labels"])))
        near, far = sorted((abs(own - plain), abs(own - moved)))
        if near < 0.01 * max(1.0, abs(own)) and near < 0.5 * far:
            return abs(own - moved) < abs(own - plain)
    return _by_class(model)


def _both(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with each position's own label, and with that of the next."""
    plain = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    moved = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return plain, moved


def _loss_of(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None


def _by_class(model: nn.Module) -> bool | None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = getattr(base, "config", None)
    if config is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        return False
    return type(base).__name__.endswith(_CAUSAL) or None


def _are_inputs(labels: Any, ids: Any) -> bool:
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape or labels.dim() != 2:
        return False
    counted = labels != IGNORED
    return bool(counted.any()) and bool((labels[counted] == ids[counted]).all())
