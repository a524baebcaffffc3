"""The job: from a source of images to a complete store, resumable at every block."""

import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from coldtap.errors import InterruptedRunError, OptionError, StoreLockedError
from coldtap.extras import require_extra
from coldtap.pipeline.backbones.backbone import Backbone, Precision
from coldtap.pipeline.backbones.batch_size import choose_batch_size
from coldtap.pipeline.cache_report import CacheReport
from coldtap.pipeline.extract.block import Extraction
from coldtap.pipeline.extract.calibrate import Calibration, calibrate
from coldtap.pipeline.images.decode_ahead import Decoder
from coldtap.pipeline.images.preprocess import Augmentation, Preprocess
from coldtap.pipeline.images.sources import Listing, Source
from coldtap.pipeline.images.sources.parquet import ParquetSource
from coldtap.pipeline.plan.options import JobDescription
from coldtap.pipeline.plan.plan import JobPlan
from coldtap.pipeline.plan.relabel import relabel
from coldtap.pipeline.run.assignment import Assignment
from coldtap.pipeline.run.environment import describe_environment, require_same_environment
from coldtap.pipeline.run.in_process import run_blocks
from coldtap.pipeline.run.rejections import Rejections
from coldtap.pipeline.run.same_threads import batch_sizes, threads_with_the_same_features
from coldtap.stores.format.arrays import Layout, Tier
from coldtap.stores.format.codes import ErrorBound
from coldtap.stores.format.journal import JournalLine, read_line
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.reading.recipe_file import read_recipe, require_extraction, require_same_recipe
from coldtap.stores.reading.store import open_store
from coldtap.stores.reading.stored_numbers import stored_numbers
from coldtap.stores.storage.atomic import machine_errors
from coldtap.stores.storage.lock import StoreLock
from coldtap.stores.writing.forecast import Forecast, forecast, require_space
from coldtap.stores.writing.reporting import Reporter, Silence
from coldtap.stores.writing.stopping import StopRequest, stop_on_signals
from coldtap.stores.writing.writer import StoreWriter, is_complete


def cache_features(
    source: Any,
    store: str | Path,
    *,
    model: str | nn.Module | None = None,
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
    tier: Tier = "float16",
    layout: Layout | None = None,
    snr: float | None = None,
    max_error: float | None = None,
    split: Sequence[str] | None = None,
    views: int = 0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    quantised: str | Path | None = None,
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
        store: where the store is, or will be. The same recipe goes on, or has nothing to do.
        model: a timm name, `coldtap/vit-reference` (the default), or any module; with `quantised` its own.
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
        quantised: an artefact of `quantize`, in place of weights, precision and preprocessing.
        kernel: of a quantised backbone: `auto`, `int` or `float`.
        batch_size: images a forward pass; None goes on as the store began, or chooses.
        decode_threads: of all workers together; None for one a core.
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
    _check_options(batch_size, decode_threads, workers, max_rejected, on_bad_image)
    told = reporter or Silence()
    path = Path(store)
    _refuse_store_in_source(path, source)
    found = read_recipe(path)
    asked = JobDescription(
        source=source,
        model=model,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        random_weights=random_weights,
        preprocess=preprocess,
        tap_names=tap_names,
        prefix_tokens=prefix_tokens,
        precision=precision,
        device=device,
        taps=taps,
        gather=gather,
        sum_at=sum_at,
        tier=tier,
        layout=layout,
        bound=None if snr is None and max_error is None else ErrorBound(snr_db=snr, max_error=max_error),
        split=split,
        views=views,
        augmentation=augmentation,
        seed=seed,
        quantised=None if quantised is None else Path(quantised),
        kernel=_begun_kernel(found[1]) if found and quantised is not None and kernel == "auto" else kernel,
    )
    images = asked.open_source()
    for note in images.listing.notes:
        told.note(note)
    backbone = asked.load_backbone()
    if backbone.kernel is not None:
        told.note(f"kernel {backbone.kernel.kernel.name}: {backbone.kernel.why}")
        asked = replace(asked, kernel=backbone.kernel.kernel.name)  # workers shall not choose for themselves
    plan = asked.plan(images, backbone, _splits(path, found[0] if found else None, images.listing))
    if found is not None:
        require_same_recipe(path, found[0], plan.recipe)
        if is_complete(path):
            return relabel(path, plan, dry_run=dry_run)
    began = found[1]["environment"] if found else {}
    if found is not None:
        require_extraction(path, found[1])
    size = batch_size or began.get("batch_size") or choose_batch_size(backbone)
    environment = describe_environment(backbone, size)
    if found is not None:
        require_same_environment(began, environment, allow_mixed=allow_mixed)
    work = _Work(
        store=path,
        plan=plan,
        n_workers=workers,
        description=_for_workers(asked, images) if workers > 1 else b"",
        model=_name_of(model, backbone),
        environment=environment,
        recorded=found[1] if found else None,
        fail_on_bad_image=on_bad_image == "fail",
        max_rejected=max_rejected,
        told=told,
    )
    n_threads = decode_threads or os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads, thread_name_prefix="decode") as pool:
        decoder = Decoder(
            source=images,
            preprocess=backbone.preprocess,
            augmentation=plan.augmentation,
            seed=seed,
            batch_size=size,
            pool=pool,
            n_threads=n_threads,
        )
        return work.run(decoder, dry_run=dry_run)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A planned job on a store that is not complete; `recorded` is what an earlier call wrote beside the recipe."""

    store: Path
    plan: JobPlan
    n_workers: int
    description: bytes
    model: str
    environment: dict[str, Any]
    recorded: Mapping[str, Any] | None
    fail_on_bad_image: bool
    max_rejected: float
    told: Reporter

    def run(self, decoder: Decoder, *, dry_run: bool) -> CacheReport:
        """Calibrate, forecast, and do the blocks that are not there yet."""
        plan = self.plan
        writer = StoreWriter(self.store, plan.recipe, plan.specs, plan.rows)
        calibration = calibrate(plan.backbone, decoder, plan.specs, plan.rows, plan.bound)
        todo, ahead = self._look_ahead(writer, calibration)
        if dry_run:
            return CacheReport(store=self.store, status="forecast", digest=None, n_rows=0, n_rejected=0, forecast=ahead)
        require_space(self.store, ahead)
        with machine_errors(self.store):
            self.store.mkdir(parents=True, exist_ok=True)
        with StoreLock(self.store), stop_on_signals() as request:
            self._require_alone()
            recorded = self.recorded or {
                "environment": self.environment,
                "model": self.model,
                "source": plan.source.name,
                "errors": calibration.errors,
            }
            writer.start(recorded, stored_numbers(self.store, plan.specs) or calibration.numbers, plan.backbone.norm)
            rejections = self._count_earlier(todo)
            run = self._here if min(self.n_workers, len(todo)) <= 1 else self._on_workers
            try:
                with closing(run(decoder, writer, todo, request)) as lines:
                    for line in lines:
                        rejections.count(line)
            except InterruptedRunError:
                raise self._interrupted(writer, request) from None
            digest = writer.finish(plan.source.listing.ids, plan.source.where, plan.targets())
        return CacheReport(
            store=self.store,
            status="written",
            digest=digest,
            n_rows=plan.rows.n_planned - rejections.n_rows,
            n_rejected=rejections.n_rows,
            forecast=ahead,
        )

    def _look_ahead(self, writer: StoreWriter, calibration: Calibration) -> tuple[list[int], Forecast]:
        """The blocks that are not there yet, and what they will take."""
        done = set(writer.finished_blocks()) if self.recorded else set()
        todo = [block for block in range(writer.plan.n_blocks) if block not in done]
        ahead = forecast(
            self.store, writer.specs, writer.plan, todo, calibration.rows_per_second, calibration.compressed
        )
        if self.recorded:
            self.told.note(f"going on with {self.store}: {len(done)} of {writer.plan.n_blocks} blocks are there")
        self.told.forecast(ahead)
        return todo, ahead

    def _require_alone(self) -> None:
        """With the lock in hand, the store must still be what it was when the job was planned."""
        if is_complete(self.store) or (self.recorded is None and read_recipe(self.store) is not None):
            raise StoreLockedError(f"another job wrote to {self.store} meanwhile: run the same command again")

    def _count_earlier(self, todo: Sequence[int]) -> Rejections:
        """The rejections of blocks that are there already."""
        rejections = Rejections(self.plan.rows, self.plan.source, self.max_rejected)
        for block in sorted(set(range(self.plan.rows.n_blocks)) - set(todo)):
            if line := read_line(self.store, block):
                rejections.count(line)
        return rejections

    def _here(
        self, decoder: Decoder, writer: StoreWriter, todo: Sequence[int], request: StopRequest
    ) -> Generator[JournalLine]:
        """Do blocks in this process."""
        with ThreadPoolExecutor(1, "device") as device:
            job = Extraction(
                backbone=self.plan.backbone,
                decoder=decoder,
                device=device,
                writer=writer,
                environment=self.environment,
                fail_on_bad_image=self.fail_on_bad_image,
                advance=self.told.advance,
                stop=request.event,
            )
            yield from run_blocks(job, todo)

    def _on_workers(
        self, decoder: Decoder, writer: StoreWriter, todo: Sequence[int], request: StopRequest
    ) -> Generator[JournalLine]:
        """Do blocks in worker processes, which share the threads that this one would have used."""
        from coldtap.pipeline.run.dask import run_on_workers  # dask and its libraries take a second to import

        n_workers = min(self.n_workers, len(todo))
        own = torch.get_num_threads()
        sizes = batch_sizes(self.plan.rows, decoder.batch_size)
        n_threads = threads_with_the_same_features(self.plan.backbone, sizes, max(1, own // n_workers))
        if n_threads * n_workers > own > 1:
            self.told.note(
                f"each of {n_workers} workers runs {n_threads} torch threads on cores for {own}: with fewer the "
                "features would differ in their last bits; fewer --workers may be as fast"
            )
        source = decoder.source
        assignment = Assignment(
            description=self.description,
            store=self.store,
            recipe=self.plan.recipe,
            environment=self.environment,
            batch_size=decoder.batch_size,
            decode_threads=max(1, decoder.n_threads // n_workers),
            torch_threads=n_threads,
            fail_on_bad_image=self.fail_on_bad_image,
            spool=source.share_spool() if isinstance(source, ParquetSource) else None,
        )
        yield from run_on_workers(
            assignment, self.plan.rows, todo, n_workers, advance=self.told.advance, stop=request.event
        )

    def _interrupted(self, writer: StoreWriter, request: StopRequest) -> InterruptedRunError:
        n_there, n_blocks = len(writer.finished_blocks()), self.plan.rows.n_blocks
        return request.error(
            f"stopped: {n_there} of {n_blocks} blocks of {self.store} are there and stay; run the same command to go on"
        )


def _begun_kernel(recorded: Mapping[str, Any]) -> str:
    """As the batch size: the kernel that began goes on, whatever a clock would choose today."""
    return str(recorded["environment"].get("kernel", "auto"))


def _name_of(model: str | nn.Module | None, backbone: Backbone) -> str:
    if model is None:
        return backbone.architecture
    return model if isinstance(model, str) else type(model).__name__


def _check_options(
    batch_size: int | None, decode_threads: int | None, workers: int, max_rejected: float, on_bad_image: str
) -> None:
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"--batch-size {batch_size}: give at least 1 image")
    if decode_threads is not None and decode_threads < 1:
        raise OptionError(f"--decode-threads {decode_threads}: give at least 1")
    if workers < 1:
        raise OptionError(f"--workers {workers}: give at least 1 process")
    if workers > 1:
        require_extra("cluster", for_=f"`{workers=}`")
    if not 0 <= max_rejected <= 1:
        raise OptionError(f"--max-rejected {max_rejected}: give a share from 0 to 1")
    if on_bad_image not in ("reject", "fail"):
        raise OptionError(f"--on-bad-image {on_bad_image}: choose reject or fail")


def _for_workers(asked: JobDescription, images: Source) -> bytes:
    """Workers list a path themselves; what Python code gives may take long to list, and travels listed."""
    is_path = isinstance(asked.source, (str, os.PathLike))
    return (asked if is_path else replace(asked, source=images)).dumps()


def _refuse_store_in_source(store: Path, source: Any) -> None:
    """A store below the folder of images would be listed as images by the next call."""
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        folder, inside = Path(source).resolve(), store.resolve()
        if inside.is_relative_to(folder):
            raise OptionError(f"{store} lies inside {source}, which is read as images: give a path outside it")


def _splits(path: Path, recipe: Recipe | None, listing: Listing) -> Sequence[str]:
    """The split of each sample; a val split that a complete store cut from train stays as it was cut.

    The cut is stratified by label, so corrected labels would move it, and labels are no part of a recipe.
    """
    if recipe is None or not listing.val_is_cut or recipe.rows["listing"] != listing.fingerprint:
        return listing.splits
    if recipe.rows.get("val") != "cut from train" or not is_complete(path):
        return listing.splits
    stored = open_store(path).splits_by_id()
    return [stored.get(sample, split) for sample, split in zip(listing.ids, listing.splits, strict=True)]
