"""Batches from the items of any loader, with labels aligned as in the model's own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_core.kasmina.feature_trace import pick_logits
from esper_core.kasmina.modes import evaluating
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import IGNORED, Batch, map_tensors

ToBatch = Callable[[Any], Batch]
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def to_batch(
    item: Any, *, shifted: bool | None = None, decoder_inputs: Callable[[Tensor], Tensor] | None = None
) -> Batch:
    """Convert an item of a loader to a batch: `(inputs, …, targets)`, or a mapping with `labels`.

    Several inputs go to the model as its positional arguments.

    Args:
        shifted: whether a label of a mapping belongs to the position before it, as for causal language models. None:
            if the labels are the `input_ids` themselves (where they are not ignored), since a model that sees a token
            is not asked for it. `grow` and `accompany` measure it instead; see `own_convention`.
        decoder_inputs: gives the `decoder_input_ids` that a model makes of its labels, where the item has none. `grow`
            and `accompany` find it; see `settle`.

    Raises:
        EsperError: neither.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping) and "labels" in item:
        inputs = {name: value for name, value in item.items() if name != "labels"}
        targets = item["labels"]
        if decoder_inputs is not None and not _has_decoder_inputs(inputs):
            inputs["decoder_input_ids"] = decoder_inputs(targets)
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

    Raises:
        EsperError: the model's logits depend on labels in a way that is not known.
    """
    if convert is not to_batch:
        return convert
    shifted, decoder_inputs = own_convention(model, item), _decoder_inputs(model, item)
    if shifted is None and decoder_inputs is None:
        return convert
    return partial(to_batch, shifted=shifted, decoder_inputs=decoder_inputs)


def _decoder_inputs(model: nn.Module, item: Any) -> Callable[[Tensor], Tensor] | None:
    """How the model makes its decoder's inputs of labels; None where its logits do not depend on labels.

    Raises:
        EsperError: they do, and the model has no `prepare_decoder_input_ids_from_labels` that gives the same logits.
    """
    if not isinstance(item, Mapping) or not isinstance(item.get("labels"), Tensor) or _has_decoder_inputs(item):
        return None
    few = _few(model, item)
    bare = {name: value for name, value in few.items() if name != "labels"}
    told = _logits(model, few)
    if told is None or _same(told, _logits(model, bare)):
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    make: Any = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if make is not None and _same(told, _logits(model, {**bare, "decoder_input_ids": make(few["labels"])})):
        return make  # type: ignore[no-any-return]
    if _logits(model, bare) is None and make is None:
        return None  # it does not run without labels, and `host_from_module` says so
    raise EsperError(
        f"the logits of {type(base).__name__} are others without the labels of the batch",
        "inputs that hold all that logits depend on, such as decoder_input_ids",
        "DataCollatorForSeq2Seq(tokenizer, model=model), or convert=",
    )


def _has_decoder_inputs(item: Mapping[str, Any]) -> bool:
    return any(item.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))


def _few(model: nn.Module, item: Mapping[str, Any]) -> dict[str, Any]:
    """The first four examples, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    few: Any = map_tensors(lambda t: t[:4].to(device) if t.dim() else t.to(device), dict(item))
    return few  # type: ignore[no-any-return]


def _logits(model: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
    """The model's logits in eval mode, each time with the same random numbers; None where it raises."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
            torch.default_generator.manual_seed(0)  # the devices' own generators stay as they are
            return pick_logits(model(**given))
    except Exception:  # noqa: BLE001 - a model that takes no labels says so in any way it likes
        return None


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def own_convention(model: nn.Module, item: Any) -> bool | None:
    """Whether the model compares each position with the label of the next one, by the loss that it gives itself.

    A model that gives no loss is judged by its configuration and the name of its class.

    Returns:
        None where labels are not one for each position of the logits, or nothing tells.
    """
    labels = item.get("labels") if isinstance(item, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point() or labels.shape[1] < 2:
        return None
    few = _few(model, item)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
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
