"""zstd by numcodecs against zstd by python-zstandard, by the size of a chunk.

Codes of Gaussian values, which is what the codes of features are to zstd; level 1; two threads; each decodes into a
buffer of its own that it has from the start. The two take turns, and a ratio is taken within a turn: above 1 numcodecs
is the faster one. Sizes are those of ViT backbones: 12.5 kB is the reference's chunk, 76 kB ViT-S's, 151 kB ViT-B's,
202 kB ViT-L's at 224 px, 1.4 MB ViT-L's at 518 px.

    python -m benchmarks codecs
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zstandard
from numcodecs import zstd

SIZES = (12_480, 37_824, 75_648, 151_296, 201_728, 394_752, 789_504, 1_402_880)
BYTES = 60_000_000
QUICK_BYTES = 3_000_000
N_THREADS = 2
TURNS = 9
LEVEL = 1

type Work = Callable[[Sequence[Any], memoryview], None]


def measure_codecs(*, quick: bool) -> list[dict[str, Any]]:
    """Return a record per size: the ratios of decoding and of encoding, and MB/s of both."""
    return [_measure(n_bytes, QUICK_BYTES if quick else BYTES, 2 if quick else TURNS) for n_bytes in SIZES]


def _measure(n_bytes: int, total: int, turns: int) -> dict[str, Any]:
    chunks = [_codes(n_bytes, seed) for seed in range(max(N_THREADS, total // n_bytes))]
    frames = [zstd.compress(chunk, LEVEL) for chunk in chunks]
    buffers = [memoryview(bytearray(n_bytes)) for _ in range(N_THREADS)]
    record: dict[str, Any] = {"bytes_of_a_chunk": n_bytes}
    for name, items, works in (
        ("decode", frames, (_decode_numcodecs, _decode_zstandard)),
        ("encode", chunks, (_encode_numcodecs, _encode_zstandard)),
    ):
        seconds = [[_seconds(work, items, buffers) for work in works] for _ in range(turns)]
        ratios = [other / numcodecs for numcodecs, other in seconds]
        record[name] = {
            "ratio": statistics.median(ratios),
            "ratio_least": min(ratios),
            "ratio_greatest": max(ratios),
            **{
                library: n_bytes * len(chunks) / statistics.median(turn[place] for turn in seconds) / 1e6
                for place, library in enumerate(("numcodecs_mb_per_s", "zstandard_mb_per_s"))
            },
        }
    return record


def _codes(n_bytes: int, seed: int) -> bytes:
    values = np.random.default_rng(seed).standard_normal(n_bytes, np.float32) * 9.1
    return np.clip(np.round(values), -127, 127).astype(np.int8).tobytes()


def _seconds(work: Work, items: Sequence[Any], buffers: Sequence[memoryview]) -> float:
    with ThreadPoolExecutor(N_THREADS) as pool:
        began = time.perf_counter()
        list(pool.map(work, [items[thread::N_THREADS] for thread in range(N_THREADS)], buffers))
        return time.perf_counter() - began


def _decode_numcodecs(frames: Sequence[bytes], out: memoryview) -> None:
    for frame in frames:
        zstd.decompress(frame, out)


def _decode_zstandard(frames: Sequence[bytes], out: memoryview) -> None:
    decode = zstandard.ZstdDecompressor().decompress
    for frame in frames:
        out[:] = decode(frame, max_output_size=len(out))


def _encode_numcodecs(chunks: Sequence[bytes], out: memoryview) -> None:
    for chunk in chunks:
        zstd.compress(chunk, LEVEL)


def _encode_zstandard(chunks: Sequence[bytes], out: memoryview) -> None:
    encode = zstandard.ZstdCompressor(level=LEVEL).compress
    for chunk in chunks:
        encode(chunk)
