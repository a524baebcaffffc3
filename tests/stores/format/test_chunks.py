"""The codec of chunks: small and large ones by two libraries, the same frames, and damage told the same way."""

import numpy as np
import pytest
import zstandard
from numcodecs import zstd

from coldtap.stores.format.chunks import (
    DECODE_ERRORS,
    NUMCODECS_FROM_BYTES,
    ZSTD_LEVEL,
    compress,
    decode_frames,
    decompress,
    largest_frame,
)

SIZES = (1, 12_480, NUMCODECS_FROM_BYTES - 1, NUMCODECS_FROM_BYTES, 3 * NUMCODECS_FROM_BYTES)


def codes(n_bytes: int) -> bytes:
    """Codes as those of features: Gaussian, some nine steps a deviation."""
    values = np.random.default_rng(n_bytes).standard_normal(n_bytes) * 9
    return np.clip(np.round(values), -127, 127).astype(np.int8).tobytes()


@pytest.mark.parametrize("n_bytes", SIZES)
def test_both_libraries_write_the_frame_that_compress_writes(n_bytes):
    frame = compress(codes(n_bytes))
    assert frame == zstd.compress(codes(n_bytes), ZSTD_LEVEL)
    assert frame == zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(codes(n_bytes))
    assert len(frame) <= largest_frame(n_bytes)


@pytest.mark.parametrize("n_bytes", SIZES)
def test_a_frame_of_either_library_decodes_into_the_callers_buffer(n_bytes):
    content = codes(n_bytes)
    for frame in (zstd.compress(content, 3), zstandard.ZstdCompressor(level=5).compress(content)):
        assert decompress(memoryview(frame), n_bytes) == content
        out, n = bytearray(2 * n_bytes), len(frame)
        decode_frames(memoryview(b"x" + frame + frame), [n + 1, 1], [2 * n + 1, n + 1], memoryview(out), n_bytes)
        assert bytes(out) == content * 2


@pytest.mark.parametrize("n_bytes", SIZES)
def test_a_frame_that_is_damaged_or_of_another_size_is_a_value_error(n_bytes):
    frame = compress(codes(n_bytes))
    wrong = {
        "cut": frame[:-1],
        "followed by something": frame + b"junk",
        "followed by a frame": frame + compress(b"abc"),
        "smaller": compress(codes(n_bytes)[:-1]),
        "larger": compress(codes(n_bytes) + b"x"),
        "of no stated size": zstandard.ZstdCompressor(write_content_size=False).compress(codes(n_bytes)),
        "no frame": b"x" * len(frame),
    }
    for name, data in wrong.items():
        with pytest.raises(ValueError, match=r"."):
            pytest.fail(f"{name}: {len(decompress(memoryview(data), n_bytes))} bytes were decoded")


@pytest.mark.parametrize("n_bytes", SIZES[1:])
def test_a_frame_damaged_after_it_was_checked_never_leaves_part_of_a_buffer_as_it_was(n_bytes):
    out = bytearray(n_bytes)
    for frame in (compress(codes(n_bytes // 2)), compress(codes(n_bytes))[:-3]):
        with pytest.raises(DECODE_ERRORS, match=r"."):
            decode_frames(memoryview(frame), [0], [len(frame)], memoryview(out), n_bytes)
