"""What can be sensed: the names that stages, hosts and blueprints may list as their sensors. Imports no torch.

Shapes: `h` is the host's feature at a slot, `s` the seed's output, `g` the gradient of the batch's mean loss with
respect to the slot's output; all (N, …).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Final

from esper_core.leyline.errors import EsperError, did_you_mean

SLOT_FIELDS: Final = MappingProxyType(
    {
        "stage": "the stage of the lifecycle",
        "age": "decision steps since germination",
        "alpha": "weight of the seed in the slot's output",
        "counterfactual": "validation loss without the slot minus with it, with its 95% interval (nats)",
    }
)
"""Fields of `SlotView` that are known or measured at every decision."""

READINGS: Final = MappingProxyType(
    {
        "host_gradient_norm": "‖g‖ over the batch: how hard the loss pulls at the slot's output",
        "need": "Σ ‖g_i‖·‖h_i‖ over examples: nats that the best small change could gain, for each unit of ‖s‖/‖h‖",
        "delta_norm": "‖s‖/‖h‖: how large the seed's output is beside the host's feature",
        "activation_mean": "mean of the seed's output",
        "activation_std": "standard deviation of the seed's output",
        "proxy_loss": "⟨g, s⟩: to first order, the change of the loss if the seed's output were added (nats)",
        "proxy_error": "standard error of `proxy_loss` over the batches since the last reading",
        "proxy_progress": "fall of `proxy_loss` since the seed's first batch (nats); positive is good",
        "gradient_norm": "norm of the gradient of the seed's parameters",
        "gradient_ratio": "root mean square of the seed's parameter gradients over that of the host's",
        "update_ratio": "norm of one optimizer step of the seed's parameters over the norm of these",
        "not_finite": "how many readings were infinite or not a number; these are left out",
    }
)
"""Keys of `SlotView.readings` that are gathered while the model trains. All but the first two need a seed."""

TREE_READINGS: Final = MappingProxyType(
    {
        "tree_seeds": "seeds in the slot's tree: its own, and all that grow inside it",
        "tree_params": "parameters of these seeds, on which the tree pays rent",
        "tree_flops": "forward FLOPs of these seeds for one example",
        "tree_gradient_norm": "norm of the gradient of all their parameters",
        "tree_not_finite": "how many of their readings were infinite or not a number",
    }
)
"""Readings of a seed inside which others grow, summed up its tree at every decision."""

HOST_READINGS: Final = MappingProxyType(
    {
        "attention_entropy": "mean entropy (nats) of the host's K-th attention, or of one in the seed at a path",
        "layer_loss": "⟨dL/dh, change of h⟩: to first order, what the layers before a slot do to the loss (nats)",
    }
)
"""Readings of a host that works on sequences; in `HostRead` events `.K` or `.PATH` is appended to the key."""

SENSORS: Final = MappingProxyType({**SLOT_FIELDS, **READINGS, **TREE_READINGS, **HOST_READINGS})
"""Every sensor that is delivered, with its meaning."""


def check_sensors(names: Iterable[str]) -> None:
    """Refuse a name that no sensor delivers.

    Raises:
        EsperError: names the sensor, and the nearest one that exists.
    """
    for name in names:
        if name not in SENSORS:
            hint = did_you_mean(name, SENSORS)
            raise EsperError(f"no sensor delivers {name!r}", f"some of {', '.join(SENSORS)}", hint)
