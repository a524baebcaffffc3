"""The plan of a job: from what the user asks to a recipe, the arrays and the rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coldtap.errors import OptionError
from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.pipeline.images.preprocess import Augmentation
from coldtap.pipeline.images.sources import Source
from coldtap.pipeline.plan.tap_choice import choose_gathers
from coldtap.stores.format.arrays import ArraySpec, plan_arrays
from coldtap.stores.format.codes import ErrorBound
from coldtap.stores.format.encoding import Encoding
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import SPLITS, RowPlan
from coldtap.stores.format.rows_part import RowsPart
from coldtap.stores.format.targets import targets_bytes
from coldtap.stores.format.tiers import Layout, TierName
from coldtap.stores.format.types import TargetKind


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """All that is decided before an image is read."""

    source: Source
    backbone: Backbone
    augmentation: Augmentation
    seed: int
    specs: tuple[ArraySpec, ...]
    rows: RowPlan
    recipe: Recipe
    bound: ErrorBound | None

    def targets(self) -> dict[str, bytes]:
        """The targets' tables by name, as Parquet bytes; none for a source without labels."""
        listing = self.source.listing
        values: Sequence[Any] | None = listing.targets if listing.label_sets is None else listing.label_sets
        if values is None:
            return {}
        kind: TargetKind = "class" if listing.label_sets is None else "labels"
        samples = [sample for order in self.rows.order.values() for sample in order]
        ids, targets = [listing.ids[sample] for sample in samples], [values[sample] for sample in samples]
        n_classes = None
        if kind == "labels" and not listing.class_names:
            # Counted over the whole source: a split that is left out may have the highest.
            n_classes = 1 + max(label for labels in values for label in labels)
        return {
            "label": targets_bytes(
                ids, targets, listing.class_names, kind=kind, n_classes=n_classes, order=self.recipe.rows.order
            )
        }


def plan_job(
    source: Source,
    backbone: Backbone,
    *,
    splits: Sequence[str],
    taps: str,
    gather: Sequence[str] | None,
    sum_at: str | None,
    tier: TierName,
    layout: Layout | None,
    bound: ErrorBound | None,
    split: Sequence[str] | None,
    views: int,
    augmentation: Augmentation | None,
    seed: int,
) -> JobPlan:
    """Plan a job; the arguments are those of `cache_features`, and the split of each sample.

    Raises:
        OptionError: a choice that the source or the backbone does not allow.
        ModelError: a tap that the backbone does not have.
    """
    encoding = Encoding.choose(tier, layout, bound)
    if views < 0:
        raise OptionError(f"--views {views}: give 0 or more augmented views of each training image")
    gather = [gather] if isinstance(gather, str) else gather
    split = [split] if isinstance(split, str) else split
    if unknown := sorted(set(split or ()) - set(SPLITS)):
        raise OptionError(f"--split {unknown[0]}: choose among {', '.join(SPLITS)}")
    # One stream of tokens that every block adds to: without it a sum of taps means nothing.
    one_stream = not backbone.taps.stages and len(set(backbone.geometries.values())) == 1
    gathers = choose_gathers(gather, taps, sum_at, depth=backbone.depth, one_stream=one_stream)
    specs = plan_arrays(backbone.geometries, gathers, encoding.tier, encoding.layout)
    listing = source.listing
    present = set(splits)
    rows = RowPlan.of(
        listing.ids,
        splits,
        keep=[name for name in SPLITS if name in (split or present)],
        views=views,
        seed=seed,
        block_rows=specs[0].block_rows,
    )
    drawn = augmentation or Augmentation()
    recipe = Recipe(
        extractor=backbone.extractor(),
        rows=RowsPart(
            listing=listing.fingerprint,
            splits={name: len(samples) for name, samples in rows.order.items()},
            val="cut from train" if source.listing.val_is_cut else "given",
            order=rows.order_digest(listing.ids),
            seed=seed,
            views=views,
            augmentation=drawn.to_dict() if views else None,
        ),
        encoding=encoding.to_recipe(gathers, specs),
    )
    return JobPlan(
        source=source,
        backbone=backbone,
        augmentation=drawn,
        seed=seed,
        specs=specs,
        rows=rows,
        recipe=recipe,
        bound=encoding.bound,
    )
