"""The order of an epoch: a pure function of (seed, epoch), cut into batches and among processes.

Two shuffles. `uniform` draws every permutation with the same probability. `block` keeps reads near each other, for
stores on disks that are far larger than memory: the blocks are permuted, some of them at a time form a pool, and the
samples of a pool are permuted. Inside a split the rows themselves follow a seeded shuffle of the samples, so that
a block is class-mixed whatever the order of the source; `Mixing` states what is left of the difference.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from coldtap.errors import OptionError

type Rows = np.ndarray[Any, np.dtype[np.int64]]
type Shuffle = Literal["uniform", "block"]

SHUFFLES: tuple[Shuffle, ...] = get_args(Shuffle.__value__)

# A pool holds at most this many samples, but never fewer than some blocks. Both numbers are part of what `block`
# means in a run's settings: with others an old run would go on in another order.
POOL_SAMPLES = 4096
MIN_POOL_BLOCKS = 8


def epoch_draw(n_samples: int, n_views: int, *, seed: int, epoch: int, blocks: Rows | None = None) -> tuple[Rows, Rows]:
    """Draw an epoch: the order of the samples, and the view of each.

    Args:
        n_samples: Samples of the split.
        n_views: Views of each, view 0 included; every one is drawn with the same probability.
        seed: The run's seed.
        epoch: The epoch's number.
        blocks: For a block shuffle, where blocks start, as `block_starts` gives it; None shuffles uniformly.

    Returns:
        order (n_samples,), a permutation, and views (n_samples,) in that order: a pure function of the arguments.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n_samples) if blocks is None else _block_order(blocks, rng)
    views = rng.integers(0, n_views, n_samples) if n_views > 1 else np.zeros(n_samples, np.int64)
    return order, views


def block_starts(rows: Rows, block_rows: int) -> Rows:
    """Return where blocks start among samples at ascending `rows`, and at the end the number of samples."""
    changes = np.flatnonzero(np.diff(rows // block_rows)) + 1
    return np.concatenate([[0], changes, [len(rows)]])


def batch_bounds(n_samples: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Rows:
    """Cut the places of an epoch's order into the batches of one process.

    A global batch is `batch_size · world_size` consecutive places, and each process takes its consecutive part: what
    step k learns from depends on that product alone, not on its division. The last global batch is divided as evenly
    as it can be, parts differing by at most one sample; with fewer samples than processes it is left out, so that
    every process has the same number of batches and none is empty. A single process leaves nothing out.

    Returns:
        (batch, 2): first place and the place after the last.

    Raises:
        OptionError: `rank` is no process of `world_size`.
    """
    if not 0 <= rank < world_size:
        raise OptionError(f"rank={rank}: it must be 0 to {world_size - 1} for world_size={world_size}")
    starts = np.arange(0, n_samples, batch_size * world_size)
    sizes = np.minimum(batch_size * world_size, n_samples - starts)
    starts, sizes = starts[sizes >= world_size], sizes[sizes >= world_size]
    return np.stack([starts + sizes * rank // world_size, starts + sizes * (rank + 1) // world_size], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How far a block shuffle is from a uniform one.

    `pool_samples` of `n_samples` are mixed at a time, and two samples of one block meet in a batch `likelier` times
    as often as under a uniform shuffle; both are means over pools, for blocks of one size.
    """

    n_samples: int
    pool_samples: int
    pool_blocks: int
    likelier: float

    def __str__(self) -> str:
        if self.pool_samples == self.n_samples:
            return f"block shuffle: all {self.n_samples:,} samples are mixed together, as by a uniform shuffle"
        return (
            f"block shuffle: {self.pool_samples:,} of {self.n_samples:,} samples "
            f"({self.pool_samples / self.n_samples:.2%}, {self.pool_blocks} blocks) are mixed at a time; two samples "
            f"of one block meet in a batch {self.likelier:.3g} times as often as under a uniform shuffle"
        )


def block_mixing(blocks: Rows, batch_size: int) -> Mixing:
    """Say how far the block shuffle over `blocks`, as `block_starts` gives them, is from a uniform one."""
    n_samples, n_blocks = int(blocks[-1]), len(blocks) - 1
    pools = np.concatenate([[0], np.cumsum([len(pool) for pool in _pools(np.arange(n_blocks), blocks)])])
    bounds = pools * n_samples // n_blocks
    # A pair of one block lies in a pool as likely as the block does.
    together = np.average(_meeting(bounds, batch_size), weights=np.diff(pools))
    uniform = _meeting(np.array([0, n_samples]), batch_size)[0]
    return Mixing(
        n_samples=n_samples,
        pool_samples=round(n_samples / (len(pools) - 1)),
        pool_blocks=round(n_blocks / (len(pools) - 1)),
        likelier=float(together / uniform) if uniform else 1.0,  # in batches of one, no two ever meet
    )


def _meeting(bounds: Rows, batch_size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The probability that two samples of a pool, at random places between its bounds, are in one batch: (pool,)."""
    cuts = np.union1d(bounds, np.arange(0, bounds[-1], batch_size))
    pieces = np.diff(cuts)
    pairs = np.bincount(np.searchsorted(bounds, cuts[:-1], side="right") - 1, pieces * (pieces - 1.0))
    sizes = np.diff(bounds)
    return pairs / np.maximum(sizes * (sizes - 1.0), 1)


def _pools(order: Rows, blocks: Rows) -> list[Rows]:
    """Blocks in an order, as pools of nearly the same number of them."""
    largest = max(MIN_POOL_BLOCKS, POOL_SAMPLES // int(np.diff(blocks).max()))
    return np.array_split(order, -(-len(order) // largest))


def _block_order(blocks: Rows, rng: np.random.Generator) -> Rows:
    order = np.empty(blocks[-1], np.int64)
    start = 0
    for pool in _pools(rng.permutation(len(blocks) - 1), blocks):
        samples = _concatenated(blocks[pool], blocks[pool + 1])
        rng.shuffle(samples)
        order[start : start + len(samples)] = samples
        start += len(samples)
    return order


def _concatenated(starts: Rows, stops: Rows) -> Rows:
    """The numbers of several ranges, one range after the other."""
    sizes = stops - starts
    ends = np.cumsum(sizes)
    numbers: Rows = np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)
    return numbers
