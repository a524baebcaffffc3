"""The bytes of one shard: chunks in row order, each with its crc32c, then the index with its own.

This is Zarr v3's `sharding_indexed` codec (index at the end, inner codecs `bytes` and `crc32c`). zarr-python
writes the same bytes at 3 to 14 % of the speed for chunks of 25 kB (`docs/log.md`), and in Morton order
unless told otherwise; a test holds the two equal, byte for byte. Lexicographic order makes the taps of a row
one contiguous run.
"""

import hashlib
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from coldtap.stores.arrays import ArraySpec
from coldtap.stores.errors import CorruptStoreError

CRC_BYTES = 4
ENTRY_BYTES = 16
ABSENT = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedShard:
    """A finished shard: its bytes in order, their digest, and a digest a tap (over that tap's chunks)."""

    pieces: tuple[memoryview, ...]
    n_bytes: int
    sha256: str
    tap_sha256: tuple[str, ...]


class ShardBuffer:
    """A shard in the making: values are written straight into the places where they will lie on disk."""

    def __init__(self, spec: ArraySpec) -> None:
        """Allocate room for S rows of `spec`."""
        self.spec = spec
        chunks = (spec.block_rows, spec.chunks_per_row)
        self._raw = np.empty((*chunks, spec.chunk_bytes + CRC_BYTES), np.uint8)
        values = self._raw[..., : spec.chunk_bytes].view(spec.dtype)
        self.values: np.ndarray[Any, Any] = values.reshape(spec.shard_shape, copy=False)

    def seal(self, present: np.ndarray[Any, np.dtype[np.bool_]]) -> SealedShard:
        """Add checksums and the index; rows that are not present get no chunk.

        Args:
            present: (row,), true where a row was written.
        """
        raw = self._raw if present.all() else self._raw[present]
        for row in raw:
            for chunk in row:
                checksum = google_crc32c.value(chunk[:-CRC_BYTES])
                chunk[-CRC_BYTES:] = np.frombuffer(checksum.to_bytes(CRC_BYTES, "little"), np.uint8)
        index = self._index(present)
        whole = hashlib.sha256(raw)
        whole.update(index)
        return SealedShard(
            pieces=(memoryview(raw).cast("B"), memoryview(index)),
            n_bytes=raw.nbytes + len(index),
            sha256=whole.hexdigest(),
            tap_sha256=tap_digests(raw),
        )

    def _index(self, present: np.ndarray[Any, np.dtype[np.bool_]]) -> bytes:
        length = self.spec.chunk_bytes + CRC_BYTES
        entries = np.full((self.spec.block_rows, self.spec.chunks_per_row, 2), ABSENT, "<u8")
        n_chunks = int(present.sum()) * self.spec.chunks_per_row
        offsets = np.arange(n_chunks, dtype="<u8") * np.uint64(length)
        entries[present, :, 0] = offsets.reshape(-1, self.spec.chunks_per_row)
        entries[present, :, 1] = length
        data = entries.tobytes()
        checksum: bytes = google_crc32c.value(data).to_bytes(CRC_BYTES, "little")
        return bytes(data) + checksum


def tap_digests(chunks: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[str, ...]:
    """SHA-256 of each tap's stored chunks in row order; chunks are (row, tap, byte)."""
    digests = [hashlib.sha256() for _ in range(chunks.shape[1])]
    for row in chunks:
        for digest, chunk in zip(digests, row, strict=True):
            digest.update(chunk)
    return tuple(digest.hexdigest() for digest in digests)


class ShardFile:
    """An open shard, its index parsed and checked once; reads by pread, so that threads share it.

    `entries` is (row, chunk, 2): offset and length in bytes, both 2^64 − 1 where there is no chunk.
    """

    def __init__(self, path: Path, spec: ArraySpec) -> None:
        """Open a shard and parse its index.

        Raises:
            CorruptStoreError: the file is missing or too short, or the index is damaged or points outside.
        """
        self.path = path
        self.spec = spec
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise CorruptStoreError(f"{path}: the shard is missing") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.n_bytes = os.fstat(self._descriptor).st_size
        self.entries = self._read_index()

    def _read_index(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        spec = self.spec
        n_index = spec.block_rows * spec.chunks_per_row * ENTRY_BYTES + CRC_BYTES
        if self.n_bytes < n_index:
            raise CorruptStoreError(f"{self.path}: {self.n_bytes} bytes, shorter than its index of {n_index}")
        data = os.pread(self._descriptor, n_index, self.n_bytes - n_index)
        if google_crc32c.value(data[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little") != data[-CRC_BYTES:]:
            raise CorruptStoreError(f"{self.path}: the checksum of the shard's index does not hold (truncated?)")
        entries = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(spec.block_rows, spec.chunks_per_row, 2)
        there = entries[(entries != ABSENT).any(axis=2)]
        length = spec.chunk_bytes + CRC_BYTES
        # Compared without an addition that could wrap around.
        if ((there[:, 1] != length) | (there[:, 0] > max(self.n_bytes - n_index - length, 0))).any():
            raise CorruptStoreError(f"{self.path}: the shard's index points outside its chunks")
        return entries

    def present(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(row,), true where every chunk of the row is there.

        Raises:
            CorruptStoreError: a row has some of its chunks only.
        """
        there = self.entries[:, :, 0] != ABSENT
        some, whole = there.any(axis=1), np.asarray(there.all(axis=1))
        if (some != whole).any():
            row = int(np.flatnonzero(some != whole)[0])
            raise CorruptStoreError(f"{self.path}: row {row} of the shard has lost some of its chunks")
        return whole

    def read_chunks(self, row: int, taps: range) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of consecutive chunks of one row, checksums verified and dropped: (chunk, byte).

        Raises:
            CorruptStoreError: a chunk is missing, short or fails its checksum.
        """
        length = self.spec.chunk_bytes + CRC_BYTES
        entries = self.entries[row, taps.start : taps.stop]
        if (entries == ABSENT).any():
            raise CorruptStoreError(f"{self.path}: row {row} of the shard has no chunk")
        offsets = entries[:, 0].astype(np.int64)
        if (np.diff(offsets) == length).all():
            data = os.pread(self._descriptor, length * len(taps), int(offsets[0]))
        else:
            data = b"".join(os.pread(self._descriptor, length, int(offset)) for offset in offsets)
        if len(data) != length * len(taps):
            raise CorruptStoreError(f"{self.path}: row {row} of the shard ends early")
        chunks = np.frombuffer(data, np.uint8).reshape(len(taps), length)
        for tap, chunk in zip(taps, chunks, strict=True):
            if google_crc32c.value(chunk[:-CRC_BYTES]) != int.from_bytes(chunk[-CRC_BYTES:].tobytes(), "little"):
                raise CorruptStoreError(f"{self.path}: row {row} of the shard, chunk {tap}: its checksum does not hold")
        return chunks[:, :-CRC_BYTES]
