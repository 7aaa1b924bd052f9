"""Param groups of the caller's optimizers: from which of them a seed takes its learning rate and other settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from torch import nn

from esper_core.kasmina.paths import base_of
from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import HostProtocol

#: What a seed takes from a group besides the rate, and the option that says otherwise.
ADOPTED: Final = {
    "weight_decay": "weight_decay",
    "decoupled_weight_decay": "weight_decay",
    "momentum": "optimizer.momentum",
    "dampening": "optimizer.momentum",
    "nesterov": "optimizer.momentum",
    "betas": "optimizer.beta2",
}


@attrs.frozen
class GroupRef:
    """A param group of an optimizer, whatever `load_state_dict` puts in its place."""

    optimizer: torch.optim.Optimizer
    index: int

    @property
    def now(self) -> dict[str, Any]:
        """The group."""
        group: dict[str, Any] = self.optimizer.param_groups[self.index]
        return group


def refuse_rates(optimizers: Sequence[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
    """Refuse optimizers whose learning rate is none that a seed's own optimizer could follow.

    Raises:
        BadOption: one of line searches (LBFGS), one that finds its rate itself (Prodigy, D-Adaptation), unless
            `options` has `seed_learning_rate_factor`; or a group without a rate.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        for group in optimizer.param_groups:
            if group.get("lr") is None:
                raise BadOption(f"{name} has no learning rate for seeds to follow", "a number as lr",
                                f"{name}(..., lr=1e-3)")  # fmt: skip
            own = isinstance(optimizer, torch.optim.LBFGS) or "d" in group or "d0" in group
            if own and "seed_learning_rate_factor" not in options:
                raise BadOption(
                    f"the lr={float(group['lr']):g} of {name} is no rate of AdamW, by which seeds would be trained",
                    "an optimizer with one, or the share of it that seeds take",
                    "seed_learning_rate_factor=1e-3",
                )


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside a trainer's wrapper, such as accelerate's, which hides its kind."""
    inner = vars(optimizer).get("optimizer")
    return unwrapped(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def family_of(optimizer: torch.optim.Optimizer | None) -> str:
    """The kind of an optimizer by how its rate is meant: `sgd`, `muon`, or `adamw` for all others."""
    name = type(optimizer).__name__.lower()
    if name == "muon":
        return "muon"
    return "sgd" if isinstance(optimizer, torch.optim.SGD) or name.startswith("sgd") else "adamw"


def kind_for(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """The optimizer for seeds beside the caller's: of the caller's kind, since learning rates differ between kinds.

    `adamw` wins where there are several kinds: its rate fits any seed.
    """
    families = {family_of(optimizer) for optimizer in optimizers}
    return "adamw" if not families or "adamw" in families else min(families)


def adopted(options: Mapping[str, Any]) -> list[str]:
    """Settings that seeds take from the caller's group: those that the user has not set."""
    return [key for key, option in ADOPTED.items() if option not in options]


def source_of(
    host: HostProtocol, path: str, optimizers: Sequence[torch.optim.Optimizer], family: str
) -> GroupRef | None:
    """The param group that holds most of the block before the slot at `path`; None if there are no groups.

    Groups of optimizers of the seed's own kind come first: the rate of Muon would be far too high for AdamW. A block
    without parameters in them is judged by the module that holds it, and so on outwards.
    """
    same = [optimizer for optimizer in optimizers if family_of(optimizer) == family]
    for some in (same, optimizers):
        groups = [GroupRef(one, index) for one in some for index in range(len(one.param_groups))]
        if not groups:
            continue
        owner = {id(p): number for number, group in enumerate(groups) for p in group.now["params"]}
        place: nn.Module | None = _place_of(host, path)
        while place is not None:
            sizes = [0] * len(groups)
            for parameter in place.parameters():
                if id(parameter) in owner:
                    sizes[owner[id(parameter)]] += parameter.numel()
            if any(sizes):
                return groups[sizes.index(max(sizes))]
            place = _around(host.module, place)
        return groups[0]
    return None


def _place_of(host: HostProtocol, path: str) -> nn.Module:
    """The host's submodule behind which the slot stands; the whole host if that is not known."""
    point = base_of(path.partition("/")[0])
    try:
        return host.module.get_submodule(point)
    except AttributeError:
        return host.module


def _around(root: nn.Module, module: nn.Module) -> nn.Module | None:
    """The module that holds `module`; None for the root."""
    if module is root:
        return None
    return next((parent for parent in root.modules() if any(child is module for child in parent.children())), root)
