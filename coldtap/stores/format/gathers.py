"""Gathers: how taps become the tensors that an array stores.

A gather decides which arrays there are, and the axes of their rows. What it computes from the taps of a backbone is in
`coldtap.pipeline.extract.gather`, by the same names.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from coldtap.errors import OptionError
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.tiers import Layout, Tier, TierName

type GatherName = Literal["layers", "sum", "pooled"]
type Shape = tuple[int, ...]


class Gather:
    """Taps of one geometry together in one array, each whole: (tap, token, channel) per row.

    Attributes:
        has_tap_axis: a row has one; without it an array is of one tap.
        chunk_per_tap: each tap of a row is a chunk of its own; else the row is one chunk.
        takes_sums: its taps are the k of z0 + … + zk: the user chooses them by `sum_at`, and they need one geometry.
        has_patch_mean: the last token is the mean of the patch tokens; the grid is gone.
    """

    has_tap_axis = True
    chunk_per_tap = False
    takes_sums = False
    has_patch_mean = False

    def tokens(self, geometry: Geometry) -> int:
        """Return how many tokens of each tap are kept."""
        return geometry.tokens

    def tier(self, tier: Tier) -> TierName:
        """Return the tier of its arrays in a store of the given tier."""
        return tier.name

    def layout(self, layout: Layout) -> Layout:
        """Return the layout of its arrays in a store of the given layout."""
        return layout

    def arrays(self, taps: Sequence[int], geometries: Mapping[int, Geometry]) -> list[tuple[Geometry, Shape]]:
        """Return the geometry and the taps of each array that holds the given taps."""
        together: dict[Geometry, list[int]] = {}
        for tap in taps:
            together.setdefault(geometries[tap], []).append(tap)
        return [(geometry, tuple(members)) for geometry, members in together.items()]

    def suffix(self, taps: Shape) -> str:
        """Return what follows the geometry in an array's name."""
        return "" if self.has_tap_axis else f"/{taps[0]}"

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Axis names of an array, as its `dimension_names`."""
        return ("row", "tap", "token", "channel") if self.has_tap_axis else ("row", "token", "channel")

    def row_shape(self, geometry: Geometry, n_taps: int) -> Shape:
        """Return the shape of one row: (tap, token, channel), or (token, channel) without a tap axis."""
        shape = (self.tokens(geometry), geometry.channels)
        return (n_taps, *shape) if self.has_tap_axis else shape

    def chunks_per_row(self, n_taps: int) -> int:
        """Return how many chunks a row has."""
        return n_taps if self.chunk_per_tap else 1

    def chunk_shape(self, geometry: Geometry, n_taps: int) -> Shape:
        """Return the shape of one chunk: (1, ...) of an array's axes."""
        row = self.row_shape(geometry, n_taps)
        return (1, 1, *row[1:]) if self.chunk_per_tap else (1, *row)


class _Layers(Gather):
    """Each tap as it is."""

    chunk_per_tap = True


class _Sum(Gather):
    """The running sum z0 + … + zk, an array for each k."""

    has_tap_axis = False
    takes_sums = True

    def arrays(self, taps: Sequence[int], geometries: Mapping[int, Geometry]) -> list[tuple[Geometry, Shape]]:
        """Return an array for each k.

        Raises:
            OptionError: the taps are of several geometries.
        """
        if (n_geometries := len(set(geometries.values()))) > 1:
            raise OptionError(
                f"`gather='sum'` needs taps of one geometry; this backbone has {n_geometries} "
                "(a stage network): use `gather='layers'` or pooled"
            )
        return [(geometries[k], (k,)) for k in taps]


class _Pooled(Gather):
    """Prefix tokens and the mean of the patch tokens.

    It has a float tier in a store of codes: one scale per channel would have to serve prefix tokens and patch mean,
    whose spread differs by an order of magnitude, and it is a hundredth of the bytes.
    """

    has_patch_mean = True

    def tokens(self, geometry: Geometry) -> int:
        """Return the prefix tokens and the mean."""
        return geometry.prefix_tokens + 1

    def tier(self, tier: Tier) -> TierName:
        """Return the tier itself, or the float tier that stands in for codes."""
        return tier.tier_of_pooled

    def layout(self, layout: Layout) -> Layout:
        """Return `fast`: few bytes are not worth compressing."""
        return "fast"


GATHERS: Mapping[GatherName, Gather] = {"layers": _Layers(), "sum": _Sum(), "pooled": _Pooled()}
