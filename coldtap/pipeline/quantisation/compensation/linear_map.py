"""QwT's compensation: a linear map of a block's input that stands for what quantisation took from its output.

Least squares of r on x, from moments that stream in float64 and merge, so that no activation is kept. With r = y − y_q
and x the block's quantised input it is QwT's closed form (arXiv 2411.13918): ordinary least squares, one matrix and one
bias per block. Columns of one scale, the ridge and the held-out gate are ours (`docs/methods.md`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from operator import add

import torch
from torch import Tensor

from coldtap.errors import ModelError, OptionError
from coldtap.stores.compensation.channel_affine import DEAD

# Eigenvalues have mean 1. One below this is rounding: of float32 activations (1e-14), or of sums over 1,000 columns.
RANK = 1e-12
# A column with less than this part of the middle one's variance gets no weight: behind a ReLU some channels are hardly
# ever active, and what least squares makes of a few values does not hold for the next images (a block of a residual
# network fell from 38 to 20 dB so).
QUIET = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMap:
    """r ≈ x · weight + bias, in float64.

    Attributes:
        weight: (in, out), the transpose of a torch linear's.
        bias: (out,).
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def zero(cls, n_in: int, n_out: int) -> "LinearMap":
        """Return the map that compensates nothing."""
        return cls(weight=torch.zeros(n_in, n_out, dtype=torch.float64), bias=torch.zeros(n_out, dtype=torch.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMoments:
    """Moments of pairs (x, r) in float64 and in CPU memory; sums are about the means.

    Attributes:
        n: pairs.
        mean_x: (in,).
        mean_r: (out,).
        xx: (in, in), the sum of (x − mean_x)ᵀ (x − mean_x).
        xr: (in, out), the sum of (x − mean_x)ᵀ (r − mean_r).
        rr: (out,), the sum of (r − mean_r)².
    """

    n: int
    mean_x: Tensor
    mean_r: Tensor
    xx: Tensor
    xr: Tensor
    rr: Tensor

    @classmethod
    def of(cls, x: Tensor, r: Tensor) -> "LinearMoments":
        """Return moments of pairs x (n, in) and r (n, out) of any float dtype, summed on their device.

        Raises:
            OptionError: the shapes are not those of pairs.
            ModelError: a number is not finite.
        """
        if x.ndim != 2 or r.ndim != 2 or len(x) != len(r) or not len(x):
            shapes = f"{tuple(x.shape)} and {tuple(r.shape)}"
            raise OptionError(f"pairs have shapes {shapes}; expected (n, in) and (n, out), n ≥ 1")
        x, r = x.detach().double(), r.detach().double()
        mean_x, mean_r = x.mean(0), r.mean(0)
        if not (mean_x.isfinite().all() and mean_r.isfinite().all()):
            n_bad = int((~x.isfinite().all(1) | ~r.isfinite().all(1)).sum())
            raise ModelError(f"{n_bad} of {len(x)} pairs hold numbers that are not finite; leave their samples out")
        x, r = x - mean_x, r - mean_r
        return cls(
            n=len(x),
            mean_x=mean_x.cpu(),
            mean_r=mean_r.cpu(),
            xx=(x.T @ x).cpu(),
            xr=(x.T @ r).cpu(),
            rr=r.square().sum(0).cpu(),
        )

    def __add__(self, other: "LinearMoments") -> "LinearMoments":
        """Moments of both sets of pairs (Chan, Golub and LeVeque 1983: no cancellation)."""
        n = self.n + other.n
        dx, dr = other.mean_x - self.mean_x, other.mean_r - self.mean_r
        share = other.n / n
        weight = self.n * share
        return LinearMoments(
            n=n,
            mean_x=self.mean_x + share * dx,
            mean_r=self.mean_r + share * dr,
            xx=self.xx + other.xx + weight * torch.outer(dx, dx),
            xr=self.xr + other.xr + weight * torch.outer(dx, dr),
            rr=self.rr + other.rr + weight * dr.square(),
        )

    def squared_error(self, linear_map: LinearMap) -> float:
        """Return the sum of ‖r − x · weight − bias‖² over all pairs."""
        weight = linear_map.weight
        rest = self.mean_r - self.mean_x @ weight - linear_map.bias
        about_means = self.rr + (weight * (self.xx @ weight - 2 * self.xr)).sum(0)
        return float(about_means.clamp(min=0).sum() + self.n * rest.square().sum())


def fit_linear_map(moments: LinearMoments, *, ridge: float, weight_dtype: torch.dtype = torch.float64) -> LinearMap:
    """Fit the map of least squares, its weight drawn towards zero; the bias is free.

    Columns of x are scaled to unit variance first, so that `ridge` is a share of a column's variance and outlier
    channels neither spoil the condition nor escape the ridge. Ridge 0 is QwT's official form. A column that hardly
    varies gets no weight, and collinear columns share theirs (the pseudo-inverse, of the scaled columns).

    Args:
        moments: of the pairs.
        ridge: share of a column's variance.
        weight_dtype: what the weight will be kept in: it is rounded to that, and the bias is the rounded weight's.

    Raises:
        OptionError: the ridge is negative or not finite.
    """
    return _Equations.of(moments).solve(ridge, weight_dtype)


def fit_gated_linear_map(
    folds: Sequence[LinearMoments], *, ridges: Sequence[float], weight_dtype: torch.dtype = torch.float64
) -> tuple[LinearMap, float] | None:
    """Fit a map to all folds, with the ridge of least error on folds that it was not fitted on, and return both.

    None where even that error is no smaller than without compensation (held-out R² ≤ 0). Of ridges that do as well, the
    first counts. Errors are those of rounded weights: with collinear columns least squares takes large weights that
    cancel, and halves of them do not.

    `folds` are moments of two or more disjoint sets of samples; each is left out in turn. The others are as in
    `fit_linear_map`.

    Raises:
        OptionError: fewer than two folds, no ridge, or one that is negative or not finite.
    """
    if len(folds) < 2:
        raise OptionError(f"folds: {len(folds)}; a held-out gate needs at least 2, so give more calibration samples")
    if not ridges:
        raise OptionError("ridges is empty; give at least one, 0 for ordinary least squares")
    errors = [0.0] * len(ridges)
    for held_out, fold in enumerate(folds):
        others = _Equations.of(reduce(add, [other for i, other in enumerate(folds) if i != held_out]))
        for i, ridge in enumerate(ridges):
            errors[i] += fold.squared_error(others.solve(ridge, weight_dtype))
    nothing = LinearMap.zero(*folds[0].xr.shape)
    least = min(errors)
    if not least < sum(fold.squared_error(nothing) for fold in folds):
        return None
    ridge = ridges[errors.index(least)]
    return fit_linear_map(reduce(add, folds), ridge=ridge, weight_dtype=weight_dtype), ridge


@dataclass(frozen=True, slots=True, kw_only=True)
class _Equations:
    """Normal equations by eigenvalue: with these, another ridge costs one product, and a missing rank shows.

    Attributes:
        moments: of the pairs.
        alive: (in,), the columns that vary; the rest is about them alone.
        scale: what makes them of unit variance.
        values: eigenvalues of their scaled moments, mean 1.
        vectors: their eigenvectors, in columns.
    """

    moments: LinearMoments
    alive: Tensor
    scale: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, moments: LinearMoments) -> "_Equations":
        """Scale and decompose."""
        squares = moments.xx.diag()
        alive = (squares > DEAD * moments.n * moments.mean_x.square()) & (squares > QUIET * squares.median())
        scale = squares[alive].rsqrt()
        scaled = moments.xx[alive][:, alive] * torch.outer(scale, scale)
        values, vectors = torch.linalg.eigh(scaled)
        return cls(moments=moments, alive=alive, scale=scale, values=values, vectors=vectors)

    def solve(self, ridge: float, weight_dtype: torch.dtype) -> LinearMap:
        """Solve for the map of one ridge, its weight rounded."""
        if not (ridge >= 0 and isfinite(ridge)):
            raise OptionError(f"ridge={ridge}; expected a finite number, 0 or more")
        inverse = torch.where(self.values > RANK, 1 / (self.values + ridge), 0)
        target = self.vectors.T @ (self.scale[:, None] * self.moments.xr[self.alive])
        weight = torch.zeros_like(self.moments.xr)
        weight[self.alive] = self.scale[:, None] * (self.vectors @ (inverse[:, None] * target))
        largest = torch.finfo(weight_dtype).max
        weight = weight.clamp(-largest, largest).to(weight_dtype).double()
        return LinearMap(weight=weight, bias=self.moments.mean_r - self.moments.mean_x @ weight)
