"""One array of a store, read row by row in threads, without zarr's indexing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from coldtap.errors import CorruptStoreError, MachineError, MissingFeaturesError, StoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.codes import Scaling, scaling_of_taps
from coldtap.stores.format.gathers import GatherName
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.tiers import Numbers
from coldtap.stores.reading.escape_reader import EscapeReader
from coldtap.stores.reading.lazy import lazy_rows
from coldtap.stores.reading.row_index import RowIndex
from coldtap.stores.reading.shard_files import ShardFile, ShardFiles
from coldtap.stores.storage.threads import Threads

if TYPE_CHECKING:
    import dask.array

type Rows = np.ndarray[Any, np.dtype[np.int64]]

# Below, handing the work over costs more than it saves: a copy is a hundred times faster than decoding.
LEAST_BYTES_A_THREAD = {"fast": 1 << 24, "compact": 1 << 17}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlyingValues:
    """Values that the codes in a buffer do not hold: `buffer.reshape(-1)[position] = value`, once it is restored.

    Attributes:
        position: (value,) int64, flat positions in C order.
        value: (value,) float32.
    """

    position: Rows
    value: np.ndarray[Any, np.dtype[np.float32]]


class StoredArray:
    """An array of rows; reading is thread-safe, and bounded in open files.

    Attributes:
        spec: gather, geometry, taps, tier, layout.
        n_rows: rows of the array, absent ones included.
        numbers: what turns stored numbers into values.
        escapes: what the codes do not hold; None outside int8.
    """

    def __init__(
        self,
        spec: ArraySpec,
        n_rows: int,
        numbers: Numbers,
        files: ShardFiles,
        threads: Threads,
        escapes: EscapeReader | None,
        where: str,
        index: RowIndex,
        origin: tuple[Any, ...],
    ) -> None:
        """Hold what reading needs.

        Args:
            spec: what the recipe says of it.
            n_rows: its rows, absent ones included.
            numbers: what turns stored numbers into values.
            files: its shards and those of the store's other arrays.
            threads: that read and decode.
            escapes: what its codes do not hold; None outside int8.
            where: it lies, for errors.
            index: which rows are there.
            origin: how another process gets this array, as `__reduce__` says it.
        """
        self.spec, self.n_rows, self.numbers = spec, n_rows, numbers
        self._gathered_as = spec.gathered_as
        self._files, self._threads = files, threads
        self._where = where
        self._index, self._origin = index, origin
        self.escapes = escapes

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store itself."""
        return self._origin

    @property
    def name(self) -> str:
        """Its path in `features.zarr`."""
        return self.spec.name

    @property
    def gather(self) -> GatherName:
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
        """Bytes of a row's stored numbers, before compression."""
        return self.spec.bytes_per_row

    def exponents_of(self, taps: Sequence[int] | None = None) -> tuple[int, ...]:
        """E of each tap: a stored float16 is value / 2^e; zeros in other tiers."""
        return tuple(self.numbers.exponents[place] for place in self._places(taps))

    def scaling_of(self, taps: Sequence[int] | None = None) -> Scaling | None:
        """Scale and offset (tap, channel) of the codes of some taps; None outside int8."""
        scaling = self.numbers.scaling
        return None if scaling is None else scaling_of_taps(scaling, self._places(taps))

    def read_into(
        self,
        out: np.ndarray[Any, np.dtype[np.float32]],
        rows: Sequence[int] | Rows,
        taps: Sequence[int] | None = None,
    ) -> None:
        """Read rows as float32, tier and scales undone, in the order asked.

        Args:
            out: (row, tap, token, channel) for `layers` and `pooled`; (row, token, channel) for `sum`.
            rows: row numbers.
            taps: tap indices, for `layers` and `pooled`; None for all that are stored.

        Raises:
            MissingFeaturesError: a row or tap is not there.
            CorruptStoreError: a chunk is missing, short, damaged or fails its checksum.
            ValueError: `out` has another shape or dtype, is not contiguous or may not be written.
        """
        places = self._places(taps)
        wanted = self._check(out, rows, places, np.dtype(np.float32))
        by_tap = out.reshape(len(wanted), len(places), *self.row_shape[-2:], copy=False)
        scaling = self.numbers.scaling
        numbers = Numbers(
            exponents=tuple(self.numbers.exponents[place] for place in places),
            scaling=None if scaling is None else scaling_of_taps(scaling, places),
        )

        restore = self.spec.kept_as.restore

        def read(part: Rows) -> None:
            stored = np.empty((1, *by_tap.shape[1:]), self.spec.dtype)
            for shard, rows_of_shard, at in self._by_shard(wanted, part):
                for row, place in zip(rows_of_shard, at, strict=True):
                    self._fetch(shard, [row], places, stored, [0])
                    restore(stored, by_tap[place : place + 1], numbers)

        self._in_threads(read, wanted, len(places))
        outlying = self._outlying(wanted, places)
        out.reshape(-1, copy=False)[outlying.position] = outlying.value

    def read_stored_into(
        self, out: np.ndarray[Any, Any], rows: Sequence[int] | Rows, taps: Sequence[int] | None = None
    ) -> OutlyingValues:
        """Read rows as they are stored: int8 codes, float16, the bits of bfloat16, float32.

        Args:
            out: as for `read_into`, in the stored dtype.
            rows: row numbers.
            taps: tap indices; None for all that are stored.

        Returns:
            What the codes do not hold; nothing outside int8.

        Raises:
            MissingFeaturesError: a row or tap is not there.
            CorruptStoreError: a chunk is missing, short, damaged or fails its checksum.
            ValueError: `out` has another shape or dtype, is not contiguous or may not be written.
        """
        places = self._places(taps)
        wanted = self._check(out, rows, places, self.spec.dtype)
        by_tap = out.reshape(len(wanted), len(places), *self.row_shape[-2:], copy=False)

        def read(part: Rows) -> None:
            for shard, rows_of_shard, at in self._by_shard(wanted, part):
                self._fetch(shard, rows_of_shard, places, by_tap, at)

        self._in_threads(read, wanted, len(places))
        return self._outlying(wanted, places)

    def dask(self, rows: Sequence[int] | Rows | None = None, taps: Sequence[int] | None = None) -> "dask.array.Array":
        """Return a lazy dask array of float32 values, read block by block when it is computed.

        Args:
            rows: row numbers, in the order wanted; None for every row that is there, ascending.
            taps: tap indices, for `layers` and `pooled`; None for all that are stored.

        Returns:
            (row, tap, token, channel) for `layers` and `pooled`, (row, token, channel) for `sum`; a chunk has as many
            rows as a block of the store.

        Raises:
            MissingExtraError: dask is not installed.
            MissingFeaturesError: a tap is not there; a row that is not is found when it is computed.
        """
        places = self._places(taps)
        wanted = self._index.present.all() if rows is None else np.asarray(rows, np.int64)
        shape = (len(places), *self.row_shape[1:]) if self._gathered_as.has_tap_axis else self.row_shape
        return lazy_rows(self, wanted, None if taps is None else tuple(taps), shape)

    def will_need(self, rows: Sequence[int] | Rows, taps: Sequence[int] | None = None) -> None:
        """Tell the kernel which rows come next; what is wrong with them is said when they are read."""
        wanted = np.asarray(rows, np.int64)
        chunks = self._places(taps) if self._gathered_as.chunk_per_tap else [0]
        blocks, places = np.divmod(wanted[(wanted >= 0) & (wanted < self.n_rows)], self.spec.block_rows)
        for block in np.unique(blocks).tolist():
            try:
                self._files.open(self.spec, block).will_need(places[blocks == block], chunks)
            except (StoreError, MachineError):
                return

    def _places(self, taps: Sequence[int] | None) -> list[int]:
        if taps is None:
            return list(range(len(self.taps)))
        if missing := [tap for tap in taps if tap not in self.taps]:
            raise MissingFeaturesError(f"{self._where} has no tap {missing[0]}; it holds {list(self.taps)}")
        if not self._gathered_as.has_tap_axis and len(taps) != 1:
            raise ValueError(f"{self._where} is one sum; taps {list(taps)} were asked for")
        return [self.taps.index(tap) for tap in taps]

    def _check(
        self, out: np.ndarray[Any, Any], rows: Sequence[int] | Rows, places: list[int], dtype: np.dtype[Any]
    ) -> Rows:
        wanted = np.asarray(rows, np.int64)
        shape = (len(wanted), *self._gathered_as.row_shape(self.geometry, len(places)))
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out is {out.dtype} {out.shape}; expected contiguous, writable {dtype} {shape}")
        outside = wanted[(wanted < 0) | (wanted >= self.n_rows)]
        if len(outside):
            raise MissingFeaturesError(
                f"{self._where} has rows 0 to {self.n_rows - 1}; row {int(outside[0])} was asked for"
            )
        return wanted

    def _in_threads(self, read: Callable[[Rows], None], wanted: Rows, n_taps: int) -> None:
        """Read in parts of neighbouring rows, one a thread: places in `wanted`, in the order of the rows."""
        if not len(wanted) or not n_taps:
            return
        order = np.argsort(wanted, kind="stable")
        n_bytes = len(wanted) * self.bytes_per_row * n_taps // len(self.taps)
        n_parts = max(1, min(self._threads.n_threads, n_bytes // LEAST_BYTES_A_THREAD[self.spec.layout], len(wanted)))
        if n_parts == 1:
            read(order)
            return
        first, *others = np.array_split(order, n_parts)
        futures: list[Future[None]] = []
        try:
            futures += (self._threads.submit(read, part) for part in others)
            read(first)
        finally:
            wait(futures)  # `out` belongs to the caller again only when no thread writes to it
        for future in futures:
            future.result()

    def _by_shard(self, wanted: Rows, part: Rows) -> Iterator[tuple[ShardFile, list[int], list[int]]]:
        """(shard, rows of the shard, their places in the buffer) of some of the rows wanted, ascending."""
        blocks, rows = np.divmod(wanted[part], self.spec.block_rows)
        cuts = [0, *(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1).tolist(), len(part)]
        in_shard, places = rows.tolist(), part.tolist()
        for start, end in pairwise(cuts if len(part) else []):
            shard = self._files.open(self.spec, int(blocks[start]))
            yield shard, in_shard[start:end], places[start:end]

    def _fetch(
        self, shard: ShardFile, rows: list[int], places: list[int], out: np.ndarray[Any, Any], at: list[int]
    ) -> None:
        """Stored numbers of rows of one shard into `out` (row, tap, token, channel)."""
        if self._gathered_as.chunk_per_tap:
            shard.read_rows(rows, places, _as_chunks(out, len(places)), at)
        elif places == [*range(len(self.taps))]:
            shard.read_rows(rows, [0], _as_chunks(out, 1), at)
        else:
            whole = np.empty((len(rows), *self.row_shape), self.spec.dtype)
            shard.read_rows(rows, [0], _as_chunks(whole, 1), [*range(len(rows))])
            out[at] = whole[:, places]

    def _outlying(self, wanted: Rows, places: list[int]) -> OutlyingValues:
        parts = [*self._escaped(self.escapes, wanted, places)] if self.escapes else []
        if not parts:
            return OutlyingValues(position=np.empty(0, np.int64), value=np.empty(0, np.float32))
        return OutlyingValues(
            position=np.concatenate([position for position, _ in parts]),
            value=np.concatenate([value for _, value in parts]),
        )

    def _escaped(
        self, escapes: EscapeReader, wanted: Rows, places: list[int]
    ) -> Iterator[tuple[Rows, np.ndarray[Any, Any]]]:
        blocks, rows = np.divmod(wanted, self.spec.block_rows)
        tap_values = self.geometry.tokens * self.geometry.channels
        for block in np.unique(blocks).tolist():
            found = escapes.of_block(block)
            if not len(found.value):
                continue
            at = np.flatnonzero(blocks == block)
            starts, ends = found.start[rows[at]], found.start[rows[at] + 1]
            owner = np.repeat(at, ends - starts)
            chosen = np.concatenate([np.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
            for new, old in enumerate(places):
                there = found.place[chosen] == old
                position = (owner[there] * len(places) + new) * tap_values + found.within[chosen[there]]
                yield position, found.value[chosen[there]]


def _as_chunks(values: np.ndarray[Any, Any], n_chunks: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of (row, tap, token, channel) numbers as (row, chunk, byte)."""
    return values.reshape(len(values), n_chunks, -1, copy=False).view(np.uint8)


def require_metadata(metadata: Mapping[str, Any], spec: ArraySpec, where: str) -> int:
    """Hold an array's metadata against what the recipe says of it; returns its number of rows.

    Raises:
        CorruptStoreError: shape, dtype, codecs or attributes are others.
    """
    codecs = ["bytes", *(["zstd"] if spec.layout == "compact" else []), "crc32c"]
    attributes = {
        "gather": spec.gather,
        "taps": list(spec.taps),
        "tier": spec.tier,
        "layout": spec.layout,
        "block_rows": spec.block_rows,
        **spec.geometry.to_dict(),
    }
    try:
        n_rows: int
        n_rows, *row_shape = metadata["shape"]
        (codec,) = metadata["codecs"]
        sharding = codec["configuration"]
        same = (
            type(n_rows) is int
            and n_rows >= 0
            and tuple(row_shape) == spec.row_shape
            and metadata["data_type"] == spec.dtype.name
            and tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]) == spec.shard_shape
            and tuple(sharding["chunk_shape"]) == spec.chunk_shape
            and sharding.get("index_location", "end") == "end"
            and [codec["name"] for codec in sharding["codecs"]] == codecs
            and {key: metadata["attributes"][key] for key in attributes} == attributes
            and n_rows % spec.block_rows == 0
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptStoreError(f"{where}: not the metadata of a coldtap array ({error!r})") from error
    if not same:
        raise CorruptStoreError(f"{where}: shape, codecs or attributes are not what the recipe says")
    return int(n_rows)
