"""What compensation does, site by site, as plain text."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite, log10

from coldtap.pipeline.quantisation.compensation.cwac import SiteFit
from coldtap.stores.compensation.channel_affine import ChannelAffine, ChannelMoments
from coldtap.text import text_table

NAMES_PER_REASON = 3


def site_table(fits: Sequence[SiteFit]) -> str:
    """Return a line per site: signal to noise on images held out, channels kept by the gate, parameters added."""
    header = ("site", "dB before", "dB after", "channels kept", "parameters", "after folding")
    lines = [
        (
            fit.site,
            show_db(snr_db(fit.signal, fit.before)),
            show_db(snr_db(fit.signal, fit.after)),
            f"{fit.kept:.0%}",
            f"{fit.n_parameters:,}",
            f"{fit.n_folded_parameters:,}",
        )
        for fit in fits
    ]
    added, folded = sum(fit.n_parameters for fit in fits), sum(fit.n_folded_parameters for fit in fits)
    return text_table(header, [*lines, ("all", "", "", "", f"{added:,}", f"{folded:,}")], numbers_right=True)


def left_float_lines(left_float: Mapping[str, str]) -> list[str]:
    """Return a line per reason, with the first names that it is of."""
    by_reason: dict[str, list[str]] = {}
    for name, why in left_float.items():
        by_reason.setdefault(why, []).append(name)
    lines = []
    for why, names in by_reason.items():
        more = len(names) - NAMES_PER_REASON
        said = ", ".join(names[:NAMES_PER_REASON]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"left in float: {said} ({why})")
    return lines


def level_db(moments: ChannelMoments) -> float:
    """Return signal to noise of moments of (got, wanted): the variance of the wanted over the mean squared error.

    Both are summed over channels, so that what differs between channels alone is no signal.
    """
    identity = ChannelAffine.identity(len(moments.xx))
    return snr_db(float(moments.yy.sum()), float(moments.squared_error(identity).sum()))


def snr_db(signal: float, error: float) -> float:
    """Return 10 log10(signal / error): infinite where there is no error, −infinite where there is no signal."""
    if not signal:
        return -inf
    return 10 * log10(signal / error) if error else inf


def show_db(value: float) -> str:
    """Return a level or a gain in dB."""
    if value == inf:
        return "exact"
    return f"{value:.2f}" if isfinite(value) else "–"
