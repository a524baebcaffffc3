"""Differences of paired results, in points, with their 95 % intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

# Two-sided 95 % points of Student's t by degrees of freedom; the last holds for more too, and is then a little wide.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# Accuracy by seed, set and adaptor.
type Series = dict[int, dict[str, dict[str, float]]]


def pair_series(left: Series, right: Series, adaptors: Sequence[str]) -> dict[str, Any] | None:
    """left − right: a pair a set, the mean of the adaptors and of the seeds that both have; Student's t over sets.

    Seeds of one set share its images, so that they are no pairs of their own.
    """
    seeds = [seed for seed in left if seed in right]
    if not seeds:
        return None
    differences = [
        100 * statistics.mean(left[seed][name][one] - right[seed][name][one] for seed in seeds for one in adaptors)
        for name in left[seeds[0]]
    ]
    mean, n = statistics.mean(differences), len(differences)
    if n == 1:
        return {"difference": mean, "interval": None, "pairs": n}
    half = T_95[min(n - 1, len(T_95)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    return {"difference": mean, "interval": [mean - half, mean + half], "pairs": n}


def pair_images(left: dict[int, str], right: dict[int, str], n_images: int) -> dict[str, Any] | None:
    """left − right by seed: bits of what was right, in hexadecimal; a pair an image, the mean of the seeds."""
    seeds = [seed for seed in left if seed in right]
    if not seeds:
        return None
    each = np.mean([_bits(left[seed], n_images) - _bits(right[seed], n_images) for seed in seeds], axis=0)
    mean, half = 100 * float(each.mean()), 196 * float(each.std(ddof=1)) / math.sqrt(n_images)
    return {"difference": mean, "interval": [mean - half, mean + half], "pairs": n_images}


def _bits(hexadecimal: str, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    packed = np.frombuffer(bytes.fromhex(hexadecimal), np.uint8)
    return np.unpackbits(packed)[:n].astype(np.float64)
