"""Differences of paired results, in points, with their 95 % intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.intervals import over_sets

# Accuracy by seed, set and adaptor.
type Series = dict[int, dict[str, dict[str, float]]]


def pair_series(left: Series, right: Series, adaptors: Sequence[str]) -> dict[str, Any] | None:
    """Return left − right over sets (`benchmarks.intervals`), the mean of the adaptors and the seeds that both have."""
    seeds = [seed for seed in left if seed in right]
    if not seeds:
        return None
    differences = [
        100 * statistics.mean(left[seed][name][one] - right[seed][name][one] for seed in seeds for one in adaptors)
        for name in left[seeds[0]]
    ]
    return over_sets(differences).to_dict()


def pair_images(left: dict[int, str], right: dict[int, str], n_images: int) -> dict[str, Any] | None:
    """Return left − right on one set, whose interval can be over its images alone: how seeds and sets vary is left out.

    Args:
        left: By seed, which images were right: bits in hexadecimal.
        right: The same of the other.
        n_images: How many bits there are.
    """
    seeds = [seed for seed in left if seed in right]
    if not seeds:
        return None
    each = np.mean([_bits(left[seed], n_images) - _bits(right[seed], n_images) for seed in seeds], axis=0)
    mean, half = 100 * float(each.mean()), 196 * float(each.std(ddof=1)) / math.sqrt(n_images)
    return {"difference": mean, "interval": [mean - half, mean + half], "pairs": n_images}


def _bits(hexadecimal: str, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    packed = np.frombuffer(bytes.fromhex(hexadecimal), np.uint8)
    return np.unpackbits(packed)[:n].astype(np.float64)
