"""The bytes of one chunk: values, in layout `compact` compressed by zstd, then their crc32c.

These are Zarr's codecs `bytes`, `zstd` and `crc32c`. Two libraries bind the same zstd and write the same frames; which
one is called follows from the chunk's size alone. numcodecs decodes into the caller's buffer but makes a new context
for every chunk, python-zstandard keeps its context but returns bytes that have to be copied: with chunks of 151 kB
whole epochs by numcodecs run at 0.83 of python-zstandard's speed, with 76 kB at 0.77, and from some 400 kB on it is
the faster one (`python -m benchmarks codecs`; `docs/log.md`, 2026-11-27).
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from numcodecs import zstd as numcodecs_zstd

CRC_BYTES = 4
ZSTD_LEVEL = 1  # on codes it sits on their entropy; higher levels are slower and no smaller
NUMCODECS_FROM_BYTES = 1 << 18

_contexts = threading.local()


type Bytes = bytes | memoryview | np.ndarray[Any, Any]


def checksum(data: Bytes) -> bytes:
    """Return the crc32c of some bytes as Zarr stores it: little-endian."""
    # google_crc32c takes no memoryview.
    value: int = google_crc32c.value(np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data)
    return value.to_bytes(CRC_BYTES, "little")


def compress(values: Bytes) -> bytes:
    """Return one zstd frame that states its content's size."""
    if memoryview(values).nbytes >= NUMCODECS_FROM_BYTES:
        large: bytes = numcodecs_zstd.compress(values, ZSTD_LEVEL)
        return large
    if not hasattr(_contexts, "compressor"):
        _contexts.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    small: bytes = _contexts.compressor.compress(values)
    return small


DECODE_ERRORS = (zstandard.ZstdError, RuntimeError, ValueError, MemoryError)


def decompress(frame: memoryview, n_bytes: int) -> bytearray:
    """Return the content of one frame, of a size known before; raises as `decompress_into` does."""
    _require_size(frame, n_bytes)
    content = bytearray(n_bytes)
    decompress_into(frame, memoryview(content))
    return content


def decompress_into(frame: memoryview, out: memoryview) -> None:
    """Decode one frame into all of `out` (byte,); nothing larger is ever allocated.

    Raises:
        ValueError: the frame is damaged, or holds another number of bytes.
    """
    n_bytes = len(out)
    _require_size(frame, n_bytes)
    try:
        # Not by `decode_frames`, whose loop costs a single frame of 12 kB one tenth of its time.
        if n_bytes >= NUMCODECS_FROM_BYTES:
            numcodecs_zstd.decompress(frame, out)
        else:
            out[:] = _small_decoder()(frame, max_output_size=n_bytes, allow_extra_data=False)
    except DECODE_ERRORS as error:
        raise ValueError(str(error)) from error


def decode_frames(data: memoryview, starts: Sequence[int], ends: Sequence[int], out: memoryview, n_bytes: int) -> None:
    """Decode frames of `n_bytes` of content each into `out` (byte,), one behind another.

    It may allocate what a frame states, so give it only frames that `decompress_into` has seen.

    Args:
        data: (byte,), in which the frames lie.
        starts: where each frame begins.
        ends: where it ends.
        out: as long as all contents together.
        n_bytes: the size of each content.

    Raises:
        ZstdError, RuntimeError, ValueError, MemoryError: all in `DECODE_ERRORS`; a frame has been damaged since.
    """
    places = range(0, n_bytes * len(starts), n_bytes)
    if n_bytes >= NUMCODECS_FROM_BYTES:
        for start, end, place in zip(starts, ends, places, strict=True):
            _require_size(data[start:end], n_bytes)  # numcodecs leaves the rest of `out` as it was
            numcodecs_zstd.decompress(data[start:end], out[place : place + n_bytes])
        return
    decode = _small_decoder()
    for start, end, place in zip(starts, ends, places, strict=True):
        out[place : place + n_bytes] = decode(data[start:end], max_output_size=n_bytes, allow_extra_data=False)


def _small_decoder() -> Callable[..., bytes]:
    """Return this thread's own."""
    if not hasattr(_contexts, "decode"):
        _contexts.decode = zstandard.ZstdDecompressor().decompress
    decode: Callable[..., bytes] = _contexts.decode
    return decode


def _require_size(frame: memoryview, n_bytes: int) -> None:
    try:
        stated = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if stated != n_bytes:
        raise ValueError(f"it states {stated} bytes, not {n_bytes}")


def largest_frame(n_bytes: int) -> int:
    """Return the size that no zstd frame of so many bytes exceeds (ZSTD_compressBound)."""
    return n_bytes + (n_bytes >> 8) + 128
