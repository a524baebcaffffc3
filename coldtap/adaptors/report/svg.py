"""A small writer of SVG, and the axes that the pictures share.

Colours and fonts are classes of the page's style, so that pictures follow its light and dark schemes; a picture
carries no style of its own. A few hundred bytes an axis, where a plotting library's output takes tens of thousands.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

STEPS = (1, 2, 2.5, 5, 10)


def element(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """One element; `_` in an attribute's name stands for `-`, and `class_` for `class`. Text is escaped."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"' for key, value in attributes.items()
    )
    inside = Markup("").join(children)
    return Markup(f"<{name}{given}>{inside}</{name}>") if children else Markup(f"<{name}{given}/>")


def picture(width: float, height: float, *children: Markup, title: str, class_: str = "plot") -> Markup:
    """Return an SVG image of a size in user units; `title` is what those hear who do not see it."""
    return element(
        "svg", *children, viewBox=f"0 0 {_short(width)} {_short(height)}", role="img", aria_label=title, class_=class_
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str = "tick") -> Markup:
    """Return a line of text at its baseline."""
    return element("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def line(points: Iterable[tuple[float, float]], *, class_: str) -> Markup:
    """Return a line through points."""
    return element("polyline", points=" ".join(f"{_short(x)},{_short(y)}" for x, y in points), class_=class_)


def _short(value: object) -> str:
    """A number with one decimal at most; pictures need no more."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps values low … high to pixels start … end, in a straight line or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside the axis."""
        candidates = _log_ticks(self.low, self.high, most) if self.log else _even_ticks(self.low, self.high, most)
        slack = 1e-9 * (self.high - self.low)
        return [value for value in candidates if self.low - slack <= value <= self.high + slack]


def fit_axis(
    values: Sequence[float], *, start: float, end: float, floor: float | None = None, may_log: bool = False
) -> Axis:
    """Return an axis around values, with a little room; from `floor` on where one is given.

    By logarithm where `may_log` and the values span a factor of eight.
    """
    low, high = min(values), max(values)
    if may_log and low > 0 and high / low >= 8:
        room = (high / low) ** 0.08
        return Axis(low=low / room, high=high * room, start=start, end=end, log=True)
    if floor is not None:
        return Axis(low=floor, high=(high if high > floor else floor + 1) * 1.05, start=start, end=end)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low=low - room, high=high + room, start=start, end=end)


def _even_ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * step for step in STEPS if power * step >= raw)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten; with 3, or with 2 and 5, between them where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= most:
            found = inside
    return found


def frame(x: Axis, y: Axis, *, x_label: str, show_x: Callable[[float], str], show_y: Callable[[float], str]) -> Markup:
    """Grid lines with their values, and the label of the horizontal axis."""
    right, bottom = x.end, y.start
    rows = [
        element("path", d=f"M{_short(x.start)} {_short(y(value))}H{_short(right)}", class_="grid")
        + text(x.start - 6, y(value) + 4, show_y(value), anchor="end")
        for value in y.ticks(5)
    ]
    columns = [text(x(value), bottom + 16, show_x(value), anchor="middle") for value in x.ticks(4)]
    base = element("path", d=f"M{_short(x.start)} {_short(bottom)}H{_short(right)}", class_="base")
    label = text((x.start + right) / 2, bottom + 34, x_label, anchor="middle", class_="label")
    return Markup("").join([*rows, base, *columns, label])
