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

from torch import nn

from esper_blueprints import cost
from esper_core.kasmina.copies import BlockRun
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
    if not moments or birth != "copy":
        seed.inherits = ()
    return seed


def estimate(point: InjectionSpec, *, run: BlockRun, blocks: str, birth: str, moments: bool) -> cost.Cost:
    """Parameters and forward FLOPs of one example, as measured of the blocks."""
    return run.last(blocks).cost()
