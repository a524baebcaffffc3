"""Reading the lists of values that codes do not hold (`coldtap.stores.format.escapes`), some blocks at a time."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunks import CRC_BYTES, checksum, decompress
from coldtap.stores.format.escapes import CHUNK, NOWHERE, position_key, value_key
from coldtap.stores.reading.stored_numbers import read_metadata
from coldtap.stores.storage.threads import renew_after_fork

MAX_CACHED_BYTES = 128_000_000

type Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEscapes:
    """A block's list, by row.

    Attributes:
        start: (row + 1,) where each row's escapes begin.
        place, within: (escape,) place along the tap axis, and flat position in that tap's (token, channel).
        value: (escape,).
    """

    start: Positions
    place: Positions
    within: Positions
    value: np.ndarray[Any, np.dtype[np.float32]]

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory."""
        return self.start.nbytes + self.place.nbytes + self.within.nbytes + self.value.nbytes


class EscapeReader:
    """The lists of one array, those of a bounded number of blocks at a time; thread-safe.

    `is_empty` says that no block has any. `read` gives the bytes of a file of the store that the manifest lists,
    or None where there is none; errors name the file under `features`.
    """

    def __init__(self, spec: ArraySpec, read: Callable[[str], bytes | None], features: Path) -> None:
        self._spec = spec
        self._read = read
        self._where = features / "escapes" / spec.name
        self.is_empty = self._length(features) == 0
        self.renew()
        renew_after_fork(self)

    def _length(self, features: Path) -> int:
        """Escapes that the longest list has room for."""
        match read_metadata(self._read, f"escapes/{self._spec.name}/position", features).get("shape"):
            case [int(), int() as length, int()]:
                return length
        raise CorruptStoreError(f"{self._where}/position/zarr.json is not the metadata of a list of escapes")

    def renew(self) -> None:
        """Forget every list."""
        self._blocks: OrderedDict[int, BlockEscapes] = OrderedDict()
        self._n_bytes = 0
        self._turn = threading.Lock()

    def of_block(self, block: int) -> BlockEscapes:
        """The list of a block, empty where it has none.

        Raises:
            CorruptStoreError: a chunk is missing or damaged, or points outside its block.
        """
        with self._turn:
            found = self._blocks.pop(block, None)
            if found is None:
                found = self._load(block)
                self._n_bytes += found.memory_bytes
            self._blocks[block] = found
            while self._n_bytes > MAX_CACHED_BYTES and len(self._blocks) > 1:
                self._n_bytes -= self._blocks.popitem(last=False)[1].memory_bytes
            return found

    def _load(self, block: int) -> BlockEscapes:
        spec = self._spec
        n_axes = len(spec.dimensions)
        parts = [*self._chunks(block, n_axes)]
        position = np.concatenate([part[0] for part in parts] or [np.empty((0, n_axes), np.int64)])
        value = np.concatenate([part[1] for part in parts] or [np.empty(0, np.float32)])
        first = np.array([block * spec.block_rows, *[0] * (n_axes - 1)])
        position = position - first
        if (position < 0).any() or (position >= (spec.block_rows, *spec.row_shape)).any():
            raise CorruptStoreError(f"{self._where}: block {block} has an escape outside its rows")
        row, *tap, token, channel = position.T
        if (np.diff(row) < 0).any():
            raise CorruptStoreError(f"{self._where}: block {block} is not in the order of its rows")
        return BlockEscapes(
            start=np.searchsorted(row, np.arange(spec.block_rows + 1)),
            place=tap[0] if tap else np.zeros_like(row),
            within=token * spec.geometry.channels + channel,
            value=value,
        )

    def _chunks(self, block: int, n_axes: int) -> Iterator[tuple[Positions, np.ndarray[Any, np.dtype[np.float32]]]]:
        number = 0
        while (data := self._read(position_key(self._spec, block, number))) is not None:
            values = self._read(value_key(self._spec, block, number))
            where = f"{self._where}: block {block}, chunk {number}"
            if values is None:
                raise CorruptStoreError(f"{where}: its values are missing")
            position = np.frombuffer(_opened(data, CHUNK * n_axes * 4, where), "<u4").reshape(CHUNK, n_axes)
            there = position[:, 0] != NOWHERE
            value = np.frombuffer(_opened(values, CHUNK * 4, where), "<f4")
            yield position[there].astype(np.int64), value[there].astype(np.float32)
            number += 1


def _opened(data: bytes, n_bytes: int, where: str) -> bytes:
    frame = data[:-CRC_BYTES]
    if checksum(frame) != data[-CRC_BYTES:]:
        raise CorruptStoreError(f"{where}: its checksum does not hold")
    try:
        return decompress(frame, n_bytes)
    except ValueError as error:
        raise CorruptStoreError(f"{where}: its zstd frame is damaged ({error})") from error
