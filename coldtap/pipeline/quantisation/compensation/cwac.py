"""QwT-v2: channel-wise affine compensation (CWAC) after quantised layers, folded into their scales and biases.

Source: arXiv 2505.20932 for the form; sites, target, ridge and gate are options or ours (`docs/methods.md`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from coldtap.pipeline.backbones.integer.layers import QuantisedLayer
from coldtap.pipeline.quantisation.ptq.calibration_images import N_FOLDS
from coldtap.pipeline.quantisation.ptq.model import QuantisedModel, rows_of
from coldtap.pipeline.quantisation.ptq.sites import Target, UnitAtWork, units_at_work
from coldtap.stores.compensation.channel_affine import RIDGE, ChannelAffine, ChannelMoments, fit_gated_affine


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFit:
    """What a compensation does at a site, on images that it was not fitted on.

    QwT's ridge is chosen on all folds, so that its `after` is a little too good.

    Attributes:
        site: layer, or block.
        signal: variance of the float output, summed over channels.
        before: mean squared error of the quantised output, summed over channels.
        after: of the compensated one.
        kept: share of its channels that the gate let through.
        n_parameters: that it adds before folding.
        n_folded_parameters: that it adds after: a bias where the layer had none.
    """

    site: str
    signal: float
    before: float
    after: float
    kept: float
    n_parameters: int
    n_folded_parameters: int


def compensate_channels(
    models: QuantisedModel,
    *,
    sites: Sequence[str],
    target: Target = "local",
    ridge: float = RIDGE,
    advance: Callable[[int], None] = lambda n_units: None,
) -> list[SiteFit]:
    """Fit CWAC site by site, and fold it into the quantised model.

    `sites` are layers, as `Anatomy.choose_sites` gives them, and `ridge` is as in `fit_affine`; the others are as in
    `units_at_work`.
    """
    fits = []
    for work in units_at_work(models, target, advance):
        for site in models.anatomy.layers_of(work.unit):
            if site in sites:
                fits.append(_compensate(work, site, ridge))
    return fits


def _compensate(work: UnitAtWork, site: str, ridge: float) -> SiteFit:
    layer = work.models.model.get_submodule(site)
    assert isinstance(layer, QuantisedLayer)
    folds = _moments(work, site)
    affine = fit_gated_affine(folds, ridge=ridge)
    layer.compensate(affine)
    whole, n_channels = reduce(add, folds), len(affine.scale)
    return SiteFit(
        site=site,
        signal=float(whole.yy.sum()) / whole.n,
        before=float(whole.squared_error(ChannelAffine.identity(n_channels)).sum()) / whole.n,
        after=_held_out_error(folds, ridge) / whole.n,
        kept=float(((affine.scale != 1) | (affine.offset != 0)).mean()),
        n_parameters=2 * n_channels,
        n_folded_parameters=n_channels if layer.bias is None else 0,
    )


def _moments(work: UnitAtWork, site: str) -> list[ChannelMoments]:
    """Moments of (quantised, float) output by fold."""
    folds: list[ChannelMoments | None] = [None] * N_FOLDS
    for pair in work.pairs(site):
        found = ChannelMoments.of(rows_of(pair.got).cpu(), rows_of(pair.wanted).cpu())
        before = folds[pair.fold]
        folds[pair.fold] = found if before is None else before + found
    return [fold for fold in folds if fold is not None]


def _held_out_error(folds: Sequence[ChannelMoments], ridge: float) -> float:
    """Squared error of each fold under the map of the others, gate and all, summed over channels."""
    error = 0.0
    for i, fold in enumerate(folds):
        others = [other for j, other in enumerate(folds) if j != i]
        error += float(fold.squared_error(fit_gated_affine(others, ridge=ridge)).sum())
    return error
