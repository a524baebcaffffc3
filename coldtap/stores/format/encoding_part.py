"""The recipe's third part: how numbers are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.fields import MAX_BLOCK_ROWS, Fields, refused_as
from coldtap.stores.format.tiers import LAYOUTS, TIERS, Layout, TierName

KNOWN = ("gathers", "tier", "scales", "layout", "block_rows", "from")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingPart:
    """What is kept of the taps, and how.

    Attributes:
        gathers: tap indices per gather; for `sum` the k at which z0 + … + zk is kept.
        tier: how numbers are kept.
        scales: the rule that fixes the scales (`tiers.scales_rule`).
        layout: `compact` where codes are compressed.
        block_rows: S, rows per block.
        origin: in a converted store what it had lost before, as `from` in JSON; left out where it is None.
        others: fields that this coldtap does not know.
    """

    gathers: Mapping[str, tuple[int, ...]]
    tier: TierName
    scales: Mapping[str, Any]
    layout: Layout
    block_rows: int
    origin: Mapping[str, Any] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the part as JSON: equal to what was parsed."""
        return {
            "gathers": {name: list(taps) for name, taps in self.gathers.items()},
            "tier": self.tier,
            "scales": self.scales,
            "layout": self.layout,
            "block_rows": self.block_rows,
            **({} if self.origin is None else {"from": self.origin}),
            **self.others,
        }

    @classmethod
    def from_dict(cls, record: Any, *, where: str) -> "EncodingPart":
        """Parse what `to_dict` gave.

        Raises:
            CorruptStoreError: a field is missing or of another form, or names a tier or layout that is not known.
        """
        with refused_as(f"{where}: its recipe does not describe the arrays of a store"):
            fields = Fields("encoding", record)
            tier, layout = fields.text("tier"), fields.text("layout")
            if tier not in TIERS or layout not in LAYOUTS:
                raise CorruptStoreError(
                    f"{where}: tier {tier!r} in layout {layout!r}; this coldtap reads tiers {', '.join(TIERS)} in "
                    f"layouts {', '.join(LAYOUTS)}"
                )
            return cls(
                gathers=_gathers(fields.json("gathers")),
                tier=TIERS[tier].name,
                scales=fields.json("scales"),
                layout=layout,
                block_rows=fields.whole("block_rows", least=1, most=MAX_BLOCK_ROWS),
                origin=None if fields.lacks("from") else fields.json("from"),
                others=fields.others(*KNOWN),
            )


def _gathers(record: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    fields = Fields("encoding.gathers", record)
    gathers = {name: fields.wholes(name, least=0) for name in record}
    for name, taps in gathers.items():
        if len({*taps}) < len(taps):
            raise ValueError(f"encoding.gathers.{name}: a tap stands twice in {taps!s:.60}")
    return gathers
