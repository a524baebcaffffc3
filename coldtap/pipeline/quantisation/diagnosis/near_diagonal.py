"""Is the full matrix of post-compensation nearly diagonal, and what does it bring beyond its diagonal?

QwT-v2 (arXiv 2505.20932) says that it is: fitted from a site's quantised output to its float one, y ≈ y_q M + b, the
matrix is nearly diagonal, so that two numbers per channel (`coldtap.stores.compensation.channel_affine`) do nearly as
well.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coldtap.errors import OptionError
from coldtap.pipeline.quantisation.compensation.linear_map import LinearMap, LinearMoments, fit_linear_map
from coldtap.pipeline.quantisation.compensation.site_table import snr_db
from coldtap.stores.compensation.channel_affine import DEAD, RIDGE, ChannelMoments, fit_affine


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDiagonal:
    """The full matrix M of a site against its diagonal.

    Energies are of M between channels of unit variance, y_q's and y's. Those off the diagonal hold the noise of the fit
    too, which falls with the number of pairs, and weights that cancel between channels that move together: what they
    are worth is in the signal to noise. Where quantisation takes little, M is near the identity and so near a diagonal
    whatever the compensation: M − 1 is what tells. The signal is the variance of y, summed over channels, and the noise
    the mean squared error, both held out; no gate is at work.

    Attributes:
        off_diagonal_share: of the energy of M; 0 where there is none.
        off_diagonal_share_of_change: of the energy of M − 1; 0 where there is none.
        snr_db_uncompensated: signal to noise of y_q.
        snr_db_diagonal: with two numbers per channel (CWAC).
        snr_db_full: with M and b.
    """

    off_diagonal_share: float
    off_diagonal_share_of_change: float
    snr_db_uncompensated: float
    snr_db_diagonal: float
    snr_db_full: float


def near_diagonal(fit: LinearMoments, held_out: LinearMoments) -> NearDiagonal:
    """Fit the full matrix and the diagonal, both with the same small ridge towards the identity, and compare them.

    Args:
        fit: moments of pairs (y_q, y), each (n, channel).
        held_out: of other samples.

    Raises:
        OptionError: y_q and y have not the same channels.
    """
    n_in, n_out = fit.xr.shape
    if n_in != n_out:
        raise OptionError(f"pairs have {n_in} and {n_out} channels; the quantised and the float output of one site")
    change = fit_linear_map(_of_change(fit), ridge=RIDGE)
    identity = torch.eye(n_in, dtype=torch.float64)
    full = LinearMap(weight=identity + change.weight, bias=change.bias)
    nothing = LinearMap(weight=identity, bias=torch.zeros_like(change.bias))
    return NearDiagonal(
        off_diagonal_share=_off_diagonal_share(full.weight, fit),
        off_diagonal_share_of_change=_off_diagonal_share(change.weight, fit),
        snr_db_uncompensated=_snr_db(held_out, nothing),
        snr_db_diagonal=_snr_db(held_out, _diagonal(fit)),
        snr_db_full=_snr_db(held_out, full),
    )


def _of_change(moments: LinearMoments) -> LinearMoments:
    """Moments of (x, r − x): a ridge towards zero there is one towards the identity here."""
    return replace(
        moments,
        mean_r=moments.mean_r - moments.mean_x,
        xr=moments.xr - moments.xx,
        rr=(moments.rr - 2 * moments.xr.diag() + moments.xx.diag()).clamp(min=0),
    )


def _diagonal(moments: LinearMoments) -> LinearMap:
    """CWAC as a matrix."""
    affine = fit_affine(
        ChannelMoments(
            n=moments.n,
            mean_x=moments.mean_x.numpy(),
            mean_y=moments.mean_r.numpy(),
            xx=moments.xx.diag().numpy(),
            xy=moments.xr.diag().numpy(),
            yy=moments.rr.numpy(),
        )
    )
    return LinearMap(weight=torch.from_numpy(affine.scale).diag(), bias=torch.from_numpy(affine.offset))


def _off_diagonal_share(weight: Tensor, moments: LinearMoments) -> float:
    """Of the energy of a matrix (in, out) between channels of unit variance; constant channels do not count."""
    alive = moments.rr > DEAD * moments.n * moments.mean_r.square()
    to_unit = torch.where(alive, moments.rr.rsqrt(), 0)
    energy = (moments.xx.diag().sqrt()[:, None] * weight * to_unit).square()
    total = float(energy.sum())
    return float(energy.fill_diagonal_(0).sum()) / total if total else 0.0


def _snr_db(held_out: LinearMoments, linear_map: LinearMap) -> float:
    return snr_db(float(held_out.rr.sum()), held_out.squared_error(linear_map))
