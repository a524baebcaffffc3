"""Which rows are there: those that the recipe plans, but for the rejected ones.

So no table of all rows has to be read before the first batch: that of ten million takes seconds.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from coldtap.errors import CorruptStoreError, MissingFeaturesError
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import Segment, segments_of
from coldtap.stores.format.tables import REJECTED, REJECTED_SCHEMA, SAMPLES, SAMPLES_SCHEMA, parse_table
from coldtap.stores.reading.manifest_files import ManifestFiles

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

    def all(self) -> Rows:
        """Return the numbers of all present rows, ascending."""
        return np.concatenate([self.of(split, view) for split, view in self._segments])

    def sample_numbers(self, rows: Rows) -> Rows:
        """Return the number of each row's sample, counted over the splits in row order: views of a sample share it.

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
        """Return the line of each present row in a table of all present rows."""
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


class RowIndex:
    """Which sample each row of a complete store is; each table is read when it is first needed."""

    def __init__(self, files: ManifestFiles, recipe: Recipe) -> None:
        """Read nothing yet."""
        self._files, self._rows, self._block_rows = files, recipe.rows, recipe.encoding.block_rows

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Which rows are planned for which (split, view)."""
        return segments_of(self._rows.splits, self._rows.views, self._block_rows)

    @cached_property
    def present(self) -> PresentRows:
        """The rows that are there."""
        rejected = self.rejected(["row"])["row"].to_numpy()
        planned = PresentRows(self.segments, self._block_rows, np.empty(0, np.int64))
        if (np.diff(rejected) <= 0).any() or len(planned.missing(rejected)):
            where = self._files.storage.describe(REJECTED)
            raise CorruptStoreError(f"{where}: its rows are not ascending, or not planned")
        return PresentRows(self.segments, self._block_rows, rejected)

    def samples(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return columns of `samples.parquet`, held against the manifest: one line per present row, ascending."""
        where = self._files.storage.describe(SAMPLES)
        return parse_table(self._files.table(SAMPLES), SAMPLES_SCHEMA, columns, where=where)

    def rejected(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return columns of `rejected.parquet`, held against the manifest: one line per row that is not there."""
        where = self._files.storage.describe(REJECTED)
        return parse_table(self._files.table(REJECTED), REJECTED_SCHEMA, columns, where=where)

    def sample_numbers(self, rows: Sequence[int] | Rows) -> Rows:
        """Return the number of each row's sample; raises as `require_present` does."""
        return self.present.sample_numbers(self.require_present(rows))

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return sample ids of rows; raises as `require_present` does."""
        ids: list[str] = self._ids.take(pa.array(self._lines(rows))).to_pylist()
        return ids

    def sources(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return where the samples of rows came from; raises as `require_present` does."""
        column = self.samples(["source"])["source"]
        sources: list[str] = column.take(pa.array(self._lines(rows))).to_pylist()
        return sources

    def splits_by_id(self) -> dict[str, str]:
        """Return the split of every sample of the plan, rejected ones included, by sample id."""
        columns = ["sample_id", "split"]
        return {
            sample: split
            for table in (self.samples(columns), self.rejected(columns))
            for sample, split in zip(*(table[name].to_pylist() for name in columns), strict=True)
        }

    def require_present(self, rows: Sequence[int] | Rows) -> Rows:
        """Return row numbers as an array.

        Raises:
            MissingFeaturesError: one of them is not there.
        """
        wanted = np.asarray(rows, np.int64)
        missing = self.present.missing(wanted)
        if len(missing):
            raise MissingFeaturesError(
                f"{self._files.storage} has no row {int(missing[0])}: it is padding, was rejected, or is out of range"
            )
        return wanted

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        return self.samples(["sample_id"])["sample_id"]

    def _lines(self, rows: Sequence[int] | Rows) -> Rows:
        """The lines of rows in `samples.parquet`."""
        lines = self.present.lines(self.require_present(rows))
        if len(lines) and int(lines.max()) >= len(self._ids):
            raise CorruptStoreError(f"{self._files.storage.describe(SAMPLES)} has fewer lines than the store has rows")
        return lines
