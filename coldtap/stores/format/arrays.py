"""What arrays a store has: shapes, chunks and blocks.

Taps of one geometry live in one array. All arrays of a store are cut at the same rows: S rows a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from coldtap.errors import OptionError
from coldtap.stores.format.gathers import GATHERS, Gather, GatherName
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.tiers import TIERS, Layout, Tier, TierName

MAX_BLOCK_ROWS = 512
MAX_BLOCK_BYTES = 256_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array of a store: which taps of which geometry, gathered how, kept in which tier and layout."""

    gather: GatherName
    geometry: Geometry
    taps: tuple[int, ...]
    tier: TierName
    layout: Layout
    block_rows: int

    @property
    def gathered_as(self) -> Gather:
        """What its gather is."""
        return GATHERS[self.gather]

    @property
    def kept_as(self) -> Tier:
        """What its tier is."""
        return TIERS[self.tier]

    @property
    def name(self) -> str:
        """The array's path in `features.zarr`."""
        return f"{self.gather}/{self.geometry.name}{self.gathered_as.suffix(self.taps)}"

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Axis names, as the array's `dimension_names`."""
        return self.gathered_as.dimensions

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: (tap, token, channel); (token, channel) for `sum`."""
        return self.gathered_as.row_shape(self.geometry, len(self.taps))

    @property
    def chunks_per_row(self) -> int:
        """A row is one chunk per tap in `layers`, one chunk in `sum` and `pooled`."""
        return self.gathered_as.chunks_per_row(len(self.taps))

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of one chunk."""
        return self.gathered_as.chunk_shape(self.geometry, len(self.taps))

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of one shard: the rows of one block."""
        return (self.block_rows, *self.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return np.dtype(self.kept_as.dtype)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's values, before compression and without its checksum."""
        return prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row's values, before compression and without checksums and index."""
        return prod(self.row_shape) * self.dtype.itemsize

    def shard_key(self, block: int) -> str:
        """Return the shard's path in `features.zarr` (Zarr v3, default chunk key encoding)."""
        return f"{self.name}/c/{block}" + "/0" * len(self.row_shape)


def choose_block_rows(bytes_per_row: int) -> int:
    """S: the largest power of two up to 512 that keeps a block at or below 256 MB."""
    rows = MAX_BLOCK_ROWS
    while rows > 1 and rows * bytes_per_row > MAX_BLOCK_BYTES:
        rows //= 2
    return rows


def calibration_rows(specs: Sequence[ArraySpec]) -> int:
    """Return the number of rows that fix the scales of a store."""
    return max(spec.kept_as.calibration_rows for spec in specs)


def plan_arrays(
    geometries: Mapping[int, Geometry], gathers: Mapping[str, Sequence[int]], tier: TierName, layout: Layout = "fast"
) -> tuple[ArraySpec, ...]:
    """Return the arrays that hold the given gathers.

    Args:
        geometries: the geometry of every tap of the backbone.
        gathers: tap indices per gather; for `sum` the k at which z0 + … + zk is kept.
        tier: how numbers are kept.
        layout: whether codes are compressed.

    Raises:
        OptionError: a sum over taps of several geometries, or `compact` for another tier than int8.
    """
    if layout not in TIERS[tier].layouts:
        raise OptionError(
            f"`{layout=}` with `{tier=}`: lossless compression buys 7 to 16 % of float features; "
            "give `tier='int8'`, or `layout='fast'`"
        )

    def specs(block_rows: int) -> tuple[ArraySpec, ...]:
        return tuple(
            ArraySpec(
                gather=name,
                geometry=geometry,
                taps=taps,
                tier=gather.tier(TIERS[tier]),
                layout=gather.layout(layout),
                block_rows=block_rows,
            )
            for name, gather in GATHERS.items()
            if name in gathers
            for geometry, taps in gather.arrays(gathers[name], geometries)
        )

    return specs(choose_block_rows(sum(spec.bytes_per_row for spec in specs(1))))
