"""Augmentation of a whole batch at once, depending on (seed, epoch, position) and on nothing else."""

from __future__ import annotations

from typing import Final

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from esper_plugins.tasks.randomness import generator

CHOICES: Final = ("none", "shift", "shift-flip")
"""What the option `augment` of image tasks may be."""


@attrs.frozen
class Augment:
    """Random shift (crop after zero padding) and horizontal flip.

    Attributes:
        pad: largest shift in pixels, in each direction.
        flip: whether half of the images are mirrored.
    """

    pad: int = 0
    flip: bool = False

    @classmethod
    def named(cls, name: str, size: int) -> Augment | None:
        """The augmentation of a name in `CHOICES` for images of `size` pixels (pad 4 at 32, as is usual)."""
        if name == "none":
            return None
        return cls(pad=max(1, size // 8), flip=name == "shift-flip")

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """Vertical shift, horizontal shift and flip for every position of an epoch: int64 (count, 3)."""
        source = generator("augment", seed, epoch)
        shifts = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=source)
        flips = torch.randint(0, 2, (count, 1), generator=source) * int(self.flip)
        return torch.cat((shifts, flips), dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images (N, C, H, W) of any dtype, augmented by `draws` (N, 3) on the same device."""
        padded = functional.pad(images, (self.pad,) * 4)
        crop = crop_one_by_one if images.device.type == "cpu" else crop_at_once
        return crop(padded, draws, images.shape)


def crop_at_once(padded: Tensor, draws: Tensor, shape: torch.Size) -> Tensor:
    """A window of every padded image (N, C, H + 2p, W + 2p), cut to `shape` (N, C, H, W) and flipped as drawn."""
    windows = padded.unfold(2, shape[2], 1).unfold(3, shape[3], 1)  # (N, C, 2p+1, 2p+1, H, W), a view
    rows = torch.arange(len(padded), device=padded.device)
    cropped = windows[rows, :, draws[:, 0], draws[:, 1]]  # (N, C, H, W)
    return torch.where(draws[:, 2].bool()[:, None, None, None], cropped.flip(-1), cropped)


def crop_one_by_one(padded: Tensor, draws: Tensor, shape: torch.Size) -> Tensor:
    """The same on a CPU, where one strided copy an image takes a quarter of the time of torch's indexing."""
    out = torch.empty(shape, dtype=padded.dtype)
    source, target, (height, width) = padded.numpy(), out.numpy(), shape[-2:]
    for place, (down, right, flip) in enumerate(draws.tolist()):
        window = source[place, :, down : down + height, right : right + width]
        target[place] = window[..., ::-1] if flip else window
    return out
