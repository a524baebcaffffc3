"""The table as CSV: one line a cell."""

import csv
import io

from coldtap.adaptors.results.table import Cell, ResultTable, Score
from coldtap.text import csv_cell

# `seconds` alone is a time: all other columns are the same after an interruption and in a second run.
COLUMNS = (
    "dataset",
    "adaptor",
    "metric",
    "mean",
    "std",
    "test",
    "val",
    "setting",
    "parameters",
    "bytes_per_sample",
    "seconds",
    "failure",
)


def table_csv(table: ResultTable) -> str:
    """Return a line a cell: scores in percent, those of test and val one a seed with blanks between."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        map(csv_cell, line) for line in (COLUMNS, *map(_line, table.in_order()))
    )
    return text.getvalue()


def _line(cell: Cell) -> list[str]:
    if cell.failure is not None:
        return [cell.dataset, cell.adaptor, *[""] * (len(COLUMNS) - 3), cell.failure]
    score = Score.of(cell.test)
    costs = [str(cell.parameters), f"{cell.bytes_per_sample:.0f}", f"{cell.seconds:.3f}"]
    scores = [_percent(score.mean), _percent(score.deviation), _many(cell.test), _many(cell.val)]
    return [cell.dataset, cell.adaptor, cell.metric, *scores, cell.chosen, *costs, ""]


def _percent(score: float) -> str:
    return f"{100 * score:.4f}"


def _many(scores: tuple[float, ...]) -> str:
    return " ".join(map(_percent, scores))
