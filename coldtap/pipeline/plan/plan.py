"""The plan of a job: from what the user asks to a recipe, the arrays and the rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coldtap.pipeline.images.decode_ahead import Decoder
from coldtap.pipeline.images.sources import Source
from coldtap.pipeline.plan.backbone_description import BackboneDescription
from coldtap.pipeline.plan.options import EncodingOptions, RowOptions
from coldtap.pipeline.plan.tap_choice import choose_gathers
from coldtap.stores.format.arrays import ArraySpec, plan_arrays
from coldtap.stores.format.codes import ErrorBound
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.targets import targets_bytes
from coldtap.stores.format.types import TargetKind


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """All that is decided before an image is read."""

    source: Source
    backbone: BackboneDescription
    options: RowOptions
    specs: tuple[ArraySpec, ...]
    rows: RowPlan
    recipe: Recipe
    bound: ErrorBound | None

    def decoder(self, batch_size: int, n_threads: int) -> Decoder:
        """Return what decodes the job's images, in threads of its own."""
        return Decoder(
            source=self.source,
            preprocess=self.backbone.preprocess,
            augmentation=self.options.augmentation,
            seed=self.options.seed,
            batch_size=batch_size,
            n_threads=n_threads,
        )

    def targets(self) -> dict[str, bytes]:
        """Return the targets' tables by name, as Parquet bytes; none for a source without labels."""
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
    backbone: BackboneDescription,
    *,
    splits: Sequence[str],
    rows: RowOptions,
    encoding: EncodingOptions,
) -> JobPlan:
    """Plan a job, given the split of each sample.

    Raises:
        OptionError: a choice that the source or the backbone does not allow.
        ModelError: a tap that the backbone does not have.
    """
    chosen = encoding.choose()
    gathers = choose_gathers(
        encoding.gather, encoding.taps, encoding.sum_at, depth=backbone.depth, one_stream=backbone.one_stream
    )
    specs = plan_arrays(backbone.geometries, gathers, chosen.tier, chosen.layout)
    row_plan = rows.plan(source.listing, splits, specs[0].block_rows)
    recipe = Recipe(
        extractor=backbone.extractor(),
        rows=rows.to_recipe(source.listing, row_plan),
        encoding=chosen.to_recipe(gathers, specs),
    )
    return JobPlan(
        source=source,
        backbone=backbone,
        options=rows,
        specs=specs,
        rows=row_plan,
        recipe=recipe,
        bound=chosen.bound,
    )
