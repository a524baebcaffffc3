"""What compensation does, site by site, as plain text."""

from collections.abc import Sequence
from math import inf, isfinite, log10

from coldtap.pipeline.quantisation.cwac import SiteFit


def site_table(fits: Sequence[SiteFit]) -> str:
    """A line a site: signal to noise on images held out, channels that the gate let through, parameters added."""
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
    return aligned(header, [*lines, ("all", "", "", "", f"{added:,}", f"{folded:,}")])


def snr_db(signal: float, error: float) -> float:
    """10 log10(signal / error): infinite where there is no error, −infinite where there is no signal."""
    if not signal:
        return -inf
    return 10 * log10(signal / error) if error else inf


def show_db(value: float) -> str:
    """A level or a gain in dB."""
    if value == inf:
        return "exact"
    return f"{value:.2f}" if isfinite(value) else "–"


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table: names to the left, numbers to the right."""
    rows = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip() for row in rows
    )
