"""The table of a benchmark: datasets × adaptors, their means, and the same as text, CSV and HTML."""

from coldtap.adaptors.results.csv_lines import table_csv
from coldtap.adaptors.results.page import table_html
from coldtap.adaptors.results.table import DEVIATIONS, Cell, ResultTable, Row, Score
from coldtap.adaptors.results.text import table_text

__all__ = ["DEVIATIONS", "Cell", "ResultTable", "Row", "Score", "table_csv", "table_html", "table_text"]
