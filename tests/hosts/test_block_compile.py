"""A host compiled block by block: the same results, one compilation for all blocks and for their copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from esper_core.kasmina import block_compile
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.stages import Op, Stage
from esper_core.testing.cases import installed


@pytest.fixture
def counted(monkeypatch) -> CompileCounterWithBackend:
    """Compilations by a backend that computes eagerly."""
    counter, compiler = CompileCounterWithBackend("eager"), torch.compile
    block_compile.compiled_class.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=counter, **how))
    torch._dynamo.reset()
    yield counter
    block_compile.compiled_class.cache_clear()


def gpt(seed: int = 0):
    options = {"layers": 3, "width": 16, "heads": 2}
    return installed().build("host", "gpt", outputs=40, input_shape=(12,), seed=seed, options=options)


def gradients(host, tokens: Tensor) -> list[Tensor]:
    host.module.zero_grad()
    host.forward_with_slots(tokens).square().mean().backward()
    return [p.grad.clone() for p in host.module.parameters()]


def test_blocks_and_their_copies_are_compiled_once(counted) -> None:
    tokens = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    host, keys = gpt(), list(gpt().module.state_dict())
    expected = gradients(host, tokens)
    assert host.compile_blocks() == ["blocks.0", "blocks.1", "blocks.2"]
    assert host.compile_blocks() == ["blocks.0", "blocks.1", "blocks.2"]  # twice is once
    for found, known in zip(gradients(host, tokens), expected, strict=True):
        torch.testing.assert_close(found, known)
    assert counted.frame_count == 1 and list(host.module.state_dict()) == keys
    deeper = copy.deepcopy(host.module.blocks)
    host.module.blocks.extend(deeper)
    assert deeper[0].qkv.weight is not host.module.blocks[0].qkv.weight
    gradients(host, tokens)
    assert deeper[0].qkv.weight.grad is not None and counted.frame_count == 1


def test_slots_stand_outside_of_what_is_compiled(counted) -> None:
    tokens = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    host = gpt()
    host.compile_blocks()
    gradients(host, tokens)
    seen: list[tuple[int, ...]] = []

    def slot(h: Tensor) -> Tensor:
        seen.append(tuple(h.shape))
        return h + 1.0

    host.register_slot("blocks.1", slot)
    changed = gradients(host, tokens)
    host.unregister_slot("blocks.1")
    assert seen == [(4, 12, 16)] and not torch.equal(changed[0], gradients(host, tokens)[0])
    assert counted.frame_count == 1


def test_a_deepening_compiles_no_block_again(counted) -> None:
    tokens = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    host = gpt()
    plane = Plane(host, installed(), blueprints=["copy"])
    host.compile_blocks()
    gradients(host, tokens)
    for height, slot in enumerate(("blocks.2", "blocks.2+1")):
        command = Command(Op.GERMINATE, slot, "copy", tempo=Tempo.INSTANT, options={"blocks": "all"})
        plane.apply_all(command)
        while plane.growths[slot].stage is not Stage.FOSSILIZED:
            plane.advance(slot, gated=False)
        gradients(host, tokens)
        assert len(list(plane.module.parameters())) == 6 * 3 * (2 ** (height + 1) - 1)
    assert counted.frame_count == 1
