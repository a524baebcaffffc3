"""The choice of tier, layout and bound, and what the recipe says of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coldtap.errors import OptionError
from coldtap.stores.format.arrays import ArraySpec, calibration_rows
from coldtap.stores.format.codes import ErrorBound
from coldtap.stores.format.encoding_part import EncodingPart
from coldtap.stores.format.tiers import LAYOUTS, TIERS, Layout, TierName, scales_rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How all numbers of a store are kept; `bound` is that of int8, None for other tiers."""

    tier: TierName
    layout: Layout
    bound: ErrorBound | None

    @classmethod
    def choose(cls, tier: TierName, layout: Layout | None, bound: ErrorBound | None) -> "Encoding":
        """Check what the user asks, and fill in what is left open.

        Raises:
            OptionError: an unknown tier or layout, or a bound for a tier that has none.
        """
        if tier not in TIERS:
            raise OptionError(f"`{tier=}`: choose one of {', '.join(TIERS)}")
        kept_as = TIERS[tier]
        if bound is not None and not kept_as.is_coded:
            raise OptionError(f"`snr` and `max_error` bound the errors of `tier='int8'`; `{tier=}` was asked for")
        if layout is not None and layout not in LAYOUTS:
            raise OptionError(f"`{layout=}`: choose one of {', '.join(LAYOUTS)}")
        return cls(tier=tier, layout=layout or kept_as.layouts[0], bound=kept_as.choose_bound(bound))

    def to_recipe(self, gathers: Mapping[str, Sequence[int]], specs: Sequence[ArraySpec]) -> EncodingPart:
        """Return the encoding part of a recipe, for the arrays that hold these gathers."""
        return EncodingPart(
            gathers={name: tuple(taps) for name, taps in gathers.items()},
            tier=self.tier,
            scales=scales_rule(self.bound, calibration_rows(specs)),
            layout=self.layout,
            block_rows=specs[0].block_rows,
        )
