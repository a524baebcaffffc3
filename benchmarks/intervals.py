"""The one rule for intervals of accuracy in the benchmarks: Student's t at 95 % over sets.

What is asked is how a method would do on other sets, so that a set is one observation. Its seeds and methods share its
images: they are averaged first, and never count as observations of their own.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Two-sided 95 % points of Student's t by degrees of freedom, from 1; the last serves for more too, a little wide.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A mean paired difference in points.

    Attributes:
        mean: Over sets.
        interval: Its lower and upper end; None where there is one set.
        n: Number of sets.
    """

    mean: float
    interval: tuple[float, float] | None
    n: int

    def __str__(self) -> str:
        """`+0.73 (-3.15 … +4.61)`."""
        return f"{self.mean:+.2f}" if self.interval is None else f"{self.mean:+.2f} ({self.span})"

    @property
    def span(self) -> str:
        """`-3.15 … +4.61`; empty where there is one set."""
        return "" if self.interval is None else " … ".join(f"{end:+.2f}" for end in self.interval)

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as JSON keeps it."""
        interval = None if self.interval is None else [*self.interval]
        return {"difference": self.mean, "interval": interval, "pairs": self.n}


def over_sets(differences: Sequence[float]) -> Difference:
    """Return the mean of one difference per set, with its interval."""
    mean, n = statistics.mean(differences), len(differences)
    if n == 1:
        return Difference(mean=mean, interval=None, n=n)
    half = T_95[min(n - 1, len(T_95)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean=mean, interval=(mean - half, mean + half), n=n)


def paired(left: Mapping[str, Sequence[float]], right: Mapping[str, Sequence[float]]) -> Difference:
    """Return left − right over the sets of `left`, each the mean of its values (one per seed, in percent)."""
    return over_sets([statistics.mean(values) - statistics.mean(right[name]) for name, values in left.items()])
