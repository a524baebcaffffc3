"""Channel-wise affine compensation (CWAC): two numbers a channel that bring quantised features near to float ones.

Least squares of y on x in each channel, from moments that stream in float64 and merge, so that no feature is kept.
Source: QwT-v2 (arXiv 2505.20932) for the form; the closed form is ordinary least squares. The ridge, the gate and what
happens to dead channels are ours (`docs/methods.md`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from coldtap.errors import ModelError, OptionError

type Float64s = np.ndarray[Any, np.dtype[np.float64]]

# A channel that keeps a hundredth of its spread goes halfway to the identity. Arbitrary: on the reference backbone's
# layers (4, 6 and 8 bits, 4 to 128 images) 0 to 1e-3 have the same held-out error, within 0.001 dB.
RIDGE = 1e-4
# The square of float32's step: what varies less is rounding, beside the channel's mean or beside what it stands for.
DEAD = 2.0**-46
# Scales are kept in float32, and one that is 0 there would kill the channel.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelMoments:
    """Moments of pairs (x, y) by channel, each an array (channel,) but the count; sums are about the means.

    Attributes:
        n: pairs a channel.
        mean_x, mean_y: means.
        xx, xy, yy: sums of (x − mean_x)², (x − mean_x)(y − mean_y), (y − mean_y)².
    """

    n: int
    mean_x: Float64s
    mean_y: Float64s
    xx: Float64s
    xy: Float64s
    yy: Float64s

    @classmethod
    def of(cls, x: Any, y: Any) -> "ChannelMoments":
        """Moments of pairs (n, channel), of any float dtype.

        Raises:
            OptionError: The shapes are not those of pairs.
            ModelError: A number is not finite.
        """
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if x.shape != y.shape or x.ndim != 2 or not len(x):
            raise OptionError(f"pairs have shapes {x.shape} and {y.shape}; expected one shape (n, channel), n ≥ 1")
        n_bad = int((~np.isfinite(x) | ~np.isfinite(y)).any(1).sum())
        if n_bad:
            raise ModelError(f"{n_bad} of {len(x)} pairs hold numbers that are not finite; leave their samples out")
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        return cls(
            n=len(x),
            mean_x=mean_x,
            mean_y=mean_y,
            xx=np.einsum("nc,nc->c", x, x),
            xy=np.einsum("nc,nc->c", x, y),
            yy=np.einsum("nc,nc->c", y, y),
        )

    def __add__(self, other: "ChannelMoments") -> "ChannelMoments":
        """Moments of both sets of pairs (Chan, Golub and LeVeque 1983: no cancellation)."""
        n = self.n + other.n
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share = other.n / n
        weight = self.n * share
        return ChannelMoments(
            n=n,
            mean_x=self.mean_x + share * dx,
            mean_y=self.mean_y + share * dy,
            xx=self.xx + other.xx + weight * dx * dx,
            xy=self.xy + other.xy + weight * dx * dy,
            yy=self.yy + other.yy + weight * dy * dy,
        )

    def squared_error(self, affine: "ChannelAffine") -> Float64s:
        """Sum of (y − scale · x − offset)² by channel."""
        scale = affine.scale
        rest = self.mean_y - scale * self.mean_x - affine.offset
        return np.maximum(self.yy - 2 * scale * self.xy + scale**2 * self.xx, 0) + self.n * rest**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAffine:
    """y ≈ scale · x + offset; both (channel,), the scale positive."""

    scale: Float64s
    offset: Float64s

    @classmethod
    def identity(cls, n_channels: int) -> "ChannelAffine":
        """Changes nothing."""
        return cls(scale=np.ones(n_channels), offset=np.zeros(n_channels))


def fit_affine(moments: ChannelMoments, *, ridge: float = RIDGE) -> ChannelAffine:
    """Return the least-squares map of each channel, drawn towards the identity.

    scale = (xy + λ) / (xx + λ) and offset = mean_y − scale · mean_x, with λ = `ridge` · yy of the same channel, so that
    a channel's map depends neither on its unit nor on the other channels. It is between least squares and the identity,
    and never worse than the identity on the pairs of the fit. A dead channel (`DEAD`), and one whose scale would not be
    positive in float32, keeps scale 1 and gets the difference of the means: a choice, for 0 would fit the latter better
    and silence it.
    """
    _check_ridge(ridge)
    alive = moments.xx > DEAD * (moments.yy + moments.n * moments.mean_x**2)
    pull = ridge * moments.yy
    scale = np.ones_like(moments.xx)
    np.divide(moments.xy + pull, moments.xx + pull, out=scale, where=alive)
    scale[scale < SMALLEST_SCALE] = 1.0
    return ChannelAffine(scale=scale, offset=moments.mean_y - scale * moments.mean_x)


def fit_gated_affine(folds: Sequence[ChannelMoments], *, ridge: float = RIDGE) -> ChannelAffine:
    """Return the map from all folds, in the channels where it lowers the error of folds that it was not fitted on.

    Elsewhere it is the identity. A gate on the data of the fit would never close: least squares cannot do worse there.

    Args:
        folds: moments of two or more disjoint sets of samples.
        ridge: as in `fit_affine`.

    Raises:
        OptionError: Fewer than two folds, or a ridge that is negative or not finite.
    """
    if len(folds) < 2:
        raise OptionError(f"folds: {len(folds)}; a held-out gate needs at least 2, so give more calibration samples")
    n_channels = len(folds[0].xx)
    identity = ChannelAffine.identity(n_channels)
    gain = np.zeros(n_channels)
    for held_out, fold in enumerate(folds):
        others = reduce(add, [other for i, other in enumerate(folds) if i != held_out])
        gain += fold.squared_error(identity) - fold.squared_error(fit_affine(others, ridge=ridge))
    fitted = fit_affine(reduce(add, folds), ridge=ridge)
    keep = gain > 0
    return ChannelAffine(scale=np.where(keep, fitted.scale, 1.0), offset=np.where(keep, fitted.offset, 0.0))


def _check_ridge(ridge: float) -> None:
    if not (ridge >= 0 and np.isfinite(ridge)):
        raise OptionError(f"ridge={ridge}; expected a finite number, 0 or more")
