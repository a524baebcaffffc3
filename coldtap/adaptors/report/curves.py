"""The curves of a run: losses and the deciding score over the epochs."""

from collections.abc import Sequence

from markupsafe import Markup

from coldtap.adaptors.report.model import RunReport
from coldtap.adaptors.report.numbers import show_percent
from coldtap.adaptors.report.svg import Axis, element, fit_axis, frame, line, picture, text

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 26.0, 40.0

type Points = Sequence[tuple[float, float]]


def draw_losses(run: RunReport) -> Markup:
    """Mean losses (nats) on train and val."""
    train = [(float(point.epoch), point.train_loss) for point in run.epochs]
    val = [(float(point.epoch), point.val_loss) for point in run.epochs if point.val_loss is not None]
    x = _epochs(run)
    y = fit_axis([value for _, value in [*train, *val]], start=HEIGHT - BOTTOM, end=TOP, floor=0.0)
    drawn = [_series(train, x, y, "train"), _series(val, x, y, "val")] if val else [_series(train, x, y, "train")]
    legend = _legend(["train", "val"] if val else ["train"])
    best = min((value for _, value in val), default=None)
    lowest = "" if best is None else f"; lowest on val {best:.3g}"
    title = f"Loss over {len(run.epochs)} epochs: train from {train[0][1]:.3g} to {train[-1][1]:.3g}{lowest}"
    axes = frame(x, y, x_label="epoch", show_x=_whole, show_y=lambda value: f"{value:.3g}")
    return picture(WIDTH, HEIGHT, axes, _kept(run, x), *drawn, legend, title=title)


def draw_scores(run: RunReport) -> Markup | None:
    """Return the deciding score on val, with the epoch that was kept; None where there is no val."""
    val = [(float(point.epoch), point.val_score) for point in run.epochs if point.val_score is not None]
    if not val:
        return None
    x = _epochs(run)
    y = fit_axis([value for _, value in val], start=HEIGHT - BOTTOM, end=TOP)
    y = Axis(low=max(y.low, 0.0), high=min(y.high, 1.0) if y.low < 1 else 1.05, start=y.start, end=y.end)
    kept = dict(val).get(float(run.best_epoch))
    dot = [element("circle", cx=x(run.best_epoch), cy=y(kept), r=4.5, class_="kept")] if kept is not None else []
    title = f"{run.metric} on val over {len(val)} epochs; kept epoch {run.best_epoch} with {show_percent(kept)}"
    said = text(LEFT, 14, f"kept: epoch {run.best_epoch}, {show_percent(kept)}", class_="label")
    axes = frame(x, y, x_label="epoch", show_x=_whole, show_y=lambda value: f"{100 * value:.3g} %")
    return picture(WIDTH, HEIGHT, axes, _kept(run, x), _series(val, x, y, "val"), *dot, said, title=title)


def _epochs(run: RunReport) -> Axis:
    numbers = [point.epoch for point in run.epochs]
    low, high = min(numbers), max(numbers)
    return Axis(low=low, high=high if high > low else low + 1, start=LEFT, end=WIDTH - RIGHT)


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else ""


def _series(points: Points, x: Axis, y: Axis, name: str) -> Markup:
    places = [(x(epoch), y(value)) for epoch, value in points]
    dots = (
        [element("circle", cx=cx, cy=cy, r=2.2, class_=f"dot {name}") for cx, cy in places] if len(places) < 15 else []
    )
    return Markup("").join([line(places, class_=f"line {name}"), *dots])


def _kept(run: RunReport, x: Axis) -> Markup:
    at = f"{x(run.best_epoch):.1f}"
    return element("path", d=f"M{at} {TOP:.0f}V{HEIGHT - BOTTOM:.0f}", class_="mark")


def _legend(names: Sequence[str]) -> Markup:
    parts = []
    for i, name in enumerate(names):
        at = LEFT + 70 * i
        parts += [line([(at, 10), (at + 22, 10)], class_=f"line {name}"), text(at + 28, 14, name, class_="label")]
    return Markup("").join(parts)
