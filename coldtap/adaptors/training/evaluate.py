"""A finished run on a split of a store: of the one that it was trained on, or of another of the same backbone.

An adaptor learns features as they come out of its compensation, which are near to float ones. So a run's own map goes
before features of its own extractor alone; those of another arithmetic need that of their own store, or none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.data.compensated import maps_of
from coldtap.adaptors.runs.load import LoadedRun, load_run
from coldtap.adaptors.runs.record import RunInfo, SplitMetrics
from coldtap.adaptors.training.plan import batches_for
from coldtap.adaptors.training.split_metrics import evaluate_split
from coldtap.device import choose_device
from coldtap.errors import MissingFeaturesError, StoreError
from coldtap.stores import Store, open_store
from coldtap.stores.format.compensation import TapMaps
from coldtap.stores.format.recipe import differing_fields
from coldtap.stores.format.same_backbone import differences_beyond_arithmetic
from coldtap.stores.storage.address import Place, place_of, storage_at
from coldtap.stores.storage.contract import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How well a run does on a split of a store.

    `metric` names the deciding score; `compensation` says whose map features went through: `the run's`, the name of
    one of the store's, or None; `differences` are the fields in which the two extractors differ, as `field: run →
    store`.
    """

    run: Path | Storage
    store: Path | Storage
    split: str
    metric: str
    metrics: SplitMetrics
    compensation: str | None
    differences: tuple[str, ...]


def evaluate_adaptor(
    run: Place,
    store: Store | Place,
    *,
    split: str = "test",
    compensation: str | None = None,
    across_quantisation: bool = False,
    adaptor: str | None = None,
    device: str = "auto",
    note: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluate a finished run on a split of a store; nothing is written.

    Args:
        run: The run folder, or its storage.
        store: A store, its path or its storage, with the targets that the run has learnt.
        split: Name of the split.
        compensation: Name of the store's compensation that features go through. Without it, features of the run's own
            extractor go through the map that the run carries, if it has one.
        across_quantisation: Whether the store's extractor may differ from the run's in quantisation and precision.
        adaptor: The run's adaptor where it is none of coldtap's own, as `module:NAME`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        note: Told where the two extractors differ.

    Raises:
        RunError: The run cannot be read.
        StoreError: The store is of another extractor or has other classes, or lacks the features, targets or
            compensation.
        SourceError: The store has no samples of the split.
        OptionError: No such device.
        MachineError: No such GPU.
    """
    loaded = load_run(run, adaptor=adaptor)
    store = store if isinstance(store, Store) else open_store(store)
    where = storage_at(run)
    differences = _differences(where, loaded.info, store, across_quantisation)
    if differences and note is not None:
        note(f"{store.storage} is of another arithmetic than {run}: {'; '.join(differences)}")
    _require_features(where, loaded.info, store)
    maps, whose = _maps(loaded, store, compensation, same_extractor=not differences)
    batches = batches_for(
        store,
        loaded.info.features,
        loaded.info.settings,
        split,
        device=choose_device(device),
        resident=False,
        maps=maps,
    )
    return Evaluation(
        run=place_of(where),
        store=place_of(store.storage),
        split=split,
        metric=loaded.info.metric,
        metrics=_metrics(loaded, batches),
        compensation=whose,
        differences=tuple(differences),
    )


def _differences(run: Storage, info: RunInfo, store: Store, across_quantisation: bool) -> list[str]:
    """The fields of arithmetic in which the two extractors differ.

    Raises:
        StoreError: They differ in others, or in these without leave.
    """
    extractor = store.recipe.extractor.to_dict()
    if others := differences_beyond_arithmetic(info.extractor, extractor):
        raise StoreError(
            f"{store.storage} is of another extractor than {run} was trained on: {'; '.join(others)}: give a store of "
            "the same one"
        )
    fields = differing_fields(info.extractor, extractor)
    if fields and not across_quantisation:
        raise StoreError(
            f"{store.storage} is of another extractor than {run} was trained on: {'; '.join(fields)}: with "
            "`across_quantisation=True` the run is evaluated all the same"
        )
    return fields


def _require_features(run: Storage, info: RunInfo, store: Store) -> None:
    """Refuse a store that lacks what the run reads, or whose targets mean something else."""
    features, target = info.features, info.settings.target
    array = store.arrays.get(features.array)
    if array is None or not {*features.taps} <= {*array.taps}:
        raise MissingFeaturesError(
            f"{run} reads {features.array} of taps {list(features.taps)}; {store.storage} does not hold them: cache "
            f"again with `gather={features.gather!r}`"
        )
    if (kind := store.target_kind(target)) != info.target_kind:
        raise StoreError(f"{store.storage} has targets {target!r} of kind {kind}; {run} has learnt {info.target_kind}")
    names, n_classes = store.class_names(target), store.n_classes(target)
    if names is not None and info.class_names is not None and names != info.class_names:
        raise StoreError(f"{store.storage} has other classes of {target!r} than {run} has learnt, or in another order")
    if n_classes > info.n_classes:
        raise StoreError(f"{store.storage} has {n_classes} classes of {target!r}; {run} has learnt {info.n_classes}")
    grid = store.target_grid(target)
    if grid is not None and tuple(grid) != features.geometry.grid:
        raise StoreError(f"{store.storage} has targets {target!r} on another grid than {run} answers on")


def _maps(
    loaded: LoadedRun, store: Store, compensation: str | None, *, same_extractor: bool
) -> tuple[TapMaps | None, str | None]:
    """The map that goes before the adaptor, and whose it is."""
    if compensation is not None:
        return maps_of(store, loaded.info.features, compensation), compensation
    if loaded.maps is not None and same_extractor:
        return loaded.maps, "the run's"
    return None, None


def _metrics(loaded: LoadedRun, batches: FeatureBatches) -> SplitMetrics:
    adaptor = loaded.adaptor.to(batches.device)

    def logits(features: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return adaptor(features)[None]  # type: ignore[no-any-return]

    return evaluate_split(logits, batches, n_trials=1, n_classes=loaded.info.n_classes)[0].metrics
