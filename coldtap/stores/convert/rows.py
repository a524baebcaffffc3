"""Where the rows of a converted store come from.

Both stores have the same segments, (split, view) by (split, view), and the same samples in them; only where blocks
begin may differ, because S depends on the bytes of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.journal import JournalLine, Rejection, journal_name, parse_line
from coldtap.stores.format.rows import RowPlan, Segment
from coldtap.stores.format.tables import REJECTED, SAMPLES
from coldtap.stores.reading.store import Store

type Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a block of the new store takes from the old one.

    Attributes:
        rows: numbers of the present rows in the old store, ascending.
        shift: what is added to them to get their numbers in the new one.
        source_sha256, rejected: of its rows, numbered as in the new store.
        ranges: smallest and largest value of each tap, an array each, in the old blocks that hold these rows.
    """

    rows: Rows
    shift: int
    source_sha256: dict[int, str]
    rejected: list[Rejection]
    ranges: dict[str, list[list[float]]]


def row_plan(source: Store, block_rows: int) -> RowPlan:
    """Return the rows of a store in blocks of another size; samples are numbered in row order."""
    first, order = 0, {}
    for segment in source.segments:
        if segment.view == 0:
            order[segment.split] = range(first, first + segment.n_samples)
            first += segment.n_samples
    return RowPlan(order=order, views=source.views, block_rows=block_rows)


def origin_of(source: Store, plan: RowPlan, block: int) -> Origin:
    """Return where the rows of a block come from.

    Raises:
        CorruptStoreError: a journal line of the old store is not what its manifest says.
    """
    place = max(i for i, segment in enumerate(plan.segments) if segment.first_block <= block)
    new, old = plan.segments[place], source.segments[place]
    old_block_rows = source.recipe.encoding.block_rows
    start = (block - new.first_block) * plan.block_rows
    first = old.first_block * old_block_rows + start
    rows = range(first, first + min(plan.block_rows, new.n_samples - start))
    shift = block * plan.block_rows - first
    blocks = range(rows[0] // old_block_rows, rows[-1] // old_block_rows + 1)
    lines = [_line(source, old_block) for old_block in blocks]
    digests = {row: digest for line in lines for row, digest in line.source_sha256.items() if row in rows}
    rejected = [rejection for line in lines for rejection in line.rejected if rejection.row in rows]
    return Origin(
        rows=np.array(sorted(digests), np.int64),
        shift=shift,
        source_sha256={row + shift: digest for row, digest in digests.items()},
        rejected=[replace(rejection, row=rejection.row + shift) for rejection in rejected],
        ranges=_joined([line.ranges for line in lines]),
    )


def _line(source: Store, block: int) -> JournalLine:
    name = journal_name(block)
    return parse_line(source.read_file(name), block, where=source.storage.describe(name))


def _joined(ranges: Sequence[Any]) -> dict[str, list[list[float]]]:
    """The ranges of several blocks together."""
    found: dict[str, list[list[float]]] = {}
    for of_block in ranges:
        for name, taps in of_block.items():
            before = found.get(name) or taps
            found[name] = [[min(a[0], b[0]), max(a[1], b[1])] for a, b in zip(before, taps, strict=True)]
    return found


class Column(Sequence[str]):
    """A column of text that stays in Arrow's memory: a Python string each would be three times as large."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self._values = values.combine_chunks()

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        found: str | Sequence[str] = (
            self._values[place].to_pylist() if isinstance(place, slice) else self._values[place].as_py()
        )
        return found


def sample_columns(source: Store) -> tuple[Column, Column]:
    """Id and origin of every sample, rejected ones included, in the order of `row_plan`'s numbers.

    Raises:
        CorruptStoreError: a table is damaged, or does not list every planned sample once.
    """
    columns = ["row", "sample_id", "view", "source"]
    tables = source.index.samples(columns), source.index.rejected(columns)
    samples = pa.concat_tables([table.filter(pc.equal(table["view"], 0)) for table in tables]).sort_by("row")
    planned = np.concatenate([_planned_rows(source, segment) for segment in source.segments if segment.view == 0])
    if not np.array_equal(samples["row"].to_numpy(), planned):
        raise CorruptStoreError(
            f"{source.storage}: {SAMPLES} and {REJECTED} do not list every planned row once: run `coldtap verify`"
        )
    return Column(samples["sample_id"]), Column(samples["source"])


def _planned_rows(source: Store, segment: Segment) -> Rows:
    first = segment.first_block * source.recipe.encoding.block_rows
    return np.arange(first, first + segment.n_samples)
