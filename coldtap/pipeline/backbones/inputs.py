"""What a model takes: the preprocessing that its configuration asks for, and pixels normalised on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from coldtap.pipeline.images.preprocess import Preprocess


def preprocess_of_model(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> Preprocess:
    """Return what a timm model's own configuration says, with parts replaced; raises as `Preprocess.from_config`.

    Without a configuration timm's defaults hold: 224 pixels, ImageNet's mean and deviation.
    """
    return Preprocess.from_config(resolve_model_data_config(model), overrides)


def normalise(pixels: torch.Tensor, preprocess: Preprocess, dtype: torch.dtype) -> torch.Tensor:
    """Make 8-bit pixels floating point and normalise them, on the device where they are.

    (x / 255 - mean) / std in float32 and in this order, so that float32 results equal torchvision's ToTensor and
    Normalize, and so timm's transform, bit for bit.

    Args:
        pixels: (batch, channel, height, width) uint8.
        preprocess: has mean and std.
        dtype: of the result; the arithmetic is float32 all the same.

    Returns:
        (batch, channel, height, width) of that dtype.
    """
    mean = torch.tensor(preprocess.mean, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(preprocess.std, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
    # A tensor on the device, because CUDA divides by a Python number as a product with its rounded reciprocal.
    white = torch.full((), 255.0, device=pixels.device)
    return pixels.to(torch.float32).div_(white).sub_(mean).div_(std).to(dtype)
