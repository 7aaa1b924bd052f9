"""Compiled whole, a host with three live slots is one graph, forward and backward, whatever alpha is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from esper_core.kasmina.plane import Plane
from esper_core.leyline.stages import Stage
from esper_core.testing.blueprint import disturb
from esper_core.testing.cases import installed
from esper_core.testing.host import fitting

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
HOSTS = [
    pytest.param("cnn", "", {}, IMAGES, id="cnn"),
    pytest.param("timm", "test_vit", {}, IMAGES, id="vit"),
    pytest.param("transformers", "gpt2", {"layers": 2, "width": 16, "heads": 2}, TOKENS, id="gpt2"),
]


def grow(name: str, argument: str, options: dict[str, int], example: Tensor) -> Plane:
    """A host with seeds in three slots, about to blend in."""
    outputs = 40 if name == "transformers" else 10
    host = installed().build(
        "host", name, argument, outputs=outputs, input_shape=tuple(example.shape[1:]), seed=0, options=options
    )
    host.module.eval()
    plane = Plane(host, installed())
    for path in list(plane.slots)[:: max(1, len(plane.slots) // 3)][:3]:
        plane.germinate(path, fitting(plane.slots[path].spec))
        disturb(plane.slots[path].seed)
    return plane


def results(run, plane: Plane, example: Tensor) -> list[Tensor]:
    """Logits and every gradient."""
    live = [p for group in plane.seed_groups().values() for p in group]
    parameters = [*plane.host.module.parameters(), *live]
    logits = run(example)
    gradients = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    return [logits.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize(("name", "argument", "options", "example"), HOSTS)
def test_one_graph_while_alpha_sweeps(name: str, argument: str, options: dict[str, int], example: Tensor) -> None:
    plane = grow(name, argument, options, example)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plane.host.forward_with_slots, fullgraph=True, backend=counter)
    for stage, graphs in ((Stage.TRAINING, 1), (Stage.BLENDING, 2)):
        for path in plane.seed_groups():
            while plane.growths[path].stage is not stage:
                plane.advance(path, gated=False)
        for step in range(51 if stage is Stage.BLENDING else 1):
            for path in plane.seed_groups():
                plane.slots[path].alpha.fill_(step / 50)
            ours = results(compiled, plane, example)
            if step % 25 == 0:
                for one, two in zip(ours, results(plane.host.forward_with_slots, plane, example), strict=True):
                    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == graphs, "a stage is one graph, and alpha needs none of its own"
