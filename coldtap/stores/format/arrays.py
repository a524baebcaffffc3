"""What arrays a store has: geometries of taps, gathers, shapes, chunks and blocks.

A geometry is what taps share (grid, prefix tokens, channels); taps of one geometry live in one array. A
gather says how taps become stored tensors. All arrays of a store are cut at the same rows: S rows a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, get_args

import numpy as np

from coldtap.errors import CorruptStoreError, OptionError

type Gather = Literal["layers", "sum", "pooled"]
GATHERS: tuple[Gather, ...] = ("layers", "sum", "pooled")

type Tier = Literal["float32", "float16", "bfloat16", "int8"]
TIERS: tuple[Tier, ...] = get_args(Tier.__value__)
STORED_DTYPE: Mapping[str, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}

type Layout = Literal["fast", "compact"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout.__value__)

MAX_BLOCK_ROWS = 512
MAX_BLOCK_BYTES = 256_000_000


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Geometry:
    """The shape that taps share: prefix tokens first, then the grid in row-major order, each of `channels`."""

    grid: tuple[int, int]
    prefix_tokens: int
    channels: int

    @property
    def tokens(self) -> int:
        """Tokens of one tap: prefix tokens and grid cells."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def name(self) -> str:
        """A path-safe name, such as `g8x8-p1-c192`."""
        return f"g{self.grid[0]}x{self.grid[1]}-p{self.prefix_tokens}-c{self.channels}"

    def to_dict(self) -> dict[str, Any]:
        """The geometry as JSON."""
        return {"grid": list(self.grid), "prefix_tokens": self.prefix_tokens, "channels": self.channels}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Geometry":
        """Parse what `to_dict` gave; a missing or unknown key is a TypeError."""
        return cls(**{**record, "grid": tuple(record["grid"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array of a store: which taps of which geometry, gathered how, kept in which tier and layout."""

    gather: Gather
    geometry: Geometry
    taps: tuple[int, ...]
    tier: Tier
    layout: Layout
    block_rows: int

    @property
    def name(self) -> str:
        """The array's path in `features.zarr`."""
        name = f"{self.gather}/{self.geometry.name}"
        return f"{name}/{self.taps[0]}" if self.gather == "sum" else name

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Axis names, as the array's `dimension_names`."""
        return ("row", "token", "channel") if self.gather == "sum" else ("row", "tap", "token", "channel")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: (tap, token, channel); (token, channel) for `sum`."""
        geometry = self.geometry
        if self.gather == "sum":
            return (geometry.tokens, geometry.channels)
        tokens = geometry.prefix_tokens + 1 if self.gather == "pooled" else geometry.tokens
        return (len(self.taps), tokens, geometry.channels)

    @property
    def chunks_per_row(self) -> int:
        """A row is one chunk a tap in `layers`, one chunk in `sum` and `pooled`."""
        return len(self.taps) if self.gather == "layers" else 1

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of one chunk."""
        return (1, 1, *self.row_shape[1:]) if self.gather == "layers" else (1, *self.row_shape)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of one shard: the rows of one block."""
        return (self.block_rows, *self.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype; bfloat16 is kept as its bits in uint16 (zarr 3.4 has no bfloat16)."""
        return np.dtype(STORED_DTYPE[self.tier])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's values, before compression and without its checksum."""
        return prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row's values, before compression and without checksums and index."""
        return prod(self.row_shape) * self.dtype.itemsize

    def shard_key(self, block: int) -> str:
        """The shard's path in `features.zarr` (Zarr v3, default chunk key encoding)."""
        return f"{self.name}/c/{block}" + "/0" * len(self.row_shape)


def choose_block_rows(bytes_per_row: int) -> int:
    """S: the largest power of two up to 512 that keeps a block at or below 256 MB."""
    rows = MAX_BLOCK_ROWS
    while rows > 1 and rows * bytes_per_row > MAX_BLOCK_BYTES:
        rows //= 2
    return rows


def plan_arrays(
    geometries: Mapping[int, Geometry], gathers: Mapping[str, Sequence[int]], tier: Tier, layout: Layout = "fast"
) -> tuple[ArraySpec, ...]:
    """The arrays that hold the given gathers.

    `pooled` stays in float16 in an int8 store: one scale a channel would have to serve prefix tokens and patch mean,
    whose spread differs by an order of magnitude, and it is a hundredth of the bytes.

    Args:
        geometries: the geometry of every tap of the backbone.
        gathers: tap indices a gather; for `sum` the k at which z0 + … + zk is kept.
        tier: how numbers are kept.
        layout: whether codes are compressed.

    Raises:
        OptionError: a sum over taps of several geometries, or `compact` for another tier than int8.
    """
    if layout == "compact" and tier != "int8":
        raise OptionError(
            f"--layout compact with --tier {tier}: lossless compression buys 7 to 16 % of float features; "
            "give --tier int8, or --layout fast"
        )

    def specs(block_rows: int) -> tuple[ArraySpec, ...]:
        return tuple(
            ArraySpec(
                gather=gather,
                geometry=geometry,
                taps=taps,
                tier="float16" if tier == "int8" and gather == "pooled" else tier,
                layout="fast" if gather == "pooled" else layout,
                block_rows=block_rows,
            )
            for gather in GATHERS
            if gather in gathers
            for geometry, taps in _arrays_of(gather, gathers[gather], geometries)
        )

    return specs(choose_block_rows(sum(spec.bytes_per_row for spec in specs(1))))


def _arrays_of(
    gather: Gather, taps: Sequence[int], geometries: Mapping[int, Geometry]
) -> list[tuple[Geometry, tuple[int, ...]]]:
    if gather == "sum":
        if len(set(geometries.values())) > 1:
            raise OptionError(
                f"--gather sum needs taps of one geometry; this backbone has {len(set(geometries.values()))} "
                "(a stage network): use --gather layers or pooled"
            )
        return [(geometries[k], (k,)) for k in taps]
    together: dict[Geometry, list[int]] = {}
    for tap in taps:
        together.setdefault(geometries[tap], []).append(tap)
    return [(geometry, tuple(members)) for geometry, members in together.items()]


def geometries_of_recipe(extractor: Mapping[str, Any]) -> dict[int, Geometry]:
    """The geometry of every tap of the backbone, as its recipe has it."""
    return {tap: _geometry(about) for tap, about in enumerate(extractor["taps"])}


def _geometry(about: Mapping[str, Any]) -> Geometry:
    height, width = about["grid"]
    _require_whole(height, width, about["channels"], least=1)
    _require_whole(about["prefix_tokens"], least=0)
    return Geometry(grid=(height, width), prefix_tokens=about["prefix_tokens"], channels=about["channels"])


def _require_whole(*numbers: Any, least: int) -> None:
    if not all(type(number) is int and number >= least for number in numbers):
        raise ValueError(f"{numbers} are not whole numbers from {least}")


def arrays_of_recipe(extractor: Mapping[str, Any], encoding: Mapping[str, Any], *, where: str) -> tuple[ArraySpec, ...]:
    """The arrays that a recipe asks for.

    Raises:
        CorruptStoreError: a field is missing or not of its form, or names a tier or layout that is not known.
    """
    try:
        tier, layout = encoding["tier"], encoding["layout"]
        if tier not in TIERS or layout not in LAYOUTS:
            raise CorruptStoreError(
                f"{where}: tier {tier!r} in layout {layout!r}; this coldtap reads tiers {', '.join(TIERS)} in layouts "
                f"{', '.join(LAYOUTS)}"
            )
        geometries = geometries_of_recipe(extractor)
        gathers = {gather: tuple(taps) for gather, taps in encoding["gathers"].items()}
        for taps in gathers.values():
            _require_whole(*taps, least=0)
            if len({*taps}) < len(taps):
                raise ValueError(f"a tap stands twice in {taps}")
        _require_whole(encoding["block_rows"], least=1)
        specs = plan_arrays(geometries, gathers, tier, layout)
        return tuple(replace(spec, block_rows=encoding["block_rows"]) for spec in specs)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OptionError) as error:
        raise CorruptStoreError(f"{where}: its recipe does not describe the arrays of a store ({error!r})") from error
