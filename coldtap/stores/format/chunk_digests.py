"""The digests of a shard's chunks: what binds each of them to its array, block, row and tap.

    digests/<array>/<block>   S × chunks of a row, in the order of rows and then taps, 36 bytes each:
                              SHA-256 of the chunk as it is stored, its checksum included; then that checksum

An absent row has zeros. A chunk's own crc32c says that it is whole, this list that it is the one that belongs there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunks import CRC_BYTES

DIGESTS = "digests"
SHA256_BYTES = 32
LISTED_BYTES = SHA256_BYTES + CRC_BYTES

type Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def digests_name(array: str, block: int) -> str:
    """Path of the list of a block of an array under the store."""
    return f"{DIGESTS}/{array}/{block}"


def digest_list(present: np.ndarray[Any, np.dtype[np.bool_]], chunks: Sequence[Sequence[Any]] | Bytes) -> bytes:
    """Return the list of a shard.

    Args:
        present: (row,), true where the block has a row.
        chunks: stored bytes by present row and place in the row; at least one row.
    """
    made = b"".join(hashlib.sha256(chunk).digest() + bytes(chunk[-CRC_BYTES:]) for row in chunks for chunk in row)
    entries = np.zeros((len(present), len(chunks[0]), LISTED_BYTES), np.uint8)
    entries[present] = np.frombuffer(made, np.uint8).reshape(-1, *entries.shape[1:])
    return entries.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDigests:
    """The list of a shard.

    Attributes:
        sha256: (row, chunk, byte).
        crc32c: (row, chunk) uint32.
        present: (row, chunk), true where there is a chunk.
    """

    sha256: Bytes
    crc32c: np.ndarray[Any, np.dtype[np.uint32]]
    present: np.ndarray[Any, np.dtype[np.bool_]]

    def at(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> "ChunkDigests":
        """Those of some rows."""
        return ChunkDigests(sha256=self.sha256[rows], crc32c=self.crc32c[rows], present=self.present[rows])

    def has(self, row: int, chunk: int, stored: Bytes) -> bool:
        """Return whether a chunk is the one listed there: by its SHA-256, and by the checksum at its end."""
        crc32c = int.from_bytes(stored[-CRC_BYTES:].tobytes(), "little")
        sha256 = hashlib.sha256(stored).digest()
        return bool(self.crc32c[row, chunk] == crc32c) and self.sha256[row, chunk].tobytes() == sha256


def parse_digests(data: bytes, spec: ArraySpec, *, where: str) -> ChunkDigests:
    """Return the list of a shard from the bytes of its file.

    Raises:
        CorruptStoreError: it is not as long as the array's blocks have chunks; the message names the file as `where`.
    """
    shape = spec.block_rows, spec.chunks_per_row, LISTED_BYTES
    if len(data) != shape[0] * shape[1] * shape[2]:
        raise CorruptStoreError(f"{where}: {len(data)} bytes are not the digests of {shape[0]} × {shape[1]} chunks")
    entries = np.frombuffer(data, np.uint8).reshape(shape)
    return ChunkDigests(
        sha256=entries[..., :SHA256_BYTES],
        crc32c=entries[..., SHA256_BYTES:].copy().view("<u4")[..., 0],
        present=entries.any(axis=2),
    )
