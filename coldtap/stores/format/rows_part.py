"""The recipe's second part: which images stand where."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coldtap.stores.format.fields import MAX_VIEWS, Fields, refused_as
from coldtap.stores.format.rows import SPLITS

OPTIONAL = ("val", "order", "seed", "augmentation")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsPart:
    """Which samples a store has, and in which order.

    Attributes:
        listing: fingerprint of the source's listing.
        splits: planned samples per split.
        val: `given`, or `cut from train`.
        order: SHA-256 over the samples in row order.
        seed: of the order, of the cut and of augmentation.
        views: augmented views of each training sample, beside view 0.
        augmentation: how they are drawn; None without views.
        others: fields that this coldtap does not know.
        lacks: names of the fields that the recipe does not have; they are None here, and stay away from its JSON.
    """

    listing: str
    splits: Mapping[str, int]
    val: str | None
    order: str | None
    seed: int | None
    views: int
    augmentation: Mapping[str, Any] | None
    others: Mapping[str, Any] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()

    @property
    def n_samples(self) -> int:
        """Planned samples of all splits."""
        return sum(self.splits.values())

    def n_blocks(self, block_rows: int) -> int:
        """Return how many blocks of so many rows the plan has."""
        blocks = {split: -(-n // block_rows) for split, n in self.splits.items()}
        return sum(blocks.values()) + self.views * blocks.get("train", 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the part as JSON: equal to what was parsed."""
        fields = {
            "listing": self.listing,
            "splits": dict(self.splits),
            "val": self.val,
            "order": self.order,
            "seed": self.seed,
            "views": self.views,
            "augmentation": self.augmentation,
        }
        return {**{name: value for name, value in fields.items() if name not in self.lacks}, **self.others}

    @classmethod
    def from_dict(cls, record: Any, *, where: str) -> "RowsPart":
        """Parse what `to_dict` gave.

        Raises:
            CorruptStoreError: a field is missing or of another form.
        """
        with refused_as(f"{where}: its recipe does not describe the rows of a store"):
            fields = Fields("rows", record)
            lacks = fields.lacks(*OPTIONAL)
            return cls(
                listing=fields.text("listing"),
                splits=_splits(fields.json("splits")),
                val=None if "val" in lacks else fields.text("val"),
                order=None if "order" in lacks else fields.text("order"),
                seed=None if "seed" in lacks else fields.number("seed"),
                views=fields.whole("views", least=0, most=MAX_VIEWS),
                augmentation=None if "augmentation" in lacks else fields.json_or_null("augmentation"),
                others=fields.others("listing", "splits", "views", *OPTIONAL),
                lacks=lacks,
            )


def _splits(record: Mapping[str, Any]) -> Mapping[str, int]:
    if not record or not {*record} <= {*SPLITS}:
        raise ValueError(f"rows.splits are {sorted(record)}, not some of {', '.join(SPLITS)}")
    fields = Fields("rows.splits", record)
    return {split: fields.whole(split, least=1) for split in record}
