"""Ranges: the scale of each weight channel, and scale and zero point of each activation tensor.

Two ways to choose them. `percentile` clips what lies outside a quantile. `least-squares` takes the clip that loses
least in the square, out of a grid, as RepQ-ViT and PTQ4ViT do with grids of their own.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

type RangeMethod = Literal["percentile", "least-squares"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod.__value__)

PERCENTILE = 0.9999
SAMPLED_ROWS = 2048  # tokens or pixels per layer; of 768 channels 1.6 million values
_WEIGHT_CLIPS = torch.linspace(1.0, 0.4, 31)
_ACTIVATION_CLIPS = torch.linspace(1.0, 0.1, 46).tolist()
_SAMPLED_VALUES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRange:
    """Values (code − zero) · scale, codes from 0 to 2^bits − 1; zero itself is a code, so that padding is exact."""

    scale: float
    zero: int

    @classmethod
    def spanning(cls, low: float, high: float, largest: int) -> Self:
        """Return the range from `low` to `high`, widened to hold zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / largest, torch.finfo(torch.float32).tiny)
        scale = float(torch.tensor(scale, dtype=torch.float32))  # what every kernel and every file holds
        return cls(scale=scale, zero=min(max(round(-low / scale), 0), largest))

    def quantise(self, values: Tensor, largest: int) -> Tensor:
        """Quantise float values of any shape to codes, uint8."""
        # Three passes over memory: what is cut off behind a half more is rounded.
        half_more = torch.tensor(self.zero + 0.5, device=values.device)
        return torch.add(half_more, values, alpha=1 / self.scale).clamp_(0, largest).to(torch.uint8)

    def restore(self, codes: Tensor) -> Tensor:
        """Restore the float32 values of codes."""
        return (codes.to(torch.float32) - self.zero) * self.scale


class SampledRows:
    """What is remembered of a layer's input over the calibration images: some rows, and all extremes.

    Attributes:
        low, high: least and greatest value seen.
    """

    def __init__(self, n_batches: int, seed: int) -> None:
        self._of_a_batch = -(-SAMPLED_ROWS // n_batches)
        self._random = torch.Generator().manual_seed(seed)
        self._rows: list[Tensor] = []
        self.low, self.high = math.inf, -math.inf

    def see(self, rows: Tensor) -> None:
        """Look at values (row, channel)."""
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        chosen = torch.randperm(len(rows), generator=self._random)[: self._of_a_batch]
        self._rows.append(rows[chosen.to(rows.device)].float().cpu())

    def rows(self) -> Tensor:
        """Return the remembered rows (row, channel), float32."""
        return torch.cat(self._rows)


def activation_range(rows: Tensor, low: float, high: float, method: RangeMethod, largest: int) -> ActivationRange:
    """Return scale and zero point of a tensor.

    `rows` are remembered values (row, channel); `low` and `high` are the least and the greatest seen.
    """
    values = _some(rows.flatten())
    if method == "percentile":
        below, above = torch.quantile(values, torch.tensor([1 - PERCENTILE, PERCENTILE])).tolist()
        return ActivationRange.spanning(below, above, largest)
    # First both ends by one factor, then each by its own: a GELU's output has a short end and a long one.
    ends = (low, high)
    for moved in ((0, 1), (0,), (1,), (0,)):
        clips = [
            (ends[0] * (clip if 0 in moved else 1), ends[1] * (clip if 1 in moved else 1)) for clip in _ACTIVATION_CLIPS
        ]
        candidates = [ActivationRange.spanning(below, above, largest) for below, above in clips]
        errors = [float((one.restore(one.quantise(values, largest)) - values).square().sum()) for one in candidates]
        ends = clips[min(range(len(clips)), key=errors.__getitem__)]
    return ActivationRange.spanning(ends[0], ends[1], largest)


def _some(values: Tensor) -> Tensor:
    """At most so many of the values, by chance: even steps through (row, channel) would meet few channels again."""
    chance = torch.Generator().manual_seed(0)
    return values[torch.randperm(len(values), generator=chance)[:_SAMPLED_VALUES]]


def weight_scales(weight: Tensor, method: RangeMethod, largest: int) -> Tensor:
    """Return the scale of each output channel.

    Args:
        weight: (out, in).
        method: how the range is chosen.
        largest: code; codes go from −largest to largest.

    Returns:
        (out,) float32, positive.
    """
    magnitude = weight.float().abs()
    if method == "percentile":
        return _positive(torch.quantile(magnitude, PERCENTILE, dim=1) / largest)
    widest = magnitude.amax(1) / largest
    best, least = widest, torch.full_like(widest, math.inf)
    for clip in _WEIGHT_CLIPS:
        scale = _positive(widest * clip)
        error = (weight_codes(weight, scale, largest) * scale[:, None] - weight).square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return _positive(best)


def weight_codes(weight: Tensor, scales: Tensor, largest: int) -> Tensor:
    """Return codes (out, in) as int8 of a weight (out, in) at the scales (out,)."""
    return (weight.float() / scales[:, None]).round().clamp(-largest, largest).to(torch.int8)


def _positive(scales: Tensor) -> Tensor:
    """A channel of zeros has codes of zero at any scale."""
    return torch.where(scales > torch.finfo(torch.float32).tiny, scales, 1.0)
