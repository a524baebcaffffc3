"""Values that the codes of a block do not hold: a segment a row and tap, so that whole segments are taken or dropped.

    escapes/<array>/<block>   counts uint32 (row, tap), then for each row and tap in order its segment:
                              position uint32 (escape,), ascending, of token · D + channel; value float32 (escape,)

A block without escapes has no file. `digests/escapes/<array>/<block>` has 36 bytes of each row and tap: SHA-256 and
crc32c of the segment, zeros where it is empty. All numbers are little-endian.
"""

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunk_digests import LISTED_BYTES
from coldtap.stores.format.chunks import checksum
from coldtap.stores.format.codes import Escapes
from coldtap.stores.format.escapes import BlockEscapes

ESCAPES = "escapes"
BYTES_PER_ESCAPE = 8

type Integers = np.ndarray[Any, np.dtype[np.int64]]


def escapes_folder(array: str) -> str:
    """Folder of the files of an array under the store."""
    return f"{ESCAPES}/{array}"


def escapes_name(array: str, block: int) -> str:
    """Path of the file of a block under the store."""
    return f"{escapes_folder(array)}/{block}"


def escape_bytes(spec: ArraySpec, block: int, escapes: Escapes) -> bytes:
    """Return the file of a block.

    Args:
        spec: the int8 array.
        block: its number.
        escapes: ascending by position, at least one; rows are those of the array.
    """
    row, place, token, channel = escapes.position.astype(np.int64).T
    segment = (row - block * spec.block_rows) * len(spec.taps) + place
    counts = np.bincount(segment, minlength=spec.block_rows * len(spec.taps))
    positions, values = _places(counts)
    words = np.empty(2 * len(segment), "<u4")
    words[positions] = token * spec.geometry.channels + channel
    words[values] = escapes.value.astype("<f4").view("<u4")
    return counts.astype("<u4").tobytes() + words.tobytes()


def _places(counts: Integers) -> tuple[Integers, Integers]:
    """Where the positions and the values of all escapes lie, in words of 4 bytes behind the counts."""
    before = np.repeat(np.cumsum(counts) - counts, counts)
    at = np.arange(len(before)) + before
    return at, at + np.repeat(counts, counts)


def parse_escapes(data: bytes | None, spec: ArraySpec, *, where: str) -> BlockEscapes:
    """Return the escapes of a block from the bytes of its file, None where it has none.

    Raises:
        CorruptStoreError: it is not such a file, or an escape is outside its tap or out of order.
    """
    counts, words = _parts(data, spec, where)
    positions, values = _places(counts)
    within, segment = words[positions].astype(np.int64), np.repeat(np.arange(len(counts)), counts)
    per_tap = spec.geometry.channels * spec.row_shape[-2]
    if (within >= per_tap).any():
        raise CorruptStoreError(f"{where}: an escape is outside the tokens and channels of its tap")
    if (np.diff(segment * per_tap + within) <= 0).any():
        raise CorruptStoreError(f"{where}: its escapes are not in ascending order")
    of_row = counts.reshape(spec.block_rows, -1).sum(axis=1)
    return BlockEscapes(
        start=np.concatenate([[0], np.cumsum(of_row)]),
        place=segment % len(spec.taps),
        within=within,
        value=words[values].view("<f4").astype(np.float32),
    )


def escape_digests(data: bytes, spec: ArraySpec, *, where: str) -> bytes:
    """Return the digests of a block's segments, from its file; raises as `parse_escapes`."""
    counts, words = _parts(data, spec, where)
    digests = bytearray(LISTED_BYTES * len(counts))
    ends = np.cumsum(np.concatenate([[0], 2 * counts])).tolist()
    for number, (start, end) in enumerate(pairwise(ends)):
        if start < end:
            segment = words[start:end].tobytes()
            place = number * LISTED_BYTES
            digests[place : place + LISTED_BYTES] = hashlib.sha256(segment).digest() + checksum(segment)
    return bytes(digests)


def _parts(data: bytes | None, spec: ArraySpec, where: str) -> tuple[Integers, np.ndarray[Any, np.dtype[np.uint32]]]:
    n_counts = spec.block_rows * len(spec.taps)
    if data is None:
        return np.zeros(n_counts, np.int64), np.empty(0, "<u4")
    counts = np.frombuffer(data[: min(4 * n_counts, len(data) // 4 * 4)], "<u4").astype(np.int64)
    if len(data) != 4 * n_counts + BYTES_PER_ESCAPE * int(counts.sum()):
        raise CorruptStoreError(f"{where}: {len(data)} bytes are not {n_counts} counts and as many escapes as they say")
    return counts, np.frombuffer(data, "<u4", offset=4 * n_counts)
