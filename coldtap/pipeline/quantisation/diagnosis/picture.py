"""A diagnosis as one picture: levels at sites, taps and blocks, and each site's full matrix beside its diagonal."""

import io
from collections.abc import Sequence
from math import isfinite, nan
from typing import TYPE_CHECKING, Any

from coldtap.pipeline.quantisation.compensation.site_table import show_db
from coldtap.pipeline.quantisation.diagnosis.result import Diagnosis, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, BLUE, ORANGE, GREEN = "#7a7a7a", "#2f6db3", "#d9822b", "#2a8f5b"
MAX_LABELS = 26  # that stay legible below a panel
BAR = 0.38  # of the room that a site has


def draw_diagnosis(diagnosis: Diagnosis) -> bytes:
    """Draw a diagnosis; returns a PNG. What is drawn are means over the seeds, and their range."""
    # Imported here: half a second that a process which never draws does not pay. Figure, not pyplot: no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9.5), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    left, right = halves
    levels, gains, shares = left.subplots(3, 1, sharex=True, height_ratios=(1.4, 1, 1))
    taps, blocks = right.subplots(2, 1, height_ratios=(1.4, 1))
    _draw_sites(diagnosis, levels, gains, shares)
    _draw_taps(diagnosis, taps)
    _draw_blocks(diagnosis, blocks)
    n_seeds = len(diagnosis.runs)
    spread = f"mean and range of {n_seeds} seeds" if n_seeds > 1 else "one seed"
    figure.suptitle(
        f"{diagnosis.architecture} in {diagnosis.scheme}: signal to noise against the float model "
        f"({diagnosis.n_calibration} calibration images, {diagnosis.n_held_out} held out; {spread})",
        fontsize=13,
    )
    picture = io.BytesIO()
    # "Software" would put matplotlib's version, and so other bytes, into the file.
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()


def _draw_sites(diagnosis: Diagnosis, levels: "Axes", gains: "Axes", shares: "Axes") -> None:
    sites = diagnosis.sites
    _dumbbells(levels, [site.uncompensated_db for site in sites], [site.cwac_db for site in sites], "CWAC", BLUE)
    _finish(levels, "SNR (dB)", "Sites of CWAC, behind a compensated prefix")
    _legend_above(levels)
    _bars(gains, [site.diagonal_gain_db for site in sites], BLUE, "CWAC over nothing", side=-1)
    _bars(gains, [site.full_gain_db for site in sites], GREEN, "full matrix over CWAC", side=1)
    gains.axhline(0, color="black", lw=0.8)
    _finish(gains, "gain (dB)", "What a full matrix brings (no gate)")
    _legend_above(gains)
    _bars(shares, [_percent(site.off_diagonal_share) for site in sites], BLUE, "of the matrix M", side=-1)
    change = [_percent(site.off_diagonal_share_of_change) for site in sites]
    _bars(shares, change, GREEN, "of its change, M − 1", side=1)
    shares.set_ylim(0, 100)
    _finish(shares, "energy (%)", "Its energy off the diagonal")
    _legend_above(shares)
    _name(shares, [_short(site.name) for site in sites])


def _draw_taps(diagnosis: Diagnosis, axes: "Axes") -> None:
    taps = diagnosis.taps
    lines = [
        ([tap.uncompensated_db for tap in taps], GREY, "nothing"),
        ([tap.cwac_db for tap in taps], BLUE, "CWAC"),
        ([tap.qwt_db for tap in taps], ORANGE, "QwT"),
    ]
    for spreads, colour, label in lines:
        _line(axes, spreads, colour, f"{label} ({taps[-1].name}: {show_db(spreads[-1].mean)})")
    _keep_first_outside(axes, [spreads for spreads, _, _ in lines])
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    _finish(axes, "SNR (dB)", "Taps of the whole model")
    _name(axes, [tap.name for tap in taps])


def _draw_blocks(diagnosis: Diagnosis, axes: "Axes") -> None:
    blocks = diagnosis.blocks
    _dumbbells(axes, [block.uncompensated_db for block in blocks], [block.qwt_db for block in blocks], "QwT", ORANGE)
    _finish(axes, "SNR (dB)", "Blocks of QwT, behind a compensated prefix")
    _legend_above(axes)
    _name(axes, [_short(block.name) for block in blocks])


def _keep_first_outside(axes: "Axes", lines: Sequence[Sequence[Spread]]) -> None:
    """Leave the first tap, which has 8 bits and is far above the others, out of the scale, and say its level."""
    first = [line[0].mean for line in lines]
    rest = [end for line in lines for spread in line[1:] for end in (spread.lowest, spread.highest) if isfinite(end)]
    if not rest or not min(first) > max(rest) + (height := max(rest) - min(rest)):
        return
    axes.set_ylim(min(rest) - 0.1 * height, max(rest) + 0.2 * height)
    axes.annotate(f"↑ {show_db(min(first))}", (0, 0.99), xycoords=("data", "axes fraction"), ha="center", va="top")


def _line(axes: "Axes", spreads: Sequence[Spread], colour: str, label: str) -> None:
    places = range(len(spreads))
    lowest, mean, highest = _ends(spreads)
    axes.fill_between(places, lowest, highest, color=colour, alpha=0.25, lw=0)
    axes.plot(places, mean, color=colour, marker="o", ms=4, lw=1.6, label=label)


def _dumbbells(axes: "Axes", before: Sequence[Spread], after: Sequence[Spread], label: str, colour: str) -> None:
    """A dot before and one after, joined; the range of each behind it."""
    places = range(len(before))
    axes.vlines(places, _ends(before)[1], _ends(after)[1], color=colour, lw=1.2)
    for spreads, shade, name in ((before, GREY, "without"), (after, colour, label)):
        lowest, mean, highest = _ends(spreads)
        axes.vlines(places, lowest, highest, color=shade, alpha=0.3, lw=8)
        axes.plot(places, mean, "o", color=shade, ms=6, label=name)


def _bars(axes: "Axes", spreads: Sequence[Spread], colour: str, label: str, *, side: int) -> None:
    """Bars left (−1) or right (1) of their places, and their range."""
    places = [place + side * BAR / 2 for place in range(len(spreads))]
    lowest, mean, highest = _ends(spreads)
    axes.bar(places, mean, BAR, color=colour, alpha=0.75, label=label)
    axes.vlines(places, lowest, highest, color="black", lw=1)


def _ends(spreads: Sequence[Spread]) -> tuple[list[float], list[float], list[float]]:
    """Lowest, mean and highest; what is not finite cannot be drawn and leaves a gap."""
    ends = ([one.lowest for one in spreads], [one.mean for one in spreads], [one.highest for one in spreads])
    lowest, mean, highest = ([value if isfinite(value) else nan for value in values] for values in ends)
    return lowest, mean, highest


def _finish(axes: "Axes", unit: str, title: str) -> None:
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_above(axes: "Axes") -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, frameon=False, fontsize=9, columnspacing=1.2)


def _name(axes: "Axes", names: Sequence[str]) -> None:
    """Name the places on the lower axis, as many as there is room for."""
    step = -(-len(names) // MAX_LABELS)
    long = max(map(len, names)) > 4
    axes.set_xlim(-0.7, len(names) - 0.3)  # whatever could not be drawn
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90 if long else 0, fontsize=9)


def _short(name: str) -> str:
    """`blocks.3.attn.proj` as `3.proj`; other families' names as they are."""
    parts = name.split(".")
    return ".".join([parts[1], *parts[2:][-1:]]) if parts[0] == "blocks" else name


def _percent(share: Spread) -> Spread:
    return Spread(tuple(100 * value for value in share.values))
