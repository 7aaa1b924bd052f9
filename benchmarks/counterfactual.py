"""All eight on/off masks of three slots by the prefix tree, against eight full forwards; equal bit for bit.

Hosts: ResNet-18 and a GPT-2, slots late and spread: the speed depends on how much of the network lies before each slot.
`bound` is what it would be if sharing cost nothing, from the share of a forward pass's time that lies before each slot.
Each measurement reads several batches, as a decision does, and learns the order of the slots once.

Run: OMP_NUM_THREADS=1 python -m benchmarks.counterfactual [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved, machine, ratio
from esper_core.kasmina.counterfactual import every_mask
from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.prefix_tree import PrefixTree
from esper_core.registry import load_registry

BATCHES = 4
"""Batches in one measurement."""


def resnet18() -> tuple[nn.Module, Tensor]:
    """ResNet-18 on 64×64 images, batch 32, channels last."""
    import timm

    model = timm.create_model("resnet18", num_classes=10).to(memory_format=torch.channels_last)
    return model, torch.randn(32, 3, 64, 64).to(memory_format=torch.channels_last)


def gpt2() -> tuple[nn.Module, Tensor]:
    """A GPT-2 of 6 layers and width 128 on 4 sequences of 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=256, n_positions=128, n_embd=128, n_layer=6, n_head=4, use_cache=False)
    return GPT2LMHeadModel(config), torch.randint(0, 256, (4, 128))


CASES: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "resnet18, last stages": (resnet18, ("layer3.1", "layer4.0", "layer4.1"), "depthwise"),
    "resnet18, one a stage": (resnet18, ("layer2", "layer3", "layer4"), "depthwise"),
    "gpt2, last blocks": (gpt2, ("transformer.h.3", "transformer.h.4", "transformer.h.5"), "bottleneck_adapter"),
    "gpt2, spread": (gpt2, ("transformer.h.1", "transformer.h.3", "transformer.h.5"), "bottleneck_adapter"),
}


@torch.no_grad()
def shares_before(model: nn.Module, host: ModuleHost, points: tuple[str, ...], inputs: Tensor) -> list[float]:
    """The share of a forward pass's time that lies before each point, median of seven passes."""
    passed: dict[str, float] = {}
    hooks = [
        model.get_submodule(p).register_forward_hook(lambda *_, p=p: passed.update({p: time.perf_counter()}))
        for p in points
    ]
    found = []
    for _ in range(7):
        began = time.perf_counter()
        host.forward_with_slots(inputs)
        whole = time.perf_counter() - began
        found.append([(passed[p] - began) / whole for p in points])
    for hook in hooks:
        hook.remove()
    return [statistics.median(column) for column in zip(*found, strict=True)]


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Speed-up of the tree over full forwards for one case, and whether they agree bit for bit."""
    build, points, blueprint = CASES[name]
    torch.manual_seed(0)
    model, inputs = build()
    host = host_from_module(model, list(points), example=inputs[:1])
    plane = Plane(host, load_registry(), blueprints=[blueprint])
    for path, slot in plane.slots.items():
        plane.germinate(path, blueprint)
        plane.ramp_steps = 1
        while plane.growths[path].stage != "shadowing":
            plane.step()
            if plane.growths[path].stage.spec.isolated:
                plane.advance(path, gated=False)
        assert slot.seed is not None
        for parameter in slot.seed.parameters():
            nn.init.normal_(parameter, std=0.05)
    host.module.eval()
    plane.module.eval()
    masks = every_mask(list(plane.slots))

    @torch.no_grad()
    def full() -> list[dict[frozenset[str], Tensor]]:
        answers: list[dict[frozenset[str], Tensor]] = []
        for _ in range(BATCHES):
            answers.append({})
            for mask in masks:
                for path, slot in plane.slots.items():
                    slot.muted = path in mask
                answers[-1][mask] = host.forward_with_slots(inputs)
        for slot in plane.slots.values():
            slot.muted = False
        return answers

    def tree() -> list[dict[frozenset[str], Tensor]]:
        with PrefixTree(host, plane.slots) as prefix:
            prefix.observe(inputs[:1])
            return [dict(prefix.run(inputs, masks)) for _ in range(BATCHES)]

    equal = all(
        one.keys() == two.keys() and all(torch.equal(one[m], two[m]) for m in masks)
        for one, two in zip(full(), tree(), strict=True)
    )
    first, second, third = shares_before(model, host, points, inputs)
    seconds = interleaved({"full": full, "tree": tree}, rounds=rounds)
    return {
        "masks": len(masks),
        "equal bit for bit": equal,
        "ms a batch, eight full forwards": round(statistics.median(seconds["full"]) * 1e3 / BATCHES, 1),
        "ms a batch, prefix tree": round(statistics.median(seconds["tree"]) * 1e3 / BATCHES, 1),
        "speed-up": round(ratio(seconds, "full", "tree"), 2),
        "bound": round(8 / (first + 2 * (second - first) + 4 * (third - second) + 8 * (1 - third)), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"machine": machine()} | {name: measure(name, arguments.rounds) for name in CASES}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
