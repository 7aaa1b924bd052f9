"""A whole grown run on images of CIFAR-10's shape, number and file format: a section of `benchmarks/gpu.py`.

CIFAR-10 itself may not be at hand, so its place is taken by scikit-learn's handwritten digits in colour: turned, scaled
and put anywhere on a cloudy background. The test images show digits that no training image shows.

The run is the one of `esper run --task torchvision:CIFAR10 --set torchvision.root=DIR`, and a second, in which nothing
may grow, stands beside it. A run records the version of the installed package, so this section needs an installation.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_core.registry import Registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import eval_run, start_run

FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
SIDE = 32


def coloured_digits(count: int, *, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` images (N, 3, 32, 32) uint8 and their labels (N,), made of the first or the last digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    kept = slice(1437, None) if test else slice(1437)
    shapes, names = torch.from_numpy(digits.images[kept]).float()[:, None] / 16, torch.from_numpy(digits.target[kept])
    which = torch.randint(0, len(names), (count,), generator=generator)

    def between(low: float, high: float, *size: int) -> Tensor:
        return torch.rand(count, *size, generator=generator) * (high - low) + low

    angle, zoom, shift = between(-0.35, 0.35), between(1.2, 2.0), between(-0.7, 0.7, 2)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, SIDE, SIDE], align_corners=False)
    mask = F.grid_sample(shapes[which], grid, align_corners=False)
    ground = between(0, 1, 3, 1, 1)
    ink = (ground + between(0.25, 0.75, 3, 1, 1)) % 1
    cloud = ground + F.interpolate(between(-0.3, 0.3, 3, 4, 4), SIDE, mode="bicubic")
    grain = 0.05 * torch.randn(cloud.shape, generator=generator)
    pixels = torch.lerp(cloud, ink.expand_as(cloud), 0.9 * mask.expand_as(cloud)) + grain
    return (pixels.clamp(0, 1) * 255).byte(), names[which].byte()


def write_cifar(root: Path, *, images: int) -> None:
    """Six files of `images` images each, as CIFAR-10's binary version lays them out under `root`."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for file in FILES:
        pixels, labels = coloured_digits(images, test=file == FILES[-1], generator=generator)
        (folder / file).write_bytes(torch.cat([labels[:, None], pixels.flatten(1)], 1).numpy().tobytes())


def grown_run(registry: Registry, *, device: str, quick: bool) -> dict[str, Any]:
    """The figures of a grown run, of the host alone, and of the saved model when it is read again."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        start = time.perf_counter()
        write_cifar(root / "data", images=100 if quick else 10_000)
        out["seconds to make the images"] = time.perf_counter() - start
        for name, controller in (("grown", "heuristic"), ("host alone", "wait")):
            config = RunConfig(
                task="torchvision:CIFAR10",
                controller=controller,
                epochs=3 if quick else 10,
                batch_size=128,
                device=device,
                out=str(root / controller),
                settings={"torchvision.root": str(root / "data"), "cnn.widths": "4,6,8" if quick else "32,64,128"},
            )
            start = time.perf_counter()
            result = start_run(config, registry=registry)
            seconds = time.perf_counter() - start
            out[name] = {
                "status": result.status, "seconds": seconds, "steps": result.steps,
                "steps/s, decisions included": result.steps / seconds, "test accuracy": result.test_score,
                "validation accuracy": result.validation_score, "parameters": result.params,
                "of the host": result.host_params, "total FLOPs": result.total_flops,
                "fossilized": list(result.fossilized), "stages entered": stages(result.folder),
            }  # fmt: skip
        again = eval_run(root / "heuristic", registry=registry, device=device)
        out["test accuracy of the saved model, read again"] = again.score
    return out


def stages(folder: Path) -> dict[str, int]:
    """How often a seed entered each stage."""
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return dict(Counter(event["after"] for event in events if event["kind"] == "stage_changed"))
