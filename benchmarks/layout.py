"""What the channels-last layout of weights brings to training steps on a CPU, host by host.

Run: OMP_NUM_THREADS=1 python -m benchmarks.layout [--json FILE]
Ratios are torch's own layout over channels-last, of processor time, medians over interleaved rounds: above 1 is faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved, machine, ratio
from esper_hosts.cnn import cnn

HOSTS = {
    "cnn of widths 18, 24, 64": (1, 32, 64),
    "resnet18": (3, 32, 32),
    "resnet10t": (3, 64, 16),
    "mobilenetv3_small_050": (3, 64, 16),
    "efficientnet_b0": (3, 64, 4),
    "convnext_atto": (3, 64, 8),
    "vit_tiny_patch16_224": (3, 224, 1),
}
"""Host to channels and side of an image, and images in a batch."""


def step_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, (channels, side, batch) in HOSTS.items():
        torch.manual_seed(0)
        model = (
            cnn(input_shape=(channels, side, side), widths="18,24,64").module
            if name.startswith("cnn")
            else timm.create_model(name, num_classes=10)
        )
        x, y = torch.randn(batch, channels, side, side), torch.randint(0, 10, (batch,))
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        seconds = interleaved(
            {"torch's own": step_of(model, x, y), "channels-last": step_of(last, x, y)},
            rounds=args.rounds,
            clock=time.process_time,
        )
        found[name] = ratio(seconds, "torch's own", "channels-last")
        print(f"{name:26s} {found[name]:.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "speed-up": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
