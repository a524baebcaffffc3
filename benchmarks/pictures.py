"""Images made on the spot: what they show does not matter here, how large they are does."""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

N_CLASSES = 10
N_DISTINCT = 64  # more would only take longer to make


@lru_cache(maxsize=4)
def encoded_images(side: int) -> list[bytes]:
    """Smooth random images as JPEG files."""
    rng = np.random.default_rng(0)
    return [_jpeg(rng.integers(0, 256, (8, 8, 3), np.uint8), side) for _ in range(N_DISTINCT)]


def _jpeg(cells: np.ndarray[Any, np.dtype[np.uint8]], side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def decode(encoded: bytes, side: int) -> torch.Tensor:
    """What a hand-written loop does with a file: (3, side, side) uint8."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@lru_cache(maxsize=4)
def decoded_images(file_side: int, side: int) -> torch.Tensor:
    """The same images as pixels: (image, 3, side, side) uint8."""
    return torch.stack([decode(image, side) for image in encoded_images(file_side)])


class Pictures:
    """An indexable of (image, label) that repeats a few images; `targets` spares a look at each."""

    def __init__(self, images: Sequence[Any] | torch.Tensor, n_images: int) -> None:
        self._images = images
        self.targets = [number % N_CLASSES for number in range(n_images)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self._images[number % len(self._images)], self.targets[number]
