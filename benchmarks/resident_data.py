"""Batches from a resident tensor with batched augmentation, against a DataLoader with per-sample transforms.

CIFAR-sized images (3×32×32, uint8 at rest, noise here: only the time matters), batch 64; both crop after padding by 4,
flip, and normalise, and both deliver float batches on the CPU. Streaming is measured too: the same batches through the
prefetching thread.

Run: OMP_NUM_THREADS=1 python -m benchmarks.resident_data [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.timing import interleaved, machine, ratio
from esper_plugins.tasks.augment import Augment
from esper_plugins.tasks.splits import ResidentSplit, Scale, StreamedSplit

EXAMPLES, BATCH, TIMED = 4096, 64, 16


class PerSample(Dataset[tuple[torch.Tensor, int]]):
    """The usual way: one image at a time through torchvision's transforms."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, scale: Scale) -> None:
        self.images = [image.permute(1, 2, 0).numpy() for image in images]
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([m / 255 for m in scale.mean], [d / 255 for d in scale.deviation]),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def contenders() -> dict[str, Callable[[], object]]:
    """Each delivers `TIMED` training batches."""
    images = torch.randint(0, 256, (EXAMPLES, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (EXAMPLES,))
    scale, augment = Scale.of(images), Augment(4, True)
    resident = ResidentSplit(images, labels, scale=scale, augment=augment, whole_batches=True)
    streamed = StreamedSplit(lambda i: images[i], labels, scale=scale, augment=augment, whole_batches=True)
    data = PerSample(images, labels, scale)
    in_process = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    one_worker = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True)

    def consume(batches: Iterator[Any]) -> None:
        for _ in islice(batches, TIMED):
            pass

    found: dict[str, Callable[[], object]] = {
        "resident": lambda: consume(resident.batches(BATCH, shuffle=True)),
        "streamed": lambda: consume(streamed.batches(BATCH, shuffle=True)),
        "DataLoader, in process": lambda: consume(iter(in_process)),
        "DataLoader, one worker": lambda: consume(iter(one_worker)),
    }
    return found


def main() -> None:
    """Print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = interleaved(contenders(), rounds=options.rounds, warmup=1)
    rows = {
        name: {
            "milliseconds_per_batch": 1e3 * statistics.median(times) / TIMED,
            "times_resident": ratio(seconds, name, "resident"),
        }
        for name, times in seconds.items()
    }
    for name, row in rows.items():
        print(f"{name:24} {row['milliseconds_per_batch']:8.3f} ms a batch   {row['times_resident']:6.1f}× resident")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "batch": BATCH, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
