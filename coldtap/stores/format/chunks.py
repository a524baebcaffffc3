"""The bytes of one chunk: values, in layout `compact` compressed by zstd, then their crc32c.

These are Zarr's codecs `bytes`, `zstd` and `crc32c`. python-zstandard keeps its context between chunks, numcodecs makes
a new one for each: at 12.5 kB a chunk that costs half of the decoding speed (`docs/log.md`).
"""

import threading
from typing import Any

import google_crc32c
import numpy as np
import zstandard

CRC_BYTES = 4
ZSTD_LEVEL = 1  # on codes it sits on their entropy; higher levels are slower and no smaller

_contexts = threading.local()


type Bytes = bytes | memoryview | np.ndarray[Any, Any]


def checksum(data: Bytes) -> bytes:
    """The crc32c of some bytes as Zarr stores it: little-endian."""
    # google_crc32c takes no memoryview.
    value: int = google_crc32c.value(np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data)
    return value.to_bytes(CRC_BYTES, "little")


def compress(values: Bytes) -> bytes:
    """One zstd frame that states its content's size."""
    if not hasattr(_contexts, "compressor"):
        _contexts.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    data: bytes = _contexts.compressor.compress(values)
    return data


def decompress(frame: bytes | memoryview, n_bytes: int) -> bytes:
    """The content of one frame, of a size known before: nothing larger is ever allocated.

    Raises:
        ValueError: the frame is damaged, or holds another number of bytes.
    """
    try:
        stated = zstandard.frame_content_size(frame)
        if stated != n_bytes:
            raise ValueError(f"it states {stated} bytes, not {n_bytes}")
        data: bytes = decompressor().decompress(frame, max_output_size=n_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return data


def decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: it allocates what a frame states, so give it only frames that `decompress` has seen."""
    if not hasattr(_contexts, "decompressor"):
        _contexts.decompressor = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _contexts.decompressor
    return found


def largest_frame(n_bytes: int) -> int:
    """The size that no zstd frame of so many bytes exceeds (ZSTD_compressBound)."""
    return n_bytes + (n_bytes >> 8) + 128
