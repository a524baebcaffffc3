"""Reading shards: the index parsed and checked once, chunks by pread, and a bound on what stays open.

Nothing is mapped: a pread into the caller's buffer is as fast as a copy from a map (`docs/log.md`), a file that is cut
meanwhile is an error instead of a SIGBUS, and an address-space limit does not count the store. Offsets are not shared,
so threads and forked processes read through one descriptor.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coldtap.stores.arrays import ArraySpec
from coldtap.stores.chunks import CRC_BYTES, checksum, decompress, largest_frame
from coldtap.stores.errors import CorruptStoreError
from coldtap.stores.shards import ABSENT, ENTRY_BYTES
from coldtap.stores.threads import renew_after_fork

MAX_OPEN_FILES = 256
MAX_INDEX_BYTES = 128_000_000


class ShardIndex:
    """Where the chunks of one shard lie.

    Attributes:
        offsets, lengths: (row, chunk) int64, −1 where there is no chunk.
        checked: (row, chunk), true once a chunk's checksum was found to hold.
        n_bytes: size of the file that the index belongs to.
    """

    def __init__(self, entries: np.ndarray[Any, np.dtype[np.uint64]], n_bytes: int) -> None:
        self.n_bytes = n_bytes
        absent = (entries == ABSENT).all(axis=2)
        self.offsets = np.where(absent, -1, entries[..., 0].view(np.int64))
        self.lengths = np.where(absent, -1, entries[..., 1].view(np.int64))
        self.checked = np.zeros(absent.shape, bool)

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory."""
        return self.offsets.nbytes + self.lengths.nbytes + self.checked.nbytes


class ShardFile:
    """An open shard. Reading is thread-safe.

    `where` of an error names the file, the row of the array and the tap.
    """

    def __init__(self, path: Path, spec: ArraySpec, first_row: int, index: ShardIndex | None = None) -> None:
        """Open a shard, and parse its index unless it is known.

        Raises:
            CorruptStoreError: the file is missing, too short or of another size than before, or its index is damaged
                or points outside.
        """
        self.path, self.spec, self.first_row = path, spec, first_row
        self._n_values = spec.chunk_bytes
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CorruptStoreError(f"{path}: the shard cannot be opened ({error.strerror})") from None
        weakref.finalize(self, os.close, self._descriptor)
        n_bytes = os.fstat(self._descriptor).st_size
        if index is not None and index.n_bytes != n_bytes:
            raise CorruptStoreError(f"{path}: {n_bytes} bytes; it had {index.n_bytes} when it was opened first")
        self.index = index or self._read_index(n_bytes)

    def _read_index(self, n_bytes: int) -> ShardIndex:
        spec = self.spec
        n_index = spec.block_rows * spec.chunks_per_row * ENTRY_BYTES + CRC_BYTES
        if n_bytes < n_index:
            raise CorruptStoreError(f"{self.path}: {n_bytes} bytes, shorter than its index of {n_index}")
        data = os.pread(self._descriptor, n_index, n_bytes - n_index)
        if checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
            raise CorruptStoreError(f"{self.path}: the checksum of the shard's index does not hold (truncated?)")
        entries = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(spec.block_rows, spec.chunks_per_row, 2)
        there = entries[(entries != ABSENT).any(axis=2)]
        shortest, longest = self._chunk_lengths()
        lengths = there[:, 1]
        # Compared without an addition that could wrap around.
        room = np.maximum(n_bytes - n_index - lengths.astype(np.float64), -1)
        if ((lengths < shortest) | (lengths > longest) | (there[:, 0] > room)).any():
            raise CorruptStoreError(f"{self.path}: the shard's index points outside its chunks")
        return ShardIndex(entries, n_bytes)

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
            raise CorruptStoreError(f"{self.path}: row {self.first_row + row} has lost some of its chunks")
        return whole

    def read_row(self, row: int, chunks: Sequence[int], out: memoryview) -> None:
        """Read chunks of one row, their checksums held against their bytes the first time.

        Args:
            row: its place in the shard.
            chunks: chunk numbers of the row, each of which fills the next part of `out`.
            out: bytes, as many as the chunks hold.

        Raises:
            CorruptStoreError: a chunk is missing, short, damaged or fails its checksum.
        """
        offsets, lengths = self.index.offsets[row], self.index.lengths[row]
        start = 0
        for run in _runs(chunks, offsets, lengths):
            end = start + len(run) * self._n_values
            if offsets[run[0]] < 0:
                raise CorruptStoreError(f"{self._where(row, run[0])}: there is no chunk")
            if self.spec.layout == "fast":
                self._read_values(row, run, int(offsets[run[0]]), out[start:end])
            else:
                self._read_frames(row, run, int(offsets[run[0]]), lengths[run].tolist(), out[start:end])
            start = end

    def _read_values(self, row: int, run: list[int], offset: int, out: memoryview) -> None:
        n, checksums = self._n_values, memoryview(bytearray(CRC_BYTES * len(run)))
        pieces: list[memoryview] = []
        for i in range(len(run)):
            pieces += out[i * n : (i + 1) * n], checksums[i * CRC_BYTES : (i + 1) * CRC_BYTES]
        if os.preadv(self._descriptor, pieces, offset) != (n + CRC_BYTES) * len(run):
            raise CorruptStoreError(f"{self._where(row, run[0])}: the shard ends early")
        for i, chunk in enumerate(run):
            if not self.index.checked[row, chunk]:
                self._check(row, chunk, pieces[2 * i], pieces[2 * i + 1])

    def _read_frames(self, row: int, run: list[int], offset: int, lengths: list[int], out: memoryview) -> None:
        data = memoryview(os.pread(self._descriptor, sum(lengths), offset))
        if len(data) != sum(lengths):
            raise CorruptStoreError(f"{self._where(row, run[0])}: the shard ends early")
        n, at = self._n_values, 0
        for i, (chunk, length) in enumerate(zip(run, lengths, strict=True)):
            frame = data[at : at + length - CRC_BYTES]
            at += length
            if not self.index.checked[row, chunk]:
                self._check(row, chunk, frame, data[at - CRC_BYTES : at])
            try:
                out[i * n : (i + 1) * n] = decompress(frame, n)
            except ValueError as error:
                raise CorruptStoreError(f"{self._where(row, chunk)}: its zstd frame is damaged ({error})") from error

    def _check(self, row: int, chunk: int, stored: memoryview, expected: memoryview) -> None:
        if checksum(stored) != expected:
            raise CorruptStoreError(f"{self._where(row, chunk)}: the chunk's checksum does not hold")
        self.index.checked[row, chunk] = True

    def _where(self, row: int, chunk: int) -> str:
        tap = f", tap {self.spec.taps[chunk]}" if self.spec.gather == "layers" else ""
        return f"{self.path}: row {self.first_row + row}{tap} of {self.spec.name}"

    def will_need(self, rows: np.ndarray[Any, np.dtype[np.int64]], chunks: Sequence[int]) -> None:
        """Tell the kernel which bytes come next, so that it reads them at once and not row by row."""
        offsets, lengths = self.index.offsets[rows], self.index.lengths[rows]
        first, last = min(chunks), max(chunks)
        for start, end in zip(offsets[:, first].tolist(), (offsets + lengths)[:, last].tolist(), strict=True):
            if 0 <= start < end and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


def _runs(chunks: Sequence[int], offsets: Any, lengths: Any) -> list[list[int]]:
    """Chunks that lie behind each other in the file, in the order given."""
    if len(chunks) == 1:
        return [[chunks[0]]]
    order = np.asarray(chunks)
    joined = offsets[order[:-1]] + lengths[order[:-1]] == offsets[order[1:]]
    if joined.all() and offsets[order[0]] >= 0:
        return [list(chunks)]
    runs = [[chunks[0]]]
    for chunk, continues in zip(chunks[1:], joined.tolist(), strict=True):
        if continues and offsets[chunk] >= 0:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs


class ShardFiles:
    """The shards of one store that are in use: at most so many open files, and so many bytes of parsed indexes."""

    def __init__(self, features: Path) -> None:
        self._features = features
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Forget every open file and index."""
        self._files: OrderedDict[tuple[str, int], ShardFile] = OrderedDict()
        self._indexes: OrderedDict[tuple[str, int], ShardIndex] = OrderedDict()
        self._index_bytes = 0
        self._turn = threading.Lock()

    def open(self, spec: ArraySpec, block: int) -> ShardFile:
        """The open shard of a block.

        Raises:
            CorruptStoreError: the file is missing or its index is damaged.
        """
        key = spec.name, block
        with self._turn:
            file = self._files.pop(key, None)
            if file is None:
                path = self._features / spec.shard_key(block)
                file = ShardFile(path, spec, block * spec.block_rows, self._indexes.get(key))
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
