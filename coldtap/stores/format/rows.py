"""Rows are numbered before the run: splits and views in blocks, samples in a seeded order.

Blocks never cross a (split, view). Inside a split the samples follow one seeded shuffle, so that the first
blocks are class-mixed. The last block of a (split, view) is padded with absent rows.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coldtap.errors import OptionError
from coldtap.stores.format.canonical import sha256

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One (sample, view), at its place in the store; `sample` is the index in the source's listing."""

    number: int
    sample: int
    split: str
    view: int


@dataclass(frozen=True, slots=True)
class Segment:
    """The run of blocks of one (split, view).

    Attributes:
        split, view: what its rows are.
        first_block: number of its first block.
        first_sample: number of its first sample, counted over the splits in order.
        n_samples: planned rows; the rest of its last block is padding.
    """

    split: str
    view: int
    first_block: int
    first_sample: int
    n_samples: int


def segments_of(splits: Mapping[str, int], views: int, block_rows: int) -> tuple[Segment, ...]:
    """Return every (split, view) in row order: view 0 of each split, then the other views of train.

    Args:
        splits: planned samples a split.
        views: augmented views of each training sample.
        block_rows: S.
    """
    found, block = [], 0
    for view in range(views + 1 if "train" in splits else 1):
        first_sample = 0
        for split in (split for split in SPLITS if split in splits):
            if view == 0 or split == "train":
                found.append(Segment(split, view, block, first_sample, splits[split]))
                block += -(-splits[split] // block_rows)
            first_sample += splits[split]
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Where each (sample, view) of a listing stands.

    `order` holds, a split, the samples' indices in row order; train alone has views beyond view 0.
    """

    order: Mapping[str, Sequence[int]]
    views: int
    block_rows: int

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        splits: Sequence[str],
        *,
        keep: Sequence[str],
        views: int,
        seed: int,
        block_rows: int,
    ) -> "RowPlan":
        """Plan the rows of the samples whose split is kept.

        The order inside a split sorts by SHA-256 of (seed, sample id): it depends on no library's random
        numbers, and a sample added later does not move the others past each other.

        Raises:
            OptionError: a split that no sample has.
        """
        members: dict[str, list[int]] = {split: [] for split in SPLITS if split in keep}
        for sample, split in enumerate(splits):
            if split in members:
                members[split].append(sample)
        for split, samples in members.items():
            if not samples:
                raise OptionError(f"`{split=}`: the source has no {split} images, only {sorted(set(splits))}")
            samples.sort(key=lambda sample: sha256(f"{seed}\n{ids[sample]}".encode()))
        return cls(
            order={split: tuple(samples) for split, samples in members.items()},
            views=views,
            block_rows=block_rows,
        )

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The runs of blocks in row order."""
        return segments_of({split: len(samples) for split, samples in self.order.items()}, self.views, self.block_rows)

    @cached_property
    def n_blocks(self) -> int:
        """Blocks of the store."""
        return sum(-(-segment.n_samples // self.block_rows) for segment in self.segments)

    @property
    def n_rows(self) -> int:
        """Rows of every array, absent ones included: a multiple of S."""
        return self.n_blocks * self.block_rows

    @cached_property
    def n_planned(self) -> int:
        """Rows that stand for a (sample, view): all but the padding."""
        return sum(segment.n_samples for segment in self.segments)

    @property
    def n_samples(self) -> int:
        """Samples in the plan, each counted once whatever its views."""
        return sum(len(samples) for samples in self.order.values())

    def order_digest(self, ids: Sequence[str]) -> str:
        """SHA-256 over the split and id of each sample in row order: which sample stands where."""
        digest = hashlib.sha256()
        for split, samples in self.order.items():
            for sample in samples:
                digest.update(f"{split}\n{ids[sample]}\n".encode())
        return digest.hexdigest()

    def block(self, number: int) -> list[Row]:
        """Return the planned rows of a block; its padding has none."""
        segment = next(segment for segment in reversed(self.segments) if segment.first_block <= number)
        start = (number - segment.first_block) * self.block_rows
        samples = self.order[segment.split][start : start + self.block_rows]
        base = number * self.block_rows
        return [Row(number=base + i, sample=s, split=segment.split, view=segment.view) for i, s in enumerate(samples)]

    def first_rows(self, n_rows: int) -> list[Row]:
        """Return the first rows of the first (split, view), as many as there are up to `n_rows`."""
        first = self.segments[0]
        n_blocks = -(-min(n_rows, first.n_samples) // self.block_rows)
        return [row for number in range(n_blocks) for row in self.block(number)][:n_rows]

    def __iter__(self) -> Iterator[Row]:
        """Every planned row in order."""
        for number in range(self.n_blocks):
            yield from self.block(number)
