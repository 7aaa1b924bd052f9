"""Forward FLOPs as torch counts them: a multiply-add is two, element-wise work is free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of what `run` computes, without gradients.

    Args:
        run: called once.
    """
    # Attention runs as plain matrix products meanwhile: some versions of torch do not count its fused CPU kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
