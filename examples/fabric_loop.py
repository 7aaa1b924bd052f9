"""Growth in a Lightning Fabric loop. Needs `pip install lightning-fabric`.

Run: python examples/fabric_loop.py
"""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from own_loop import build_loaders, build_model, tell
from torch import nn

from esper_core import Tolaria, accompany, to_batch


def main(epochs: int = 12) -> Tolaria:
    """Train, and return the growth."""
    fabric = Fabric(accelerator="auto", devices=1)
    fabric.seed_everything(0)
    bare = build_model()
    bare_optimizer = torch.optim.AdamW(bare.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(bare, bare_optimizer)
    train, validation = fabric.setup_dataloaders(*build_loaders())
    steps = epochs * len(train)

    # growth stands on the bare model and beside the bare optimizer: Fabric's wrappers call both
    tolaria = accompany(
        bare, bare_optimizer, next(iter(train)), steps=steps, blueprints=["depthwise", "conv"], points=["2", "5"],
        emit=tell,
    )  # fmt: skip
    for epoch in range(epochs):
        for inputs, targets in train:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
            tolaria.step(loss, len(targets))
            optimizer.zero_grad()
            if tolaria.due(steps):
                tolaria.decide(map(to_batch, validation), epoch)
    tolaria.conclude()
    return tolaria


if __name__ == "__main__":
    grown = main()
    print(f"validation loss {grown.clock.history[-1][1]:.4f}, accuracy {grown.clock.history[-1][2]:.3f}")
