"""Resizing and cropping for evaluation, pixel by pixel as timm and torchvision do it, with Pillow alone.

A machine that gets its features from a server has neither of the two; tests hold the pixels against timm's.
"""

import math
from collections.abc import Sequence

from PIL import Image, ImageOps

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
BLACK = (0, 0, 0)


def resize_and_crop(
    image: Image.Image,
    size: tuple[int, int],
    *,
    crop_pct: float,
    crop_mode: str,
    interpolation: str,
    border: Sequence[float],
) -> Image.Image:
    """Return an RGB image of `size` (height, width), the middle of the resized one.

    `border` is the colour of the padding, on a scale of 0 … 1; the others are as in `Preprocess`.
    """
    height, width = _resized_size(image, size, crop_pct, crop_mode)
    if (image.width, image.height) != (width, height):
        image = image.resize((width, height), RESAMPLING[interpolation])
    red, green, blue = (round(255 * value) for value in border) if crop_mode == "border" else BLACK
    return _crop_middle(image, size, (red, green, blue))


def _resized_size(image: Image.Image, size: tuple[int, int], crop_pct: float, crop_mode: str) -> tuple[int, int]:
    """Return (height, width) before cropping."""
    target_height, target_width = (math.floor(side / crop_pct) for side in size)
    if crop_mode == "squash":
        return target_height, target_width
    if crop_mode == "center" and target_height == target_width:
        # torchvision keeps the shorter edge exact and rounds the longer one down; timm rounds both to nearest.
        shorter, longer = sorted(image.size)
        long_edge = int(target_height * longer / shorter)
        return (long_edge, target_height) if image.width <= image.height else (target_height, long_edge)
    ratios = image.height / target_height, image.width / target_width
    ratio = max(ratios) if crop_mode == "border" else min(ratios)
    return round(image.height / ratio), round(image.width / ratio)


def _crop_middle(image: Image.Image, size: tuple[int, int], fill: tuple[int, int, int]) -> Image.Image:
    """Return the middle of an image, padded where it is too small; an odd pixel of padding goes right and below."""
    height, width = size
    more_height, more_width = max(height - image.height, 0), max(width - image.width, 0)
    if more_height or more_width:
        padding = (more_width // 2, more_height // 2, (more_width + 1) // 2, (more_height + 1) // 2)
        image = ImageOps.expand(image, border=padding, fill=fill)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
