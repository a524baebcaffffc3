"""Reading shards: the index parsed and checked once, rows copied from a map, and a bound on what stays open.

A copy from a map runs at the speed of memory; a pread costs a third more (`docs/log.md`). Where an address-space limit
is set, which counts a map as if it were memory, or the storage has no maps, ranges are read instead. Sizes are held
against the index before every use, since a map of a file that was cut meanwhile is no error but a SIGBUS.
"""

import errno
import mmap
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from coldtap.errors import CorruptStoreError, MachineError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunks import (
    CRC_BYTES,
    DECODE_ERRORS,
    checksum,
    decode_frames,
    decompress_into,
    largest_frame,
)
from coldtap.stores.format.manifest import FEATURES
from coldtap.stores.format.shards import ABSENT, ENTRY_BYTES
from coldtap.stores.reading.digest_lists import ReadDigests
from coldtap.stores.storage.contract import Reader, Storage
from coldtap.stores.storage.threads import renew_after_fork

MAX_OPEN_FILES = 256
MAX_INDEX_BYTES = 128_000_000

type Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class ShardIndex:
    """Where the chunks of one shard lie.

    Attributes:
        offsets, lengths: (row, chunk) int64, −1 where there is no chunk.
        listed: (row, chunk) uint32, the crc32c that the store's list has of each chunk; None where there is no list.
        checked: (row, chunk), true once a chunk's checksum was found to hold, and to be the one listed.
        n_bytes, etag: of the file that it was read from; no other has this etag.
        rank: (row,) the place of each row's chunks among those of equal length that fill the file from its start;
            −1 where a row is absent, None where the file is laid out otherwise.
    """

    def __init__(
        self,
        entries: np.ndarray[Any, np.dtype[np.uint64]],
        n_bytes: int,
        etag: str,
        listed: np.ndarray[Any, np.dtype[np.uint32]] | None,
    ) -> None:
        self.n_bytes, self.etag, self.listed = n_bytes, etag, listed
        absent = (entries == ABSENT).all(axis=2)
        self.offsets = np.where(absent, -1, entries[..., 0].view(np.int64))
        self.lengths = np.where(absent, -1, entries[..., 1].view(np.int64))
        self.checked = np.zeros(absent.shape, bool)
        self.rank = self._ranks()

    def _ranks(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        there = self.offsets[:, 0] >= 0
        length, n_chunks = int(self.lengths.max(initial=1)), self.offsets.shape[1]
        expected = self.offsets[there, :1] + length * np.arange(n_chunks)
        if (self.lengths[there] != length).any() or (self.offsets[there] != expected).any():
            return None
        ranks, rest = np.divmod(self.offsets[:, 0], length * n_chunks)
        return None if rest[there].any() else np.where(there, ranks, -1)

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory."""
        listed = 0 if self.listed is None else self.listed.nbytes
        return 2 * self.offsets.nbytes + self.checked.nbytes + listed


class ShardFile:
    """An open shard. Reading is thread-safe.

    Errors name the file, the row of the array and the tap.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        spec: ArraySpec,
        first_row: int,
        index: ShardIndex | None = None,
        *,
        mapped: bool = False,
        read_digests: ReadDigests | None = None,
    ) -> None:
        """Open a shard, and parse its index unless it is known; that of a file that has changed is parsed anew.

        Args:
            storage: of the store.
            name: of the shard in the store.
            spec: its array.
            first_row: the row of the array that stands first in it.
            index: parsed before.
            mapped: have it mapped into memory, which not every storage can.
            read_digests: gives the list of its chunks' digests; None where the store has none, or the caller has it.

        Raises:
            CorruptStoreError: the file is missing or too short, its index is damaged or points outside, or has other
                chunks than the list.
            MachineError: this process may open no more files.
        """
        self.where, self.spec, self.first_row = storage.describe(name), spec, first_row
        self._n_values, self._read_digests = spec.chunk_bytes, read_digests
        self._reader = self._opened(storage, name)
        self.index = index if index and index.etag == self._reader.etag else self._read_index()
        self._mapping = self._reader.map() if mapped else None
        self._map: Bytes | None = None
        self._rows: Bytes | None = None  # (row present, chunk, byte), where every chunk lies at its regular place
        if self._mapping is not None:
            self._reader.close()  # a map has a descriptor of its own
            self._map = np.frombuffer(self._mapping, np.uint8)
            self._rows = self._regular_rows(self._map)

    def _opened(self, storage: Storage, name: str) -> Reader:
        try:
            return storage.open(name)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise MachineError(f"{self.where}: too many open files: raise the limit (ulimit -n)") from error
            raise CorruptStoreError(f"{self.where}: the shard cannot be opened ({error.strerror})") from None

    def _regular_rows(self, data: Bytes) -> Bytes | None:
        if self.spec.layout != "fast" or self.index.rank is None:
            return None
        n_rows, n_chunks, length = int(self.index.rank.max()) + 1, self.spec.chunks_per_row, self._n_values + CRC_BYTES
        return data[: n_rows * n_chunks * length].reshape(n_rows, n_chunks, length)[:, :, : self._n_values]

    def _require_unchanged(self) -> None:
        """A map of a file that was cut is no error but a SIGBUS: look before each use.

        Raises:
            CorruptStoreError: the file is shorter or longer than it was.
        """
        n_bytes = self._reader.size_now() if self._mapping is None else self._mapping.size()
        if n_bytes != self.index.n_bytes:
            raise CorruptStoreError(f"{self.where}: {n_bytes} bytes; it had {self.index.n_bytes} when it was opened")

    def _read_index(self) -> ShardIndex:
        spec, n_bytes = self.spec, self._reader.n_bytes
        n_index = spec.block_rows * spec.chunks_per_row * ENTRY_BYTES + CRC_BYTES
        if n_bytes < n_index:
            raise CorruptStoreError(f"{self.where}: {n_bytes} bytes, shorter than its index of {n_index}")
        try:
            data = self._reader.read(n_bytes - n_index, n_bytes)
        except OSError as error:
            raise CorruptStoreError(f"{self.where}: the shard's index cannot be read ({error.strerror})") from error
        if checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
            raise CorruptStoreError(f"{self.where}: the checksum of the shard's index does not hold (truncated?)")
        entries = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(spec.block_rows, spec.chunks_per_row, 2)
        there = entries[(entries != ABSENT).any(axis=2)]
        shortest, longest = self._chunk_lengths()
        lengths = there[:, 1]
        # Compared without an addition that could wrap around.
        room = np.maximum(n_bytes - n_index - lengths.astype(np.float64), -1)
        if ((lengths < shortest) | (lengths > longest) | (there[:, 0] > room)).any():
            raise CorruptStoreError(f"{self.where}: the shard's index points outside its chunks")
        return ShardIndex(entries, n_bytes, self._reader.etag, self._listed((entries != ABSENT).any(axis=2)))

    def _listed(self, there: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.uint32]] | None:
        """The crc32c that the store's list has of each chunk, which has the same chunks as the index."""
        if self._read_digests is None:
            return None
        digests = self._read_digests(self.spec, self.first_row // self.spec.block_rows)
        for row, chunk in np.argwhere(digests.present != there)[:1].tolist():
            what = "a chunk, and none in" if there[row, chunk] else "no chunk, and one in"
            raise CorruptStoreError(
                f"{self._where(row, chunk)}: there is {what} the store's list of digests: run `coldtap verify`"
            )
        return digests.crc32c

    def _chunk_lengths(self) -> tuple[int, int]:
        """The shortest and the longest that a stored chunk can be."""
        if self.spec.layout == "fast":
            return self._n_values + CRC_BYTES, self._n_values + CRC_BYTES
        return 1 + CRC_BYTES, largest_frame(self._n_values) + CRC_BYTES

    def present(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(row,), true where every chunk of the row is there.

        Raises:
            CorruptStoreError: a row has some of its chunks only.
        """
        there = self.index.offsets >= 0
        some, whole = there.any(axis=1), np.asarray(there.all(axis=1))
        if (some != whole).any():
            row = int(np.flatnonzero(some != whole)[0])
            raise CorruptStoreError(f"{self.where}: row {self.first_row + row} has lost some of its chunks")
        return whole

    def read_rows(self, rows: list[int], chunks: list[int], out: Bytes, at: list[int]) -> None:
        """Read chunks of some rows, their checksums held against their bytes the first time.

        Args:
            rows: their places in the shard.
            chunks: chunk numbers, the same of each row.
            out: (row, chunk, byte) contiguous.
            at: the place in `out` of each row.

        Raises:
            CorruptStoreError: a chunk is missing, short, damaged or fails its checksum.
        """
        self._require_unchanged()
        run = slice(chunks[0], chunks[-1] + 1)
        if self._map is not None and chunks == [*range(run.start, run.stop)] and self.index.checked[rows, run].all():
            if self._rows is not None:
                self._copy_rows(self._rows[:, run], rows, out, at)
                return
            if self.spec.layout == "compact" and self._decode_rows(memoryview(self._map), rows, run, out, at):
                return
        for place, row in zip(at, rows, strict=True):
            self._read_row(row, chunks, memoryview(out[place]).cast("B"))

    # The two paths that an epoch takes after its first: as little Python as there can be.

    def _copy_rows(self, source: Bytes, rows: list[int], out: Bytes, at: list[int]) -> None:
        assert self.index.rank is not None
        for place, rank in zip(at, self.index.rank[rows].tolist(), strict=True):
            out[place] = source[rank]

    def _decode_rows(self, frames: memoryview, rows: list[int], run: slice, out: Bytes, at: list[int]) -> bool:
        """False where a frame that was intact is damaged now: to be read again, and told of."""
        starts = self.index.offsets[rows, run]
        ends = starts + self.index.lengths[rows, run] - CRC_BYTES
        n_row = self._n_values * ends.shape[1]
        to = memoryview(out).cast("B")
        try:
            for place, row_starts, row_ends in zip(at, starts.tolist(), ends.tolist(), strict=True):
                row = to[place * n_row : (place + 1) * n_row]
                decode_frames(frames, row_starts, row_ends, row, self._n_values)
        except DECODE_ERRORS:
            self.index.checked[rows, run] = False
            return False
        return True

    def _read_row(self, row: int, chunks: list[int], out: memoryview) -> None:
        """The careful path: every chunk is checked before it is used, its frame's size too."""
        checked, n, start = self.index.checked[row], self._n_values, 0
        for chunk, stored in zip(chunks, self._stored(row, chunks), strict=True):
            values = stored[:-CRC_BYTES]
            if not checked[chunk]:
                self._require_whole(row, chunk, stored)
            if self.spec.layout == "fast":
                out[start : start + n] = memoryview(values)
            else:
                self._decode(row, chunk, memoryview(values), out[start : start + n])
            checked[chunk] = True  # its frame is known too: `_decode_rows` relies on it
            start += n

    def _require_whole(self, row: int, chunk: int, stored: Bytes) -> None:
        found = checksum(stored[:-CRC_BYTES])
        if found != stored[-CRC_BYTES:].tobytes():
            raise CorruptStoreError(f"{self._where(row, chunk)}: the chunk's checksum does not hold")
        if self.index.listed is not None and int.from_bytes(found, "little") != self.index.listed[row, chunk]:
            raise CorruptStoreError(
                f"{self._where(row, chunk)}: the chunk is whole and not the one that belongs there, by the store's "
                "list of digests; it is that of another row, tap, block, array or store: run `coldtap verify`"
            )

    def _stored(self, row: int, chunks: list[int]) -> Iterator[Bytes]:
        """Each chunk as it is stored, its checksum included."""
        offsets, lengths = self.index.offsets[row].tolist(), self.index.lengths[row].tolist()
        for run in [[chunk] for chunk in chunks] if self._map is not None else _runs(chunks, offsets, lengths):
            offset = offsets[run[0]]
            if offset < 0:
                raise CorruptStoreError(f"{self._where(row, run[0])}: there is no chunk")
            n_bytes = sum(lengths[chunk] for chunk in run)
            data = (
                self._read(row, run[0], offset, n_bytes) if self._map is None else self._map[offset : offset + n_bytes]
            )
            for chunk in run:
                yield data[: lengths[chunk]]
                data = data[lengths[chunk] :]

    def _read(self, row: int, chunk: int, offset: int, n_bytes: int) -> Bytes:
        try:
            return np.frombuffer(self._reader.read(offset, offset + n_bytes), np.uint8)
        except OSError as error:
            raise CorruptStoreError(f"{self._where(row, chunk)}: cannot be read ({error.strerror})") from error
        except CorruptStoreError as error:
            raise CorruptStoreError(f"{self._where(row, chunk)}: the shard ends early") from error

    def _decode(self, row: int, chunk: int, frame: memoryview, out: memoryview) -> None:
        try:
            decompress_into(frame, out)
        except ValueError as error:
            raise CorruptStoreError(f"{self._where(row, chunk)}: its zstd frame is damaged ({error})") from error

    def _where(self, row: int, chunk: int) -> str:
        tap = f", tap {self.spec.taps[chunk]}" if self.spec.gathered_as.chunk_per_tap else ""
        return f"{self.where}: row {self.first_row + row}{tap} of {self.spec.name}"

    def will_need(self, rows: np.ndarray[Any, np.dtype[np.int64]], chunks: Sequence[int]) -> None:
        """Say which bytes come next, so that they are read at once and not row by row."""
        offsets, lengths = self.index.offsets[rows], self.index.lengths[rows]
        first, last = min(chunks), max(chunks)
        for start, end in zip(offsets[:, first].tolist(), (offsets + lengths)[:, last].tolist(), strict=True):
            if 0 <= start < end:
                self._advise(start, end)

    def _advise(self, start: int, end: int) -> None:
        if self._mapping is None:
            self._reader.will_need(start, end)
        elif hasattr(mmap, "MADV_WILLNEED"):
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_WILLNEED, page, end - page)


def _runs(chunks: list[int], offsets: list[int], lengths: list[int]) -> list[list[int]]:
    """Chunks that lie behind each other in the file, in the order given."""
    runs = [[chunks[0]]]
    for before, chunk in pairwise(chunks):
        if offsets[before] >= 0 and offsets[before] + lengths[before] == offsets[chunk]:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs


class ShardFiles:
    """The shards of one store that are in use: at most so many open files, and so many bytes of parsed indexes."""

    def __init__(self, storage: Storage, read_digests: ReadDigests | None) -> None:
        """Open nothing yet; `read_digests` is None where the store has no lists of digests."""
        self._storage, self._read_digests = storage, read_digests
        self._mapped = storage.capabilities.map and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Forget every open file and index."""
        self._files: OrderedDict[tuple[str, int], ShardFile] = OrderedDict()
        self._indexes: OrderedDict[tuple[str, int], ShardIndex] = OrderedDict()
        self._index_bytes = 0
        self._turn = threading.Lock()

    def open(self, spec: ArraySpec, block: int) -> ShardFile:
        """Return the open shard of a block.

        Raises:
            CorruptStoreError: the file is missing or its index is damaged.
        """
        key = spec.name, block
        with self._turn:
            file = self._files.pop(key, None)
            if file is None:
                name, first_row = f"{FEATURES}/{spec.shard_key(block)}", block * spec.block_rows
                known = self._indexes.get(key)
                file = ShardFile(
                    self._storage, name, spec, first_row, known, mapped=self._mapped, read_digests=self._read_digests
                )
                self._remember(key, file.index)
            self._files[key] = file
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)  # closed when its last reader lets go of it
            return file

    def _remember(self, key: tuple[str, int], index: ShardIndex) -> None:
        if self._indexes.pop(key, None) is None:
            self._index_bytes += index.memory_bytes
        self._indexes[key] = index
        while self._index_bytes > MAX_INDEX_BYTES and len(self._indexes) > 1:
            _, oldest = self._indexes.popitem(last=False)
            self._index_bytes -= oldest.memory_bytes
