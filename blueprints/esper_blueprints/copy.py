"""Depth: clones of the host's own blocks, which run once more behind them.

One seed behind the last of the blocks A, B, C that holds all three makes ABCABC: a stack. Seeds of one block behind
each, born by one command that names all slots, make AABBCC: interleaved. Clones take the optimizer's moments of their
sources with them (`moments`). The loss jumps when they begin to blend, and falls below where it was within some hundred
steps; doubling at the peak of a constant learning rate is the use that pays.

`birth`: `copy` leaves the clones as they are; `zero` empties the last layer of each of their branches, so that a clone
is the identity; `random` draws new weights.

Source: Gong et al., "Efficient Training of BERT by Progressively Stacking", 2019; Du et al., "Stacking Your
Transformers", 2024, arXiv:2405.15319; identity blocks: Chen, Goodfellow & Shlens, "Net2Net", 2016, arXiv:1511.05641.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esper_blueprints import cost
from esper_core.kasmina.copies import BlockRun, CopiedRun
from esper_core.leyline.errors import IllegalCommand
from esper_core.leyline.injection import InjectionSpec


def build(point: InjectionSpec, *, run: BlockRun, blocks: str, birth: str, moments: bool) -> nn.Module:
    """The clones.

    Args:
        point: behind a whole block.
        run: the blocks that end there. blocks: how many of them, from the last on; `all`.
        birth: `copy`, `zero` or `random`.
        moments: the clones take the optimizer's moments of their sources with them.

    Raises:
        IllegalCommand: fewer blocks end there, or one of them cannot be cloned or made silent.
    """
    run = run.last(blocks)
    seed = run.clone()
    run.check(seed)
    if birth == "zero":
        silence(seed, run)
    elif birth == "random":
        redraw(seed)
    if not moments or birth != "copy":
        seed.inherits = ()
    return seed


@torch.no_grad()
def silence(seed: CopiedRun, run: BlockRun) -> None:
    """Make each clone the identity by emptying as few layers as will do, the last of each branch.

    Found by trying: with every layer empty a residual block is the identity; then layer after layer, in the order in
    which they run, gets its weights back unless the block would no longer be.

    Raises:
        IllegalCommand: a block is not the identity even then.
    """
    feature, call = run.example()
    for block in seed.blocks:
        layers = _layers(block, lambda block=block: block(feature, call))  # type: ignore[misc]
        kept = [[p.clone() for p in layer.parameters(recurse=False)] for layer in layers]
        for layer in layers:
            for parameter in layer.parameters(recurse=False):
                parameter.zero_()
        if not _is_identity(block, feature, call):
            raise IllegalCommand(
                f"a copy of the block behind {run.path} cannot be silent: it is no sum of its input and branches",
                "birth=copy",
            )
        for layer, weights in zip(layers, kept, strict=True):
            parameters = list(layer.parameters(recurse=False))
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
            if not _is_identity(block, feature, call):
                for parameter in parameters:
                    parameter.zero_()


def _layers(block: nn.Module, run: Callable[[], object]) -> list[nn.Module]:
    """The parts with weights of their own, in the order in which they run."""
    order: list[nn.Module] = []
    parts = [part for part in block.modules() if any(True for _ in part.parameters(recurse=False))]
    handles = [part.register_forward_hook(lambda module, args, output: order.append(module)) for part in parts]
    try:
        _quietly(block, run)
    finally:
        for handle in handles:
            handle.remove()
    return [*dict.fromkeys(order), *(part for part in parts if part not in order)]


def _is_identity(block: nn.Module, feature: Tensor, call: object) -> bool:
    return torch.equal(_quietly(block, lambda: block(feature, call)), feature)


def _quietly(block: nn.Module, run: Callable[[], Any]) -> Any:
    modes = [(part, part.training) for part in block.modules()]
    block.eval()
    try:
        return run()
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def redraw(module: nn.Module) -> None:
    """New weights: by the module's own `reset_parameters`, if it or a part has one; else matrices from N(0, 0.02²).

    A vector without a way of its own becomes ones if its mean is nearer to one than to zero, and zeros otherwise.
    """
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        if parameter.dim() >= 2:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0 if float(parameter.mean()) > 0.5 else 0.0)
    for part in module.children():
        redraw(part)


def estimate(point: InjectionSpec, *, run: BlockRun, blocks: str, birth: str, moments: bool) -> cost.Cost:
    """Parameters and forward FLOPs of one example, as measured of the blocks."""
    return run.last(blocks).cost()
