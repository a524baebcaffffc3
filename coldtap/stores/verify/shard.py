"""Verifying one shard: every byte read once, a few MB at a time, and hashed while it is in the cache."""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunk_digests import ChunkDigests
from coldtap.stores.format.chunks import CRC_BYTES, checksum
from coldtap.stores.format.manifest import Entry
from coldtap.stores.format.shards import ENTRY_BYTES
from coldtap.stores.reading.digest_lists import ReadDigests
from coldtap.stores.reading.shard_files import ShardFile
from coldtap.stores.storage.contract import Reader, Storage
from coldtap.stores.verify.problems import Problem

PIECE_BYTES = 1 << 20

_buffers = threading.local()

type Integers = np.ndarray[Any, np.dtype[np.int64]]


def shard_problems(
    storage: Storage,
    entry: Entry,
    spec: ArraySpec,
    block: int,
    entries: Mapping[str, Entry],
    read_digests: ReadDigests | None,
) -> Iterator[Problem]:
    """Yield what is wrong with a shard: its index, its chunks' checksums and digests, its own digest.

    Args:
        storage: of the store.
        entry: of the shard.
        spec: its array.
        block: its number.
        entries: the manifest, which in format 1 has a digest a tap.
        read_digests: of a store that has lists of digests; one that is damaged is reported as a file.
    """
    digests = _digests(read_digests, spec, block)
    try:
        listed = None if digests is None else lambda spec, block: digests
        shard = ShardFile(storage, entry.name, spec, block * spec.block_rows, read_digests=listed)
        present = np.flatnonzero(shard.present())
    except CorruptStoreError as error:
        yield Problem(where=entry.name, what=str(error))
        return
    offsets, lengths = shard.index.offsets[present], shard.index.lengths[present]
    n_index = spec.block_rows * spec.chunks_per_row * ENTRY_BYTES + CRC_BYTES
    if misplaced := _misplaced(offsets, lengths, entry.n_bytes - n_index):
        row, chunk, what = misplaced
        where = f"{_where(spec, shard.first_row + int(present[row]), chunk)}: " if row < len(present) else ""
        yield Problem(where=entry.name, what=f"{where}{what}")
        return
    contents = _Contents(entry.n_bytes, lengths, digests and digests.at(present))
    problems: list[Problem] = []
    with storage.open(entry.name) as reader:
        for row, chunk, what in contents.read(reader):
            where = _where(spec, shard.first_row + int(present[row]), chunk)
            problems.append(Problem(where=entry.name, what=f"{where}: {what}"))
    if read_digests is None:
        problems += _tap_problems(entry, spec, contents, entries)
    yield from problems
    if not problems and contents.whole.hexdigest() != entry.sha256:
        yield Problem(where=entry.name, what="its SHA-256 is not the manifest's, though all checksums hold")


def _digests(read: ReadDigests | None, spec: ArraySpec, block: int) -> ChunkDigests | None:
    try:
        return read(spec, block) if read else None
    except CorruptStoreError:
        return None


def _where(spec: ArraySpec, row: int, chunk: int) -> str:
    return f"row {row}" + (f", tap {spec.taps[chunk]}" if spec.gathered_as.chunk_per_tap else "")


def _misplaced(offsets: Integers, lengths: Integers, n_bytes: int) -> tuple[int, int, str] | None:
    """The first chunk (row, chunk, what) that does not begin where the one before it ends.

    Chunks lie in the order of rows and taps, without gaps; after the last one comes the index.
    """
    ends = np.cumsum(lengths)
    starts = np.append(offsets.reshape(-1), n_bytes)
    expected = np.append(0, ends)
    wrong = np.flatnonzero(starts != expected)
    if not len(wrong):
        return None
    row, chunk = divmod(int(wrong[0]), offsets.shape[1])
    start, end = int(starts[wrong[0]]), int(expected[wrong[0]])
    if row == len(offsets):
        return row, chunk, f"the shard's index leaves bytes {end} to {start} to no chunk"
    order = "before" if start < end else "after a gap, not at"
    return row, chunk, f"the shard's index has the chunk at byte {start}, {order} the end of the one before it ({end})"


class _Contents:
    """A shard's chunks, read from its first byte to its last.

    Attributes:
        whole: digest of the file.
        taps: digests of each tap's chunks, where the chunks are those of taps and no list has a digest each.
        tap_bytes: their bytes.
    """

    def __init__(self, n_bytes: int, lengths: Integers, digests: ChunkDigests | None) -> None:
        self._n_bytes, self._lengths, self._digests = n_bytes, lengths, digests
        n_chunks = lengths.shape[1]
        self.whole = hashlib.sha256()
        self.taps = [hashlib.sha256() for _ in range(n_chunks)] if n_chunks > 1 and not digests else []
        self.tap_bytes: list[int] = lengths.sum(axis=0).tolist()

    def read(self, reader: Reader) -> Iterator[tuple[int, int, str]]:
        """Hash everything; yields (row, chunk, what) of chunks that are damaged, or not those that the list has."""
        n_chunks = self._lengths.shape[1]
        ends = np.cumsum(self._lengths)
        for first, last in _pieces(ends):
            start = int(ends[first - 1]) if first else 0
            data = _filled(reader, start, int(ends[last - 1]))
            self.whole.update(data)
            for number, end in enumerate((ends[first:last] - start).tolist(), first):
                chunk = data[end - int(self._lengths.flat[number]) : end]
                if self.taps:
                    self.taps[number % n_chunks].update(chunk)
                row, place = divmod(number, n_chunks)
                if checksum(chunk[:-CRC_BYTES]) != chunk[-CRC_BYTES:].tobytes():
                    yield row, place, "the chunk's checksum does not hold"
                elif self._digests and not self._digests.has(row, place, chunk):
                    yield row, place, "the chunk is whole and not the one that the store's list of digests has there"
        self.whole.update(_filled(reader, int(ends[-1]) if len(ends) else 0, self._n_bytes))


def _pieces(ends: Integers) -> Iterator[tuple[int, int]]:
    """Runs of chunks (first, last + 1) of about a piece's bytes."""
    first = 0
    while first < len(ends):
        start = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, start + PIECE_BYTES, side="right")), first + 1)
        yield first, last
        first = last


def _filled(reader: Reader, start: int, end: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a range, in a buffer of this thread that is used again."""
    n_bytes = end - start
    if len(getattr(_buffers, "bytes", b"")) < n_bytes:
        _buffers.bytes = np.empty(max(n_bytes, PIECE_BYTES), np.uint8)
    data: np.ndarray[Any, np.dtype[np.uint8]] = _buffers.bytes[:n_bytes]
    reader.read_into(start, memoryview(data))
    return data


def _tap_problems(
    entry: Entry, spec: ArraySpec, contents: _Contents, entries: Mapping[str, Entry]
) -> Iterator[Problem]:
    for tap, digest, n_bytes in zip(spec.taps, contents.taps, contents.tap_bytes, strict=False):
        name = f"{entry.name}#{tap}"
        listed = entries.get(name)
        if listed is None or listed.sha256 != digest.hexdigest():
            yield Problem(where=name, what="the tap's SHA-256 is not the manifest's")
        elif listed.n_bytes != n_bytes:
            yield Problem(where=name, what=f"the tap has {n_bytes} bytes; the manifest says {listed.n_bytes}")
