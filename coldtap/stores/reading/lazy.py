"""Rows of a stored array as a lazy dask array, for statistics over more features than memory holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from coldtap.extras import require_extra
from coldtap.stores.format.arrays import ArraySpec

if TYPE_CHECKING:
    import dask.array

type Rows = np.ndarray[Any, np.dtype[np.int64]]
type Values = np.ndarray[Any, np.dtype[np.float32]]


class Readable(Protocol):
    """An array that can be read row by row, and pickled."""

    spec: ArraySpec

    def read_into(self, out: Values, rows: Rows, taps: Sequence[int] | None = None) -> None:
        """Read rows as float32, in the order asked."""


def lazy_rows(
    array: Readable, rows: Rows, taps: tuple[int, ...] | None, row_shape: tuple[int, ...]
) -> "dask.array.Array":
    """Return rows of an array, a task per block of rows; a worker elsewhere opens the store itself.

    Args:
        array: is read when a task runs.
        rows: row numbers, in the order wanted.
        taps: tap indices; None for all that are stored.
        row_shape: of one row, with these taps.

    Raises:
        MissingExtraError: dask is not installed.
    """
    require_extra("cluster", for_="`StoredArray.dask`")
    import dask.array as da

    numbers = da.from_array(rows, chunks=array.spec.block_rows, name=False)
    axes = tuple(range(1, 1 + len(row_shape)))
    chunks = (numbers.chunks[0], *((size,) for size in row_shape))
    meta = np.empty((0, *row_shape), np.float32)
    lazy: dask.array.Array = numbers.map_blocks(
        _read, array, taps, row_shape, dtype=np.float32, new_axis=axes, chunks=chunks, meta=meta
    )
    return lazy


def _read(rows: Rows, array: Readable, taps: tuple[int, ...] | None, row_shape: tuple[int, ...]) -> Values:
    out = np.empty((len(rows), *row_shape), np.float32)
    array.read_into(out, rows, taps)
    return out
