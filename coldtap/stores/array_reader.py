"""One array of a store, read row by row without zarr's indexing."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from coldtap.stores.arrays import Gather, Geometry, spec_from_attributes
from coldtap.stores.errors import CorruptStoreError, MissingFeaturesError
from coldtap.stores.manifest import FEATURES
from coldtap.stores.shards import ShardFile
from coldtap.stores.tiers import restore

MAX_OPEN_SHARDS = 128


class StoredArray:
    """An array of rows; thread-safe, and bounded in open files.

    Attributes:
        spec: gather, geometry, taps, tier.
        name: its path in `features.zarr`.
        n_rows: rows of the array, absent ones included.
        exponents: power-of-two exponent of each stored tap.
    """

    def __init__(self, store: Path, name: str, metadata: Mapping[str, Any]) -> None:
        """Hold the metadata against what the attributes describe.

        Raises:
            CorruptStoreError: shape, dtype or codecs are not those of a coldtap array.
        """
        where = f"{store / FEATURES / name}/zarr.json"
        attributes = metadata.get("attributes", {})
        self.spec = spec_from_attributes(attributes, where=where)
        self.name = name
        self._folder = store / FEATURES
        self._shards: OrderedDict[int, ShardFile] = OrderedDict()
        self._turn = threading.Lock()
        try:
            self.n_rows, *row_shape = (int(n) for n in metadata["shape"])
            self.exponents: tuple[int, ...] = tuple(attributes["scale_exponents"])
            sharding = metadata["codecs"][0]["configuration"]
            same = (
                tuple(row_shape) == self.spec.row_shape
                and self.spec.name == name
                and tuple(sharding["chunk_shape"]) == self.spec.chunk_shape
                and [codec["name"] for codec in sharding["codecs"]] == ["bytes", "crc32c"]
                and len(self.exponents) == len(self.spec.taps)
                and self.n_rows % self.spec.block_rows == 0
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CorruptStoreError(f"{where}: not the metadata of a coldtap array ({error!r})") from error
        if not same:
            raise CorruptStoreError(f"{where}: shape, codecs and attributes contradict each other")

    @property
    def gather(self) -> Gather:
        """How taps were gathered."""
        return self.spec.gather

    @property
    def geometry(self) -> Geometry:
        """What the array's taps share."""
        return self.spec.geometry

    @property
    def taps(self) -> tuple[int, ...]:
        """Tap indices stored, in order; for `sum` its k."""
        return self.spec.taps

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.spec.row_shape

    @property
    def bytes_per_row(self) -> int:
        """Stored bytes of a row's values."""
        return self.spec.bytes_per_row

    def read_into(
        self,
        out: np.ndarray[Any, np.dtype[np.float32]],
        rows: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]],
        taps: Sequence[int] | None = None,
    ) -> None:
        """Read rows as float32, tier and scale undone, in the order asked.

        Args:
            out: (row, tap, token, channel) for `layers` and `pooled`; (row, token, channel) for `sum`.
            rows: row numbers.
            taps: tap indices, for `layers` and `pooled`; None for all that are stored.

        Raises:
            MissingFeaturesError: a row or tap is not there.
            CorruptStoreError: a chunk is missing, short or fails its checksum.
            ValueError: `out` has another shape or dtype.
        """
        positions = self._positions(taps)
        shape = self.row_shape if self.gather == "sum" else (len(positions), *self.row_shape[1:])
        if out.shape != (len(rows), *shape) or out.dtype != np.float32:
            raise ValueError(f"out is {out.dtype} {out.shape}; expected float32 {(len(rows), *shape)}")
        exponents = [self.exponents[p] for p in positions]
        by_tap = out.reshape(len(rows), -1, *self.row_shape[-2:], copy=False)
        for values, row in zip(by_tap, rows, strict=True):
            restore(self._stored(int(row), positions)[None], values[None], self.spec.tier, exponents)

    def _positions(self, taps: Sequence[int] | None) -> list[int]:
        if taps is None:
            return list(range(len(self.taps)))
        if missing := [tap for tap in taps if tap not in self.taps]:
            raise MissingFeaturesError(f"{self.name} has no tap {missing[0]}; it holds {list(self.taps)}")
        return [self.taps.index(tap) for tap in taps]

    def _stored(self, row: int, positions: Sequence[int]) -> np.ndarray[Any, Any]:
        """One row in the tier's dtype: (tap, token, channel)."""
        if not 0 <= row < self.n_rows:
            raise MissingFeaturesError(f"{self.name} has rows 0 to {self.n_rows - 1}; row {row} was asked for")
        block, offset = divmod(row, self.spec.block_rows)
        shard = self._shard(block)
        if self.gather != "layers":
            values = shard.read_chunks(offset, range(1)).view(self.spec.dtype).reshape(-1, *self.row_shape[-2:])
            return values if self.gather == "sum" else values[positions]
        runs = [shard.read_chunks(offset, run) for run in _runs(positions)]
        chunks = runs[0] if len(runs) == 1 else np.concatenate(runs)
        return np.ascontiguousarray(chunks).view(self.spec.dtype).reshape(-1, *self.row_shape[1:])

    def _shard(self, block: int) -> ShardFile:
        with self._turn:
            shard = self._shards.pop(block, None)
            if shard is None:
                shard = ShardFile(self._folder / self.spec.shard_key(block), self.spec)
            self._shards[block] = shard
            if len(self._shards) > MAX_OPEN_SHARDS:
                # Its file closes when the last reader lets go of it.
                self._shards.popitem(last=False)
            return shard


def _runs(positions: Sequence[int]) -> list[range]:
    """Positions as runs of consecutive ones, in the order given."""
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(positions)) if b != a + 1), len(positions)]
    return [range(positions[a], positions[b - 1] + 1) for a, b in pairwise(breaks)]
