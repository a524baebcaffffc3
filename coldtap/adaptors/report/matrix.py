"""The confusion matrix: true classes down, predicted classes across, each row by its own size."""

import math
from collections import defaultdict
from dataclasses import dataclass

from markupsafe import Markup

from coldtap.adaptors.report.model import Outcome
from coldtap.adaptors.report.svg import element, picture, text

MAX_CLASSES = 50  # beyond, a cell is smaller than a finger and a phone's memory is better spent
MAX_WITH_COUNTS = 12  # of up to these each cell shows its number, and tells it
MAX_PAIRS = 8
LEVELS = 10
WIDTH = 380.0
LETTER = 6.2  # the width of a letter, about, in user units
LONGEST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One class taken for another: how often, and the share of the true class."""

    truth: str
    predicted: str
    n: int
    share: float


def confused_pairs(outcome: Outcome) -> list[Pair]:
    """Return the most frequent mistakes."""
    if outcome.confusion is None:
        return []
    triples = zip(
        outcome.confusion.truth.tolist(),
        outcome.confusion.predicted.tolist(),
        outcome.confusion.counts.tolist(),
        strict=True,
    )
    wrong = sorted((-n, truth, predicted) for truth, predicted, n in triples if truth != predicted)
    names, sizes = outcome.class_names, [score.n for score in outcome.classes]
    return [
        Pair(truth=names[truth], predicted=names[predicted], n=-n, share=-n / sizes[truth])
        for n, truth, predicted in wrong[:MAX_PAIRS]
    ]


def draw_matrix(outcome: Outcome) -> tuple[Markup, bool] | None:
    """Return the matrix, and whether it is wider than a phone; None where there are too many classes."""
    n = len(outcome.class_names)
    if outcome.confusion is None or n > MAX_CLASSES:
        return None
    names = [_cut(name) for name in outcome.class_names]
    room = LETTER * max(len(name) for name in names) + 10
    with_counts = n <= MAX_WITH_COUNTS
    cell = min(40.0, (WIDTH - 1.3 * room) / n) if with_counts else 15.0
    is_flat = max(len(name) for name in names) * LETTER < cell
    left, top = room, 18.0 if is_flat else 0.95 * room
    width, height = left + n * cell + (4 if is_flat else 0.5 * room), top + n * cell + 4
    labels = [
        _label(name, whole, x=left - 6, y=top + (i + 0.5) * cell + 4, text_anchor="end")
        + _column_label(name, whole, left + (i + 0.5) * cell, top - 6, is_flat=is_flat)
        for i, (name, whole) in enumerate(zip(names, outcome.class_names, strict=True))
    ]
    cells = _told_cells(outcome, left, top, cell) if with_counts else _plain_cells(outcome, left, top, cell)
    field = element("rect", x=left, y=top, width=n * cell, height=n * cell, class_="field")
    title = f"Confusion matrix of {n} classes on {outcome.split}; its largest mistakes are in the table after it"
    wide = width > 1.1 * WIDTH
    drawn = picture(width, height, field, cells, *labels, title=title, class_="matrix wide" if wide else "matrix")
    return (_sized(drawn, width, height) if wide else drawn), wide


def _sized(drawn: Markup, width: float, height: float) -> Markup:
    """A picture that keeps its size: its own container scrolls."""
    return drawn.replace(Markup("<svg "), Markup(f'<svg width="{width:.0f}" height="{height:.0f}" '), 1)


def _told_cells(outcome: Outcome, left: float, top: float, cell: float) -> Markup:
    drawn = []
    for truth, predicted, n, share in _shares(outcome):
        x, y = left + predicted * cell, top + truth * cell
        names = outcome.class_names
        said = f"{names[truth]}, {'got right' if truth == predicted else f'taken for {names[predicted]}'}: {n}"
        strength = _strength(share)
        shown = text(
            x + cell / 2, y + cell / 2 + 4, str(n), anchor="middle", class_="strong" if strength >= 0.55 else "weak"
        )
        square = element("rect", x=x + 0.5, y=y + 0.5, width=cell - 1, height=cell - 1, fill_opacity=f"{strength:.2f}")
        kind = "right" if truth == predicted else "wrong"
        drawn.append(element("g", element("title", f"{said} ({100 * share:.0f} %)"), square, shown, class_=kind))
    return Markup("").join(drawn)


def _plain_cells(outcome: Outcome, left: float, top: float, cell: float) -> Markup:
    """One path a shade: thousands of cells in a few kilobytes."""
    paths: dict[tuple[str, int], list[str]] = defaultdict(list)
    for truth, predicted, _, share in _shares(outcome):
        level = max(1, round(LEVELS * _strength(share)))
        square = f"M{left + predicted * cell + 0.5:.1f} {top + truth * cell + 0.5:.1f}h{cell - 1:.0f}v{cell - 1:.0f}"
        paths["right" if truth == predicted else "wrong", level].append(f"{square}h-{cell - 1:.0f}z")
    return Markup("").join(
        element("path", d="".join(squares), class_=kind, fill_opacity=f"{level / LEVELS:.1f}")
        for (kind, level), squares in sorted(paths.items())
    )


def _shares(outcome: Outcome) -> list[tuple[int, int, int, float]]:
    assert outcome.confusion is not None
    found = outcome.confusion
    triples = zip(found.truth.tolist(), found.predicted.tolist(), found.counts.tolist(), strict=True)
    return [(truth, predicted, n, n / outcome.classes[truth].n) for truth, predicted, n in triples]


def _strength(share: float) -> float:
    """Square root, so that a mistake in a hundred is still seen."""
    return max(0.08, math.sqrt(share))


def _column_label(name: str, whole: str, x: float, y: float, *, is_flat: bool) -> Markup:
    if is_flat:
        return _label(name, whole, x=x, y=y, text_anchor="middle")
    return _label(name, whole, transform=f"translate({x + 3:.1f} {y:.1f}) rotate(-60)")


def _label(name: str, whole: str, **attributes: object) -> Markup:
    title = [element("title", whole)] if name != whole else []
    return element("text", *title, name, class_="name", **attributes)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
