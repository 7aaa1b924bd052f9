"""What a training step with lora seeds around layers costs beside peft's LoRA of equal rank and placement.

Run: OMP_NUM_THREADS=1 python -m benchmarks.around [--json FILE]
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.timing import interleaved, interval, ratio, run_program
from esper_core.kasmina.around import path_of, resolve_points
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Tempo
from esper_core.registry import load_registry

RANK: Final = 4
SIZES: Final = {"small": (4, 192), "wide": (4, 384)}
"""Layers and width of a BERT."""
SHAPE: Final = (8, 128)
"""Sequences in a batch, tokens in each."""


def build(layers: int, width: int) -> nn.Module:
    """A frozen BERT of random weights with a head for classification, without dropout."""
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width,
        vocab_size=1000, num_labels=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model.requires_grad_(False)


def stepper(model: nn.Module, parameters: list[nn.Parameter]) -> Callable[[], Tensor]:
    """What trains `parameters` one step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    tokens = torch.randint(1000, SHAPE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(SHAPE[0]) % 8
    model.train()

    def step() -> Tensor:
        loss = torch.nn.functional.cross_entropy(model(tokens).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def kept_bytes(model: nn.Module) -> int:
    """Bytes that autograd keeps of one forward pass, each storage once: what memory a step takes beyond the weights."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randint(1000, SHAPE)).logits.sum()
    del loss
    return sum(size for place, size in seen.items() if place not in own)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """A step of the same host with seeds and with peft's adapters, in turn."""
    plain = build(*SIZES[name])
    with_peft, with_seeds = copy.deepcopy(plain), plain
    host = host_from_module(with_seeds, example=torch.randint(1000, (1, SHAPE[1])))
    plane = Plane(host, load_registry(), points=resolve_points(host, ("around:attn", "mlp")), blueprints=["lora"])
    for path in plane.slots:
        plane.germinate(path, "lora", tempo=Tempo.INSTANT, options={"rank": RANK})
    plane.step()
    seeds = [p for group in plane.seed_groups().values() for p in group]
    layers = [path_of(path) for path in plane.slots]
    wrapped = get_peft_model(with_peft, LoraConfig(r=RANK, target_modules=layers))
    adapters = [p for p in wrapped.parameters() if p.requires_grad]
    assert sum(p.numel() for p in seeds) == sum(p.numel() for p in adapters)
    kept = kept_bytes(with_seeds.train()), kept_bytes(wrapped.train())
    steps = {"seeds": stepper(with_seeds, seeds), "peft": stepper(wrapped, adapters)}
    seconds = interleaved(steps, rounds=rounds, shuffled=True, clock=time.process_time)
    low, high = interval(seconds, "seeds", "peft")
    return {
        "host": name, "layers": len(layers), "rank": RANK, "added": sum(p.numel() for p in seeds),
        "step_ms": round(1000 * statistics.median(seconds["peft"]), 2),
        "ratio": round(ratio(seconds, "seeds", "peft"), 4), "interval": [round(low, 4), round(high, 4)],
        "memory": round(kept[0] / kept[1], 4), "kept_mb": [round(size / 1e6, 2) for size in kept],
    }  # fmt: skip


if __name__ == "__main__":
    run_program(__doc__ or "", measure, SIZES)
