"""Tiny real images for tests, and folders of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 8, height: int = 8) -> Image.Image:
    """Return an RGB image of seeded noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_pictures(folder: Path, *names: str) -> None:
    """Write an image of its own under each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))


def write_classes(folder: Path, n_images: int, *classes: str) -> None:
    """Write class folders with as many images each."""
    write_pictures(folder, *(f"{name}/{number}.png" for name in classes for number in range(n_images)))
