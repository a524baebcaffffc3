"""The table as one HTML file that fetches nothing: readable on a phone, light and dark."""

from dataclasses import dataclass

from coldtap.adaptors.html_page import page_environment
from coldtap.adaptors.results.table import Cell, ResultTable, Row, Score
from coldtap.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A cell as the template shows it."""

    text: str
    look: str  # best, close, or nothing
    note: int | None  # number of the reason why there is no score


def table_html(table: ResultTable) -> str:
    """Return the page; whatever comes from outside is escaped by the template engine."""
    failures = table.failures()
    template = page_environment(str(__package__)).get_template("page.html")
    return template.render(
        table=table,
        rows=[(row, [_entry(table, row, adaptor, failures) for adaptor in table.adaptors]) for row in table.rows()],
        means=[(row, [_shown(row, adaptor) for adaptor in table.adaptors]) for row in table.means()],
        details=[(cell, _val(cell)) for cell in table.in_order() if cell.failure is None],
        failures=failures,
        version=__version__,
    )


def _entry(table: ResultTable, row: Row, adaptor: str, failures: list[str]) -> _Entry:
    cell = table.cell(row.name, adaptor)
    if cell is None:
        return _Entry(text="…", look="", note=None)
    if cell.failure is not None:
        return _Entry(text="–", look="", note=failures.index(cell.failure) + 1)
    return _shown(row, adaptor)


def _shown(row: Row, adaptor: str) -> _Entry:
    score = row.scores[adaptor]
    look = "best" if adaptor in row.best else "close" if adaptor in row.close else ""
    return _Entry(text="–" if score is None else str(score), look=look, note=None)


def _val(cell: Cell) -> str:
    return f"{100 * Score.of(cell.val).mean:.1f}"
