"""Growth beside a training loop of your own: your model, your loader, your optimizer, your scheduler.

Run: python examples/own_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from esper_core import Tolaria, accompany, compose, to_batch
from esper_core.leyline.events import Event


def build_model() -> nn.Module:
    """A small convolutional network without any trace of Esper."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def build_loaders(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Handwritten digits for training and validation."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    digits = TensorDataset(images, torch.tensor(data.target))
    train, validation = random_split(digits, [1437, 360], torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(1)
    return DataLoader(train, batch_size, shuffle=True, generator=order), DataLoader(validation, 120)


def tell(event: Event) -> None:
    """Print what grows and what is undone."""
    if event.kind in ("stage_changed", "rolled_back", "governor_alarm"):
        print(event.to_json())


def main(epochs: int = 12) -> tuple[Tolaria, nn.Module]:
    """Train, and return the growth and the grown model as a plain module."""
    torch.manual_seed(0)
    model = build_model()
    train, validation = build_loaders()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = epochs * len(train)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    tolaria = accompany(
        model, optimizer, next(iter(train)), steps=steps, blueprints=["depthwise", "conv"], points=["2", "5"], emit=tell
    )
    for epoch in range(epochs):
        for inputs, targets in train:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            tolaria.step(loss, len(targets))  # seeds learn from the same gradients; the governor watches
            optimizer.zero_grad()
            scheduler.step()
            if tolaria.due(steps):
                tolaria.decide(map(to_batch, validation), epoch)
    tolaria.conclude()
    return tolaria, compose(tolaria.plane).eval()


if __name__ == "__main__":
    grown, plain = main()
    print(f"validation loss {grown.clock.history[-1][1]:.4f}, accuracy {grown.clock.history[-1][2]:.3f}")
    print("a plain module of", sum(p.numel() for p in plain.parameters()), "parameters")
