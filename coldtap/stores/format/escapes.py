"""Values that the codes do not hold, a list a block, as plain Zarr arrays.

    escapes/<array>/position   (block, escape, axis) uint32   indices into the array: row, tap, token, channel
    escapes/<array>/value      (block, escape) float32        the value there

Lists differ in length: their chunks hold `CHUNK` escapes, the last one padded with the fill value, and the arrays are
as long as the longest list. A block writes its own chunks; the shape is known, and written, when all blocks are done.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunks import checksum, compress
from coldtap.stores.format.codes import Escapes

CHUNK = 16_384
NOWHERE = 2**32 - 1  # the fill value of `position`


def escape_chunks(spec: ArraySpec, block: int, escapes: Escapes) -> Iterator[tuple[str, bytes]]:
    """The files of a block's list: path under `features.zarr`, and bytes.

    Args:
        spec: the int8 array.
        block: its number.
        escapes: ascending by position; rows are those of the array.
    """
    columns = escapes.position if "tap" in spec.dimensions else escapes.position[:, [0, 2, 3]]
    for number, start in enumerate(range(0, len(columns), CHUNK)):
        part = slice(start, start + CHUNK)
        position = np.full((CHUNK, columns.shape[1]), NOWHERE, "<u4")
        value = np.full(CHUNK, np.nan, "<f4")
        position[: len(columns[part])] = columns[part]
        value[: len(columns[part])] = escapes.value[part]
        yield position_key(spec, block, number), _sealed(position)
        yield value_key(spec, block, number), _sealed(value)


def position_key(spec: ArraySpec, block: int, number: int) -> str:
    """Path of a chunk of positions under `features.zarr`."""
    return f"escapes/{spec.name}/position/c/{block}/{number}/0"


def value_key(spec: ArraySpec, block: int, number: int) -> str:
    """Path of a chunk of values under `features.zarr`."""
    return f"escapes/{spec.name}/value/c/{block}/{number}"


def _sealed(values: np.ndarray[Any, Any]) -> bytes:
    frame = compress(values)
    return frame + checksum(frame)


def longest_list(keys: Mapping[str, Any], spec: ArraySpec) -> int:
    """The number of chunks of the longest list among the files of one or more blocks."""
    prefix = f"escapes/{spec.name}/position/c/"
    numbers = [int(key.removeprefix(prefix).split("/")[1]) for key in keys if key.startswith(prefix)]
    return max(numbers, default=-1) + 1
