"""QwT: a linear map of each block's input that is added to its output.

Source: arXiv 2411.13918 and its code. The ridge is an option, the held-out gate ours (`docs/methods.md`).
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from coldtap.pipeline.backbones.integer.linear_compensation import WEIGHT_DTYPE, LinearCompensation, add_to_block
from coldtap.pipeline.quantisation.compensation.cwac import SiteFit
from coldtap.pipeline.quantisation.compensation.linear_map import (
    LinearMap,
    LinearMoments,
    fit_gated_linear_map,
    fit_linear_map,
)
from coldtap.pipeline.quantisation.ptq.calibration_images import N_FOLDS
from coldtap.pipeline.quantisation.ptq.model import QuantisedModel, rows_of
from coldtap.pipeline.quantisation.ptq.sites import Pair, Target, UnitAtWork, units_at_work

# 0 is the official form; the best of them on images held out is taken, block by block.
RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
CHANNELS_PER_GROUP = 64  # of a map's, or more where the channels do not divide so


def compensate_blocks(
    models: QuantisedModel,
    *,
    target: Target = "local",
    ridges: Sequence[float] = RIDGES,
    advance: Callable[[int], None] = lambda n_units: None,
) -> list[SiteFit]:
    """Fit QwT, block by block; a block that it would not help on images held out gets none.

    The map of a residual block is a grouped 1 × 1 convolution: the largest number of groups that is no more than
    in // 64, at least 1, and divides both the block's channels in and those out.

    Of the ridges the best on images held out is taken; `(0,)` is the official form. The others are as in
    `units_at_work`.
    """
    return [_compensate(work, ridges) for work in units_at_work(models, target, advance) if work.unit.name]


def _compensate(work: UnitAtWork, ridges: Sequence[float]) -> SiteFit:
    folds, stride, signal = _moments(work)
    found = [fit_gated_linear_map(group, ridges=ridges, weight_dtype=WEIGHT_DTYPE) for group in folds]
    n, n_in, n_out = sum(fold.n for fold in folds[0]), len(folds[0][0].mean_x), len(folds[0][0].mean_r)
    before = sum(fold.squared_error(LinearMap.zero(n_in, n_out)) for group in folds for fold in group) / n
    after = sum(_held_out_error(group, best and best[1]) for group, best in zip(folds, found, strict=True)) / n
    maps = [best[0] if best else LinearMap.zero(n_in, n_out) for best in found]
    if any(found):
        weight, bias = torch.stack([one.weight for one in maps]), torch.cat([one.bias for one in maps])
        compensation = LinearCompensation(weight, bias, stride).to(work.models.images[0].device)
        add_to_block(work.models.model.get_submodule(work.unit.name), compensation)
    n_parameters = len(folds) * (n_in + 1) * n_out if any(found) else 0
    return SiteFit(
        site=work.unit.name,
        signal=signal / n,
        before=before,
        after=after,
        kept=sum(best is not None for best in found) / len(found),
        n_parameters=n_parameters,
        n_folded_parameters=n_parameters,
    )


def _held_out_error(folds: Sequence[LinearMoments], ridge: float | None) -> float:
    """Squared error of each fold under the map of the others, at the ridge that was taken; None is no map."""
    error = 0.0
    for i, fold in enumerate(folds):
        if ridge is None:
            error += fold.squared_error(LinearMap.zero(len(fold.mean_x), len(fold.mean_r)))
        else:
            others = reduce(add, [other for j, other in enumerate(folds) if j != i])
            error += fold.squared_error(fit_linear_map(others, ridge=ridge, weight_dtype=WEIGHT_DTYPE))
    return error


def _moments(work: UnitAtWork) -> tuple[list[list[LinearMoments]], int, float]:
    """Moments of (input, what is missing) by group and fold; the block's stride; the sum of squares of the signal."""
    folds: list[list[LinearMoments | None]] = []
    stride, signal = 1, 0.0
    for pair in work.pairs():
        x, stride = _input_rows(pair)
        missing = rows_of(pair.wanted - pair.got)
        wanted = rows_of(pair.wanted).double()
        signal += float((wanted - wanted.mean(0)).square().sum())
        n_groups = 1 if pair.input.ndim == 3 else _groups(x.shape[1], missing.shape[1])
        folds = folds or [[None] * N_FOLDS for _ in range(n_groups)]
        for group, of_x, of_r in zip(folds, x.chunk(n_groups, 1), missing.chunk(n_groups, 1), strict=True):
            found, before = LinearMoments.of(of_x, of_r), group[pair.fold]
            group[pair.fold] = found if before is None else before + found
    return [[fold for fold in group if fold is not None] for group in folds], stride, signal


def _groups(n_in: int, n_out: int) -> int:
    """The most groups of at least 64 input channels, or one, that divide both a block's inputs and its outputs."""
    most = max(n_in // CHANNELS_PER_GROUP, 1)
    return max(n for n in range(1, most + 1) if n_in % n == n_out % n == 0)


def _input_rows(pair: Pair) -> tuple[Tensor, int]:
    """What the map reads, (row, in), and the stride between its pixels."""
    x = pair.input
    if x.ndim == 3:
        return rows_of(x), 1
    stride = round(x.shape[2] / pair.wanted.shape[2])
    return rows_of(x[:, :, ::stride, ::stride]), stride
