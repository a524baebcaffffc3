"""Cost against accuracy: small multiples over all runs of a store, one for each cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from coldtap.adaptors.report.model import RunReport
from coldtap.adaptors.report.numbers import show_bytes, show_count, show_percent, show_seconds
from coldtap.adaptors.report.svg import element, fit_axis, frame, line, picture

WIDTH, HEIGHT = 340.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 12.0, 42.0
POLYGONS = ((4, 45), (3, -90), (4, 0), (3, 90), (5, -90), (6, 0), (8, 22.5))
N_LOOKS = 1 + len(POLYGONS)  # a ninth adaptor looks like the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What is on a horizontal axis."""

    title: str
    label: str
    of: Callable[[RunReport], float | None]
    show: Callable[[float], str]


COSTS = (
    Cost(title="Training time", label="seconds of training", of=lambda run: run.seconds, show=show_seconds),
    Cost(title="Size", label="trainable parameters", of=lambda run: float(run.parameters), show=show_count),
    Cost(title="Reading", label="bytes read per sample", of=lambda run: run.bytes_per_sample, show=show_bytes),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run in a picture; `href` leads to its section."""

    run: RunReport
    look: int
    href: str


def choose_split(runs: Sequence[RunReport]) -> str | None:
    """Return the split to compare on: val, on which choices are made, where a run has it; else test, if all have it."""
    if any("val" in run.splits for run in runs):
        return "val"
    return "test" if all("test" in run.splits for run in runs) else None


def draw_cost(cost: Cost, points: Sequence[Point], split: str) -> Markup | None:
    """One picture, with a line through the runs that none other beats at less cost.

    None where the cost is known of no run, or the same for all: there is nothing to weigh.
    """
    known = [(point, float(c)) for point in points if (c := cost.of(point.run)) is not None and c > 0]
    if len({c for _, c in known}) < 2:
        return None
    scores = [point.run.splits[split].score for point, _ in known]
    x = fit_axis([c for _, c in known], start=LEFT, end=WIDTH - RIGHT, may_log=True)
    y = fit_axis(scores, start=HEIGHT - BOTTOM, end=TOP)
    places = [(x(c), y(score)) for (_, c), score in zip(known, scores, strict=True)]
    marks = [
        _mark(point, at, f"{point.run.name}: {show_percent(score)} {split}, {cost.show(c)}")
        for (point, c), score, at in zip(known, scores, places, strict=True)
    ]
    title = f"{len(known)} runs: score on {split} against {cost.label}"
    label = f"{cost.label}{' (log)' if x.log else ''}"
    axes = frame(x, y, x_label=label, show_x=cost.show, show_y=lambda value: f"{100 * value:.3g} %")
    return picture(WIDTH, HEIGHT, axes, _frontier(places), *marks, title=title)


def draw_key(look: int) -> Markup:
    """Return the mark of an adaptor alone, for a legend; the words beside it say the rest."""
    mark = element("g", shape(look, 8, 8), class_=f"look{look % N_LOOKS}")
    return element("svg", mark, viewBox="0 0 16 16", class_="key", aria_hidden="true")


def shape(look: int, x: float, y: float) -> Markup:
    """Draw a mark; marks differ in shape as well as in colour: a circle, then polygons of so many corners, turned."""
    if look % N_LOOKS == 0:
        return element("circle", cx=x, cy=y, r=5.2)
    n_corners, turn = POLYGONS[look % N_LOOKS - 1]
    angles = [math.radians(turn + 360 * i / n_corners) for i in range(n_corners)]
    corners = [(x + 6.2 * math.cos(angle), y + 6.2 * math.sin(angle)) for angle in angles]
    return element("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners))


def _mark(point: Point, at: tuple[float, float], said: str) -> Markup:
    return element(
        "a", element("title", said), shape(point.look, *at), href=point.href, class_=f"point look{point.look % N_LOOKS}"
    )


def _frontier(places: Sequence[tuple[float, float]]) -> Markup:
    """Draw a line through the runs that none beats at no more cost: from left to right, each higher than all before."""
    best: list[tuple[float, float]] = []
    for place in sorted(places):
        if not best or place[1] < best[-1][1]:
            best.append(place)
    return line(best, class_="frontier") if len(best) > 1 else Markup("")
