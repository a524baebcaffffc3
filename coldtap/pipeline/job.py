"""The job: from a source of images to a complete store, resumable at every block."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coldtap.errors import OptionError
from coldtap.pipeline.cache_report import CacheReport
from coldtap.pipeline.images.preprocess import Augmentation, Preprocess
from coldtap.pipeline.images.sources import Listing, Source
from coldtap.pipeline.plan.backbone_description import BackboneDescription
from coldtap.pipeline.plan.description import JobDescription
from coldtap.pipeline.plan.options import EncodingOptions, ExtractorOptions, Precision, RowOptions, RunOptions
from coldtap.pipeline.plan.plan import JobPlan, plan_job
from coldtap.pipeline.plan.relabel import relabel
from coldtap.pipeline.run.environment import require_same_environment
from coldtap.pipeline.run.rejections import Rejections
from coldtap.stores.format.codes import ErrorBound
from coldtap.stores.format.tiers import Layout, TierName
from coldtap.stores.reading.manifest_files import is_complete
from coldtap.stores.reading.store import open_store
from coldtap.stores.storage.address import Place, place_of, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.writing.job import Ended, Found, write_store
from coldtap.stores.writing.reporting import Reporter, Silence

if TYPE_CHECKING:
    from torch import nn

    from coldtap.pipeline.backbones.backbone import Backbone


def cache_features(
    source: Any,
    store: Place,
    *,
    model: "str | nn.Module | None" = None,
    checkpoint: str | Path | None = None,
    random_weights: bool = False,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    tap_names: Sequence[str] | None = None,
    prefix_tokens: int = 0,
    precision: Precision = "float32",
    device: str = "auto",
    taps: str = "all",
    gather: Sequence[str] | None = None,
    sum_at: str | None = None,
    tier: TierName = "float16",
    layout: Layout | None = None,
    snr: float | None = None,
    max_error: float | None = None,
    split: Sequence[str] | None = None,
    views: int = 0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    quantized: str | Path | None = None,
    kernel: str = "auto",
    batch_size: int | None = None,
    decode_threads: int | None = None,
    workers: int = 1,
    on_bad_image: Literal["reject", "fail"] = "reject",
    max_rejected: float = 0.01,
    allow_mixed: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> CacheReport:
    """Run a frozen backbone over a source once and keep its features in a store.

    Args:
        source: a path that `open_source` understands, a source, or any indexable of (image, target).
        store: where the store is, or will be: a path, or a storage. The same recipe goes on, or has nothing to do.
        model: a timm name, `coldtap/vit-reference` (the default), or any module; with `quantized` its own.
        checkpoint: local weights for a timm name.
        random_weights: no trained weights, for measurements.
        preprocess: overrides of the model's own configuration, or all of it.
        tap_names: submodules whose outputs are the taps, for a module that is no timm model.
        prefix_tokens: tokens before the grid in such outputs.
        precision: dtype of the backbone.
        device: auto, cpu, cuda or cuda:N.
        taps: `all`, `last:K`, or indices with commas: for `layers` and `pooled`.
        gather: `layers`, `sum`, `pooled`; None for all that the backbone allows.
        sum_at: k of the sums z0 + … + zk, with commas; None for the last tap.
        tier: how numbers are kept.
        layout: `compact` (zstd on the codes; the default of int8) or `fast` (as they are; of all others).
        snr: of int8, in dB in every channel; 30 where neither bound is given.
        max_error: of int8, the largest error of any value, in standard deviations of its channel.
        split: splits to keep; None for all that the source has.
        views: augmented views of each training image, beside view 0.
        augmentation: how they are drawn.
        seed: of the row order, of a val split cut from train, and of the views.
        quantized: an artefact of `quantize`, in place of weights, precision and preprocessing.
        kernel: of a quantised backbone: `auto`, `int` or `float`.
        batch_size: images per forward pass; None goes on as the store began, or chooses.
        decode_threads: of all workers together; None for one per core.
        workers: processes that do blocks; the bytes are those of one. More than one need a source and a model that
            can be pickled, and in a script a call below `if __name__ == "__main__":`.
        on_bad_image: `reject` the row and go on, or `fail`.
        max_rejected: share of samples beyond which the job fails.
        allow_mixed: go on where another device, torch, timm or batch size began.
        dry_run: forecast, and write nothing.
        reporter: told what happens.

    Raises:
        ColdtapError: one of its kinds (`coldtap.errors`), always with what to do.
    """
    job = JobDescription(
        source=source,
        extractor=ExtractorOptions(
            model=model,
            checkpoint=_path(checkpoint),
            random_weights=random_weights,
            preprocess=preprocess,
            tap_names=tap_names,
            prefix_tokens=prefix_tokens,
            precision=precision,
            device=device,
            quantised=_path(quantized),
            kernel=kernel,
        ),
        rows=RowOptions(split=_names(split), views=views, augmentation=augmentation or Augmentation(), seed=seed),
        encoding=EncodingOptions(
            taps=taps,
            gather=_names(gather),
            sum_at=sum_at,
            tier=tier,
            layout=layout,
            bound=None if snr is None and max_error is None else ErrorBound(snr_db=snr, max_error=max_error),
        ),
    )
    running = RunOptions(
        batch_size=batch_size,
        decode_threads=decode_threads,
        workers=workers,
        on_bad_image=on_bad_image,
        max_rejected=max_rejected,
        allow_mixed=allow_mixed,
        dry_run=dry_run,
    )
    return _run(job, storage_at(store), running, reporter or Silence())


def _run(job: JobDescription, storage: Storage, running: RunOptions, reporter: Reporter) -> CacheReport:
    """Plan the job against what is there, and do what is left of it."""
    # Only here does a job come to need torch and timm.
    from coldtap.pipeline.backbones.backbone import load_from_options
    from coldtap.pipeline.run.extraction import Extraction

    _refuse_store_in_source(storage, job.source)
    found = Found.look(storage)
    images = job.open_source()
    for note in images.listing.notes:
        reporter.note(note)
    backbone = load_from_options(_with_begun_kernel(job.extractor, found.recorded))
    if backbone.kernel is not None:
        reporter.note(f"kernel {backbone.kernel.kernel.name}: {backbone.kernel.why}")
    plan = plan_job(images, backbone, splits=_splits(found, images.listing), rows=job.rows, encoding=job.encoding)
    if found.is_complete_for(plan.recipe):
        return relabel(storage, plan, dry_run=running.dry_run)
    environment = _environment(found, backbone, running)
    rejections = Rejections(plan.rows, images, running.max_rejected)
    with plan.decoder(environment["batch_size"], running.decode_threads or os.cpu_count() or 1) as decoder:
        extraction = Extraction(
            recipe=plan.recipe,
            specs=plan.specs,
            rows=plan.rows,
            norm=plan.backbone.norm,
            recorded={"environment": environment, "model": _name_of(job, backbone), "source": images.name},
            plan=plan,
            backbone=backbone,
            decoder=decoder,
            running=running,
            description=_for_workers(job, images, environment) if running.workers > 1 else b"",
            rejections=rejections,
        )
        ended = write_store(found, extraction, reporter, dry_run=running.dry_run)
    return _report(plan, storage, ended, rejections.n_rows)


def _environment(found: Found, backbone: "Backbone", running: RunOptions) -> dict[str, Any]:
    """Where the job runs, which has to be where it began."""
    from coldtap.pipeline.backbones.batch_size import choose_batch_size
    from coldtap.pipeline.run.extraction import environment_of

    began = found.recorded.get("environment", {})
    size = running.batch_size or began.get("batch_size") or choose_batch_size(backbone)
    environment = environment_of(backbone, size)
    if found.recipe is not None:
        require_same_environment(began, environment, allow_mixed=running.allow_mixed)
    return environment


def _report(plan: JobPlan, storage: Storage, ended: Ended, n_rejected: int) -> CacheReport:
    return CacheReport(
        store=place_of(storage),
        status="written" if ended.digest else "forecast",
        digest=ended.digest,
        n_rows=plan.rows.n_planned - n_rejected if ended.digest else 0,
        n_rejected=n_rejected,
        forecast=ended.ahead,
    )


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Several names, or one as a string."""
    return None if names is None else (names,) if isinstance(names, str) else tuple(names)


def _with_begun_kernel(extractor: ExtractorOptions, recorded: Mapping[str, Any]) -> ExtractorOptions:
    """As the batch size: the kernel that began goes on, whatever a clock would choose today."""
    if not recorded or extractor.quantised is None or extractor.kernel != "auto":
        return extractor
    return replace(extractor, kernel=str(recorded["environment"].get("kernel", "auto")))


def _name_of(job: JobDescription, backbone: BackboneDescription) -> str:
    model = job.extractor.model
    if model is None:
        return backbone.architecture
    return model if isinstance(model, str) else type(model).__name__


def _for_workers(job: JobDescription, images: Source, environment: Mapping[str, Any]) -> bytes:
    """The job as workers are told it: they shall not choose a kernel for themselves.

    They list a path anew; what Python code gives may take long to list, and travels listed.
    """
    source = job.source if isinstance(job.source, (str, os.PathLike)) else images
    extractor = replace(job.extractor, kernel=environment.get("kernel", job.extractor.kernel))
    return replace(job, source=source, extractor=extractor).dumps()


def _refuse_store_in_source(storage: Storage, source: Any) -> None:
    """A store below the folder of images would be listed as images by the next call."""
    place = place_of(storage)
    if not isinstance(source, (str, Path)) or not Path(source).is_dir() or not isinstance(place, Path):
        return
    if place.resolve().is_relative_to(Path(source).resolve()):
        raise OptionError(f"{storage} lies inside {source}, which is read as images: give a path outside it")


def _splits(found: Found, listing: Listing) -> Sequence[str]:
    """The split of each sample; a val split that a complete store cut from train stays as it was cut.

    The cut is stratified by label, so corrected labels would move it, and labels are no part of a recipe.
    """
    recipe = found.recipe
    if recipe is None or not listing.val_is_cut or recipe.rows.listing != listing.fingerprint:
        return listing.splits
    if recipe.rows.val != "cut from train" or not is_complete(found.storage):
        return listing.splits
    stored = open_store(found.storage).splits_by_id()
    return [stored.get(sample, split) for sample, split in zip(listing.ids, listing.splits, strict=True)]
