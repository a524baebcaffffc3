"""The table as plain text."""

from coldtap.adaptors.results.table import Cell, ResultTable, Row, Score
from coldtap.text import text_table

DETAILS = ("dataset", "adaptor", "chosen on val", "val, %", "parameters", "bytes per sample", "training, s")


def table_text(table: ResultTable) -> str:
    """Return the table, what was chosen for each cell and what it cost, and why cells are empty."""
    failures = table.failures()
    details = [_details(cell) for cell in table.in_order() if cell.failure is None]
    header = ["test, %", "metric", *table.adaptors]
    lines = [_line(table, row, failures) for row in table.rows()]
    lines += [[row.name, row.metric, *(_score(row.scores[name]) for name in table.adaptors)] for row in table.means()]
    parts = [
        "\n".join([table.title, *table.about]),
        text_table(header, lines),
        text_table(DETAILS, details) if details else "",
        "\n".join(f"[{number}] {reason}" for number, reason in enumerate(failures, start=1)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(table: ResultTable, row: Row, failures: list[str]) -> list[str]:
    values = [_score(row.scores[adaptor]) for adaptor in table.adaptors]
    for number, adaptor in enumerate(table.adaptors):
        cell = table.cell(row.name, adaptor)
        if cell is None:
            values[number] = "…"
        elif cell.failure is not None:
            values[number] = f"– [{failures.index(cell.failure) + 1}]"
    return [row.name, row.metric, *values]


def _score(score: Score | None) -> str:
    return "–" if score is None else str(score)


def _details(cell: Cell) -> list[str]:
    n_bytes = f"{cell.bytes_per_sample:,.0f}" if cell.bytes_per_sample else "–"
    costs = [f"{cell.parameters:,}", n_bytes, f"{cell.seconds:.1f}"]
    return [cell.dataset, cell.adaptor, cell.chosen, f"{100 * Score.of(cell.val).mean:.1f}", *costs]
