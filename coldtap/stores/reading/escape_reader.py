"""Reading escapes, those of a bounded number of blocks at a time."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.escape_segments import escapes_name, parse_escapes
from coldtap.stores.format.escapes import (
    BlockEscapes,
    Positions,
    Values,
    escapes_of_block,
    parse_chunk,
    position_key,
    value_key,
)
from coldtap.stores.format.features import ESCAPE_SEGMENTS
from coldtap.stores.format.manifest import FEATURES
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.reading.manifest_files import ManifestFiles
from coldtap.stores.reading.stored_numbers import read_metadata
from coldtap.stores.storage.threads import renew_after_fork

MAX_CACHED_BYTES = 128_000_000


class EscapeReader:
    """The escapes of one array, those of a bounded number of blocks at a time; thread-safe."""

    def __init__(self, load: Callable[[int], BlockEscapes]) -> None:
        """Read nothing yet; `load` reads those of a block."""
        self._load = load
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Forget every block."""
        self._blocks: OrderedDict[int, BlockEscapes] = OrderedDict()
        self._n_bytes = 0
        self._turn = threading.Lock()

    def of_block(self, block: int) -> BlockEscapes:
        """Return the escapes of a block.

        Raises:
            CorruptStoreError: a file is missing or damaged, or points outside its block.
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


def escape_reader(spec: ArraySpec, recipe: Recipe, files: ManifestFiles) -> EscapeReader | None:
    """Return what reads the escapes of an array; None where it is not int8.

    Raises:
        CorruptStoreError: a store of format 1 has not the metadata of its lists.
    """
    if not spec.kept_as.is_coded:
        return None
    load = _segments(spec, files) if ESCAPE_SEGMENTS in recipe.requires else _Lists(spec, files).of_block
    return EscapeReader(load)


def _segments(spec: ArraySpec, files: ManifestFiles) -> Callable[[int], BlockEscapes]:
    def of_block(block: int) -> BlockEscapes:
        name = escapes_name(spec.name, block)
        return parse_escapes(files.find(name), spec, where=files.storage.describe(name))

    return of_block


class _Lists:
    """The lists of format 1: two arrays in the Zarr hierarchy."""

    def __init__(self, spec: ArraySpec, files: ManifestFiles) -> None:
        """Read their metadata."""
        self._spec, self._read = spec, files.find_feature
        features = files.storage.describe(FEATURES)
        self._where = f"{features}/escapes/{spec.name}"
        match read_metadata(self._read, f"escapes/{spec.name}/position", features).get("shape"):
            case [int(), int(), int()]:
                return
        raise CorruptStoreError(f"{self._where}/position/zarr.json is not the metadata of a list of escapes")

    def of_block(self, block: int) -> BlockEscapes:
        return escapes_of_block(self._spec, block, [*self._chunks(block)], where=self._where)

    def _chunks(self, block: int) -> Iterator[tuple[Positions, Values]]:
        number = 0
        while (positions := self._read(position_key(self._spec, block, number))) is not None:
            values = self._read(value_key(self._spec, block, number))
            where = f"{self._where}: block {block}, chunk {number}"
            if values is None:
                raise CorruptStoreError(f"{where}: its values are missing")
            yield parse_chunk(positions, values, len(self._spec.dimensions), where=where)
            number += 1
