"""Compiled block by block, a host recompiles only where the set of seeds has changed."""

from __future__ import annotations

import torch
from torch._dynamo.testing import CompileCounter

from tests.kasmina.small import batch, small_plane


def test_a_germination_recompiles_its_own_block_only() -> None:
    plane = small_plane()
    plane.host.module.eval()
    torch.compiler.reset()
    counters = [CompileCounter() for _ in plane.host.module.blocks]
    for block, counter in zip(plane.host.module.blocks, counters, strict=True):
        block.compile(fullgraph=True, backend=counter)
    x, _ = batch()
    with torch.no_grad():
        plane.host.forward_with_slots(x.clone())
        before = [counter.frame_count for counter in counters]
        plane.germinate("block1", "poly")
        for _ in range(2):
            plane.advance("block1", gated=False)
        plane.slots["block1"].seed.last.bias.fill_(1.0)
        for step in range(11):
            plane.slots["block1"].alpha.fill_(step / 10)
            out = plane.host.forward_with_slots(x.clone())
    after = [counter.frame_count for counter in counters]
    assert before == [1, 1, 1] and after[0] == 1 and after[2] == 1
    assert after[1] <= 2
    fresh = small_plane().host
    fresh.module.eval()
    with torch.no_grad():
        assert not torch.equal(out, fresh.forward_with_slots(x.clone())), "the seed shows"
