"""Values that the codes do not hold, in a store of format 1: a list a block, as plain Zarr arrays. They are only read.

    escapes/<array>/position   (block, escape, axis) uint32   indices into the array: row, tap, token, channel
    escapes/<array>/value      (block, escape) float32        the value there

Lists differ in length: their chunks hold `CHUNK` escapes, the last one padded with the fill value, and the arrays are
as long as the longest list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunks import CRC_BYTES, checksum, decompress
from coldtap.stores.format.manifest import FEATURES

CHUNK = 16_384
NOWHERE = 2**32 - 1  # the fill value of `position`

type Positions = np.ndarray[Any, np.dtype[np.int64]]
type Values = np.ndarray[Any, np.dtype[np.float32]]


def position_key(spec: ArraySpec, block: int, number: int) -> str:
    """Path of a chunk of positions under `features.zarr`."""
    return f"escapes/{spec.name}/position/c/{block}/{number}/0"


def value_key(spec: ArraySpec, block: int, number: int) -> str:
    """Path of a chunk of values under `features.zarr`."""
    return f"escapes/{spec.name}/value/c/{block}/{number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEscapes:
    """The escapes of a block, by row.

    Attributes:
        start: (row + 1,) where each row's escapes begin.
        place, within: (escape,) place along the tap axis, and flat position in that tap's (token, channel).
        value: (escape,).
    """

    start: Positions
    place: Positions
    within: Positions
    value: Values

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory."""
        return self.start.nbytes + self.place.nbytes + self.within.nbytes + self.value.nbytes


def parse_chunk(positions: bytes, values: bytes, n_axes: int, *, where: str) -> tuple[Positions, Values]:
    """Return the escapes of one chunk: positions (escape, axis), and their values (escape,).

    Args:
        positions: bytes of the one file.
        values: bytes of the other.
        n_axes: axes of the array.
        where: the chunk, for errors.

    Raises:
        CorruptStoreError: a checksum does not hold, or a frame is damaged.
    """
    position = np.frombuffer(_opened(positions, CHUNK * n_axes * 4, where), "<u4").reshape(CHUNK, n_axes)
    there = position[:, 0] != NOWHERE
    value = np.frombuffer(_opened(values, CHUNK * 4, where), "<f4")
    return position[there].astype(np.int64), value[there].astype(np.float32)


def escapes_of_block(
    spec: ArraySpec, block: int, chunks: Sequence[tuple[Positions, Values]], *, where: str
) -> BlockEscapes:
    """Return the list of a block from its chunks.

    Args:
        spec: the int8 array.
        block: its number.
        chunks: in order; none where the block has no escape.
        where: the array's lists, for errors.

    Raises:
        CorruptStoreError: an escape is outside the block, or not in the order of its rows.
    """
    n_axes = len(spec.dimensions)
    position = np.concatenate([part[0] for part in chunks] or [np.empty((0, n_axes), np.int64)])
    value = np.concatenate([part[1] for part in chunks] or [np.empty(0, np.float32)])
    position = position - np.array([block * spec.block_rows, *[0] * (n_axes - 1)])
    if (position < 0).any() or (position >= (spec.block_rows, *spec.row_shape)).any():
        raise CorruptStoreError(f"{where}: block {block} has an escape outside its rows")
    row, *tap, token, channel = position.T
    if (np.diff(row) < 0).any():
        raise CorruptStoreError(f"{where}: block {block} is not in the order of its rows")
    return BlockEscapes(
        start=np.searchsorted(row, np.arange(spec.block_rows + 1)),
        place=tap[0] if tap else np.zeros_like(row),
        within=token * spec.geometry.channels + channel,
        value=value,
    )


def _opened(data: bytes, n_bytes: int, where: str) -> bytearray:
    frame = data[:-CRC_BYTES]
    if checksum(frame) != data[-CRC_BYTES:]:
        raise CorruptStoreError(f"{where}: its checksum does not hold")
    try:
        return decompress(memoryview(frame), n_bytes)
    except ValueError as error:
        raise CorruptStoreError(f"{where}: its zstd frame is damaged ({error})") from error


def longest_list(keys: Mapping[str, Any], spec: ArraySpec) -> int:
    """Return the number of chunks of the longest list among the files of one or more blocks."""
    prefix = f"{FEATURES}/escapes/{spec.name}/position/c/"
    numbers = [int(key.removeprefix(prefix).split("/")[1]) for key in keys if key.startswith(prefix)]
    return max(numbers, default=-1) + 1
