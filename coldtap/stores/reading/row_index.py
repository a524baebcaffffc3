"""Which rows are there: those that the recipe plans, but for the rejected ones.

So no table of all rows has to be read before the first batch: that of ten million takes seconds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from coldtap.stores.format.rows import Segment

type Rows = np.ndarray[Any, np.dtype[np.int64]]


class PresentRows:
    """The present rows of a store; `rejected` are the planned rows that are not there, ascending."""

    def __init__(self, segments: Sequence[Segment], block_rows: int, rejected: Rows) -> None:
        self._segments = {(segment.split, segment.view): segment for segment in segments}
        self._block_rows = block_rows
        self._rejected = rejected
        self._first_rows = np.array([segment.first_block * block_rows for segment in segments])
        self._first_samples = np.array([segment.first_sample for segment in segments])
        self._sizes = np.array([segment.n_samples for segment in segments])
        self._first_lines = np.cumsum(self._sizes) - self._sizes

    def __len__(self) -> int:
        return int(self._sizes.sum()) - len(self._rejected)

    def of(self, split: str, view: int) -> Rows:
        """Numbers of the present rows of a (split, view), ascending; empty where there are none."""
        segment = self._segments.get((split, view))
        if segment is None:
            return np.empty(0, np.int64)
        first = segment.first_block * self._block_rows
        rows = np.arange(first, first + segment.n_samples)
        start, end = np.searchsorted(self._rejected, [first, first + segment.n_samples])
        return rows if start == end else np.delete(rows, self._rejected[start:end] - first)

    def sample_numbers(self, rows: Rows) -> Rows:
        """The number of each row's sample, counted over the splits in row order: views of a sample share it.

        Args:
            rows: present rows.
        """
        segment, offset = self._located(rows)
        return np.asarray(self._first_samples[segment] + offset)

    def missing(self, rows: Rows) -> Rows:
        """Those of some row numbers that are not there."""
        segment, offset = self._located(rows)
        planned = (segment >= 0) & (offset < self._sizes[segment])
        return np.asarray(rows[~planned | self._are_rejected(rows)])

    def lines(self, rows: Rows) -> Rows:
        """The line of each present row in a table of all present rows."""
        segment, offset = self._located(rows)
        return np.asarray(self._first_lines[segment] + offset - np.searchsorted(self._rejected, rows))

    def _located(self, rows: Rows) -> tuple[Rows, Rows]:
        """The segment of each row, −1 before the first, and the row's place in it."""
        segment = np.searchsorted(self._first_rows, rows, side="right") - 1
        return segment, rows - self._first_rows[segment]

    def _are_rejected(self, rows: Rows) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if len(self._rejected) == 0:
            return np.zeros(len(rows), bool)
        places = np.minimum(np.searchsorted(self._rejected, rows), len(self._rejected) - 1)
        return np.asarray(self._rejected[places] == rows)
