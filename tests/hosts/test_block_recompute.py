"""Activation checkpointing of blocks: the same gradients, less memory, copies that recompute too, clear refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from esper_core.kasmina.block_recompute import FLAG, recompute_blocks
from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.errors import BadOption
from esper_core.leyline.stages import Op, Stage
from esper_core.testing.cases import installed
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.grow import grow
from esper_core.tolaria.setup import set_up

TOKENS = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))


def gpt() -> ModuleHost:
    options = {"layers": 4, "width": 16, "heads": 2}
    return installed().build("host", "gpt", outputs=40, input_shape=(12,), seed=0, options=options)


def train_once(host: ModuleHost) -> tuple[list[Tensor], int]:
    """Gradients, and bytes that autograd kept between the passes, the model's own weights left out."""
    own = {p.data_ptr() for p in host.module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    host.module.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = host.forward_with_slots(TOKENS).square().mean()
    loss.backward()
    return [p.grad.clone() for p in host.module.parameters()], sum(kept.values())


@pytest.mark.parametrize(("every", "chosen"), [(1, [0, 1, 2, 3]), (2, [0, 2])])
def test_gradients_are_the_same_and_less_is_kept(every: int, chosen: list[int]) -> None:
    host, keys = gpt(), list(gpt().module.state_dict())
    expected, before = train_once(host)
    assert host.recompute_blocks(every) == [f"blocks.{number}" for number in chosen]
    found, after = train_once(host)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert after < before * (0.4 if every == 1 else 0.75)
    assert list(host.module.state_dict()) == keys


def test_a_block_runs_twice_in_training_and_once_in_a_reading() -> None:
    host, calls = gpt(), []
    host.recompute_blocks()
    host.module.blocks[1].up.register_forward_hook(lambda *_: calls.append(1))
    train_once(host)
    assert len(calls) == 2
    host.module.eval()
    host.forward_with_slots(TOKENS).sum().backward()
    host.module.train()
    with torch.no_grad():
        host.forward_with_slots(TOKENS)
    assert len(calls) == 4


def test_dropout_draws_the_same_numbers_both_times() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.line(x)).relu()

    torch.manual_seed(1)
    model = nn.Sequential(Noisy(), Noisy(), nn.Linear(8, 3))
    other, x = copy.deepcopy(model), torch.randn(5, 8)
    recompute_blocks(other, ["0", "1"])
    grads = []
    for one in (model, other):
        torch.manual_seed(2)
        one(x).square().sum().backward()
        grads.append([p.grad for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_copies_recompute_as_their_originals_do() -> None:
    host = gpt()
    plane = Plane(host, installed(), blueprints=["copy"])
    host.recompute_blocks(2)
    slot = "blocks.3"
    plane.apply_all(Command(Op.GERMINATE, slot, "copy", tempo=Tempo.INSTANT, options={"blocks": "all"}))
    while plane.growths[slot].stage is not Stage.FOSSILIZED:
        plane.advance(slot, gated=False)
    calls: list[int] = []
    copies = [m for m in plane.module.modules() if hasattr(m, "qkv")]
    assert [getattr(m, FLAG, False) for m in copies] == [True, False, True, False]
    for number, block in enumerate(copies):
        block.up.register_forward_hook(lambda *_, number=number: calls.append(number))
    train_once(host)
    assert sorted(calls) == [0, 0, 1, 2, 2, 3]


def test_of_nested_points_the_innermost_recompute() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    assert recompute_blocks(model, ["0", "0.1", "1", "1"]) == ["0.1", "1"]
    assert recompute_blocks(model, ["0.1", "1"]) == ["0.1", "1"]  # twice is once
    calls: list[int] = []
    model[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 4)).sum().backward()
    assert len(calls) == 1  # its own hooks stand outside


def test_what_cannot_run_twice_is_refused() -> None:
    with pytest.raises(BadOption, match=r"0\.norm updates running statistics"):
        recompute_blocks(nn.Sequential(nn.ModuleDict({"norm": nn.BatchNorm2d(3)})), ["0"])
    with pytest.raises(BadOption, match="no block"):
        recompute_blocks(nn.Sequential(nn.Linear(2, 2)), [])
    cnn = installed().build("host", "cnn", outputs=10, input_shape=(3, 8, 8), seed=0)
    with pytest.raises(BadOption, match="running statistics"):
        assembly.recompute_host(cnn, RunConfig(recompute="blocks"))
    with pytest.raises(BadOption, match="--recompute half with slots around layers"):
        assembly.recompute_host(gpt(), RunConfig(recompute="half", slots="around:attn"))
    with pytest.raises(BadOption, match="esper run --recompute"):
        grow(gpt().module, [(TOKENS, TOKENS)], [(TOKENS, TOKENS)], recompute="half")


def test_a_run_recomputes_what_it_is_told_to(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what a run is told to compute twice, it computes twice; " * 200)
    config = RunConfig(
        host="gpt", task=f"text:{text}", recompute="half", device="cpu", settings={"gpt.layers": 3, "text.length": 16}
    )
    blocks = set_up(config).plane.host.module.blocks
    assert [getattr(block, FLAG, False) for block in blocks] == [True, False, True]
