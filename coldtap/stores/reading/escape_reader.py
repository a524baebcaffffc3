"""Reading the lists of escapes, those of a bounded number of blocks at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.escapes import (
    BlockEscapes,
    Positions,
    Values,
    escapes_of_block,
    parse_chunk,
    position_key,
    value_key,
)
from coldtap.stores.reading.stored_numbers import Read, read_metadata
from coldtap.stores.storage.threads import renew_after_fork

MAX_CACHED_BYTES = 128_000_000


class EscapeReader:
    """The lists of one array, those of a bounded number of blocks at a time; thread-safe.

    `is_empty` says that no block has any.
    """

    def __init__(self, spec: ArraySpec, read: Read, features: str) -> None:
        """Read how long the lists are.

        Args:
            spec: the int8 array.
            read: gives the bytes of a file below `features.zarr` that the manifest lists, or None where there is none.
            features: where that lies, for errors.
        """
        self._spec = spec
        self._read = read
        self._where = f"{features}/escapes/{spec.name}"
        self.is_empty = self._length(features) == 0
        self.renew()
        renew_after_fork(self)

    def _length(self, features: str) -> int:
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
        """Return the list of a block, empty where it has none.

        Raises:
            CorruptStoreError: a chunk is missing or damaged, or points outside its block.
        """
        with self._turn:
            found = self._blocks.pop(block, None)
            if found is None:
                found = escapes_of_block(self._spec, block, [*self._chunks(block)], where=self._where)
                self._n_bytes += found.memory_bytes
            self._blocks[block] = found
            while self._n_bytes > MAX_CACHED_BYTES and len(self._blocks) > 1:
                self._n_bytes -= self._blocks.popitem(last=False)[1].memory_bytes
            return found

    def _chunks(self, block: int) -> Iterator[tuple[Positions, Values]]:
        number = 0
        while (positions := self._read(position_key(self._spec, block, number))) is not None:
            values = self._read(value_key(self._spec, block, number))
            where = f"{self._where}: block {block}, chunk {number}"
            if values is None:
                raise CorruptStoreError(f"{where}: its values are missing")
            yield parse_chunk(positions, values, len(self._spec.dimensions), where=where)
            number += 1
