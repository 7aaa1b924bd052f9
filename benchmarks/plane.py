"""What the plane costs: dormant slots, a germination, the bookkeeping of a thousand slots.

Run: OMP_NUM_THREADS=1 python -m benchmarks.plane [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import interleaved, interval, machine, ratio
from esper_core.kasmina.feature_trace import pick_logits
from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.territory import key_of
from esper_core.leyline.injection import InjectionSpec
from esper_core.registry import load_registry


def resnet18() -> tuple[nn.Module, torch.Tensor]:
    """ResNet-18 on 64×64 images, batch 16, channels last."""
    import timm

    model = timm.create_model("resnet18", num_classes=10).to(memory_format=torch.channels_last)
    return model, torch.randn(16, 3, 64, 64).to(memory_format=torch.channels_last)


def gpt2() -> tuple[nn.Module, torch.Tensor]:
    """A GPT-2 of 4 layers and width 128 on 4 sequences of 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=128,
        n_embd=128,
        n_layer=4,
        n_head=4,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config), torch.randint(0, 256, (4, 128))


def dormant(
    build: Callable[[], tuple[nn.Module, torch.Tensor]],
    counts: tuple[int, ...],
    rounds: int,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Forward and backward of the bare model and of the same with dormant slots.

    All contenders are one model, since two copies differ by more than slots do: by where their weights lie in memory.
    Slots are put in before a timing and taken out after it.

    Args:
        build: the model and a batch.
        counts: numbers of slots, spread over the model.
        rounds: how often each is timed.
        more: submodules behind which to put slots where the host offers fewer points by itself.
    """
    torch.manual_seed(0)
    model, x = build()
    host = host_from_module(model, example=x)
    if len(host.injection_specs) < max(counts):
        host = host_from_module(model, [*more, *host.injection_specs], example=x)
    plane = Plane(host, load_registry())
    stacks = {name: plane.module.get_submodule(key_of(name)) for name in plane.slots}
    for name in stacks:
        host.unregister_slot(name)
    contenders: dict[str, Callable[[], object]] = {"bare": lambda: _learn(pick_logits(model(x)))}
    around: dict[str, Callable[[], AbstractContextManager[object]]] = {}
    for count in counts:
        chosen = list(stacks)[:: max(1, len(stacks) // max(1, count))][:count]
        assert len(chosen) == count
        contenders[f"plane with {count} slots"] = lambda: _learn(host.forward_with_slots(x))
        around[f"plane with {count} slots"] = partial(_mounted, host, {name: stacks[name] for name in chosen})
    seconds = interleaved(contenders, rounds=rounds, warmup=10, shuffled=True, clock=time.process_time, around=around)
    return {
        name: {
            "ms": statistics.median(s) * 1e3,
            "ratio": ratio(seconds, name, "bare"),
            "95%": interval(seconds, name, "bare"),
        }
        for name, s in seconds.items()
    }


@contextmanager
def _mounted(host: ModuleHost, stacks: Mapping[str, Any]) -> Iterator[None]:
    for name, stack in stacks.items():
        host.register_slot(name, stack)
    try:
        yield
    finally:
        for name in stacks:
            host.unregister_slot(name)


def _learn(logits: torch.Tensor) -> None:
    logits.float().square().mean().backward()


def slot_microseconds(rounds: int) -> float:
    """Microseconds that one dormant slot adds to the call of the module behind which it stands.

    It is all that a dormant slot adds to a step: its hook hands the feature back, so that the graph is the bare one's.
    """
    spec = InjectionSpec("point", 64, "NCHW", 0, (64, 8, 8))
    bare, slotted = nn.Identity(), nn.Identity()
    Plane(ModuleHost(nn.Sequential(slotted), {"point": ("0", spec)}), load_registry())
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    assert slotted(x) is x
    contenders = {"bare": lambda: bare(x), "slotted": lambda: slotted(x)}
    seconds = interleaved(contenders, rounds=4 * rounds, repeats=2000, shuffled=True, clock=time.process_time)
    return statistics.median(b - a for a, b in zip(seconds["bare"], seconds["slotted"], strict=True)) * 1e6


def germination(rounds: int) -> float:
    """Median milliseconds of germinating a depthwise seed of 64 channels, its checks included."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(1), nn.Linear(64 * 64, 10))
    spec = InjectionSpec("point", 64, "NCHW", 0, (64, 8, 8))
    plane = Plane(ModuleHost(model, {"point": ("1", spec)}), load_registry(), embargo=0)
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        plane.germinate("point", "depthwise")
        times.append(time.perf_counter() - start)
        plane.cull("point")
        plane.decide()
    return statistics.median(times[3:]) * 1e3


def bookkeeping(rounds: int) -> dict[str, float]:
    """Milliseconds of `Plane.step` with a thousand slots: all dormant, all fossilised, alpha moving in all of them.

    The last for each curve, once with all ramps in step and once with each slot at a place of its own in its ramp.
    """
    layers = [nn.Linear(8, 8) for _ in range(1000)]
    specs = {f"l{i}": (str(i), InjectionSpec(f"l{i}", 8, "NLD", i, (4, 8))) for i in range(1000)}
    out = {}
    for curve in ("linear", "cosine", "sigmoid"):
        plane = Plane(ModuleHost(nn.Sequential(*layers), specs), load_registry(), blends=(f"residual:{curve}",))
        if curve == "linear":
            out["1000 slots, all dormant"] = _step_ms(plane, rounds)
        for path in plane.slots:
            plane.germinate(path, "norm")
            plane.step()
            while not plane.growths[path].stage.spec.permanent:
                plane.advance(path, gated=False)
            plane.growths[path].ramp_steps = 0
        if curve == "linear":
            out["1000 slots, all fossilized"] = _step_ms(plane, rounds)
        for path in plane.slots:
            plane.wither(path, source="emrakul")
            plane.growths[path].ramp_steps = 10**6
        out[f"1000 slots, all withering, {curve}"] = _step_ms(plane, rounds)
        for number, growth in enumerate(plane.growths.values()):
            growth.ramp_steps, growth.ramp_done = len(layers) + 2 * rounds, number
        out[f"1000 slots, each elsewhere in its ramp, {curve}"] = _step_ms(plane, rounds)
        for path in plane.slots:
            plane.host.unregister_slot(path)
    return out


def _step_ms(plane: Plane, rounds: int) -> float:
    plane.step()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        plane.step()
        times.append(time.process_time() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": machine(),
        "resnet18 64x64 batch 16": dormant(resnet18, (0, 3, 10), arguments.rounds, ("act1", "maxpool")),
        "gpt2 4x128": dormant(gpt2, (0, 3, 10), arguments.rounds),
        "a dormant slot (µs a call)": slot_microseconds(arguments.rounds),
        "germination of a depthwise seed (ms)": germination(arguments.rounds),
        "Plane.step (ms)": bookkeeping(8 * arguments.rounds),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
