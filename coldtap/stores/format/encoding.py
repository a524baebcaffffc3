"""The choice of tier, layout and bound, and what the recipe says of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldtap.errors import OptionError
from coldtap.stores.format.arrays import LAYOUTS, TIERS, ArraySpec, Layout, Tier
from coldtap.stores.format.codes import DEFAULT_SNR_DB, ErrorBound
from coldtap.stores.format.tiers import scales_rule
from coldtap.stores.writing.calibration import calibration_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How all numbers of a store are kept; `bound` is that of int8, None for other tiers."""

    tier: Tier
    layout: Layout
    bound: ErrorBound | None

    @classmethod
    def choose(cls, tier: Tier, layout: Layout | None, bound: ErrorBound | None) -> "Encoding":
        """Check what the user asks, and fill in what is left open.

        Raises:
            OptionError: an unknown tier or layout, or a bound for a tier that has none.
        """
        if tier not in TIERS:
            raise OptionError(f"--tier {tier}: choose one of {', '.join(TIERS)}")
        if bound is not None and tier != "int8":
            raise OptionError(f"--snr and --max-error bound the errors of --tier int8; --tier {tier} was asked for")
        if layout is not None and layout not in LAYOUTS:
            raise OptionError(f"--layout {layout}: choose one of {', '.join(LAYOUTS)}")
        if tier == "int8":
            return cls(tier=tier, layout=layout or "compact", bound=bound or ErrorBound(snr_db=DEFAULT_SNR_DB))
        return cls(tier=tier, layout=layout or "fast", bound=None)

    def to_recipe(self, gathers: Mapping[str, Sequence[int]], specs: Sequence[ArraySpec]) -> dict[str, Any]:
        """The encoding part of a recipe, for the arrays that hold these gathers."""
        return {
            "gathers": {name: list(taps) for name, taps in gathers.items()},
            "tier": self.tier,
            "scales": scales_rule(self.bound, calibration_rows(specs)),
            "layout": self.layout,
            "block_rows": specs[0].block_rows,
        }
