"""Training one adaptor from a store: no backbone, no image.

AdamW, a linear warm-up and a cosine, the best epoch chosen on val, the test split read once at the end. A run is
resumable: killed at any moment and started again, on the CPU it ends in the same bits.
"""

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import nn

from coldtap.adaptors.batches import FeatureBatches
from coldtap.adaptors.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    copy_weights,
    read_checkpoint,
    restore_checkpoint,
    take_checkpoint,
    write_checkpoint,
)
from coldtap.adaptors.contract import AdaptorKind, FeatureSpec, copy_final_norm
from coldtap.adaptors.curves import draw_curves
from coldtap.adaptors.devices import choose_device, describe_device, seeded
from coldtap.adaptors.fitting import Fitter
from coldtap.adaptors.kinds import adaptor_kind
from coldtap.adaptors.memory import peak_memory_bytes
from coldtap.adaptors.options import parse_options, require_at_least, require_positive, require_probability
from coldtap.adaptors.run_folder import EpochRecord, RunInfo, RunSettings, SplitMetrics, read_run, write_run
from coldtap.stores import Store, open_store
from coldtap.stores.canonical import sha256
from coldtap.stores.durable import TEMPORARY_SUFFIX, machine_errors
from coldtap.stores.errors import InterruptedRunError, OptionError, RunError, SourceError

INIT_STREAM = 0  # random numbers of the start; epoch e has stream e


class Progress(Protocol):
    """Told of every epoch as it ends."""

    def __call__(self, record: EpochRecord, *, epochs: int, best_epoch: int) -> None:
        """Shows an epoch; `epochs` is their number in the run, `best_epoch` the best so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run: its folder, what `run.json` says, and what this call had to do.

    `resumed_after` is the number of epochs that an earlier, interrupted call had done.
    """

    path: Path
    info: RunInfo
    resumed_after: int
    was_finished: bool


def train_adaptor(
    store: Store | str | Path,
    adaptor: str = "mist",
    *,
    out: str | Path,
    epochs: int = 100,
    lr: float | None = None,
    batch_size: int = 32,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    device: str = "auto",
    resident: bool | None = None,
    progress: Progress | None = None,
    checkpoint_every_s: float = 5.0,
) -> RunResult:
    """Trains an adaptor on a store's train split and leaves a run folder.

    The epoch that is kept has the best val accuracy; among equals the lower val loss wins, then the earlier epoch.

    Args:
        store: A store or its path.
        adaptor: `linear`, `mist` or `last`.
        out: The run folder. A finished run of equal settings is returned as it is, an unfinished one goes on.
        epochs: Passes over the train split.
        lr: Peak learning rate; None is the adaptor's own default.
        batch_size: Samples a step.
        weight_decay: Of matrices; biases and norms have none.
        warmup: Share of all steps in which the learning rate rises.
        settings: The adaptor's own options, such as `{"rank": 4}` or `{"rank": "4"}`.
        seed: Decides the start, the order of samples, the views drawn and dropout.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resident: Whether to keep features in memory; None decides by their size.
        progress: Called after every epoch.
        checkpoint_every_s: Seconds between checkpoints at least; 0 writes one every epoch.

    Raises:
        OptionError: An option has a value that cannot be used.
        StoreError: The store is incomplete, damaged, or lacks what the adaptor needs.
        SourceError: The store has no train or val split, or a single class.
        RunError: `out` holds a run of other settings or damaged files, or the loss is no longer finite.
        MachineError: No such device, or the folder cannot be written.
        InterruptedRunError: Ctrl-C; what was done is kept.
    """
    store = store if isinstance(store, Store) else open_store(store)
    kind = adaptor_kind(adaptor)
    peak = kind.lr if lr is None else lr
    _check_arguments(epochs=epochs, lr=peak, batch_size=batch_size, weight_decay=weight_decay, warmup=warmup, seed=seed)
    features, options = kind.plan(store, parse_options(kind.options, settings or {}, adaptor=adaptor))
    run_settings = RunSettings(
        adaptor=adaptor,
        options=asdict(options),
        epochs=epochs,
        lr=peak,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        seed=seed,
        store_digest=store.digest,
        extractor_digest=store.recipe.extractor_digest,
    )
    out = Path(out)
    _make_folder(out)
    if (info := read_run(out)) is not None:
        _require_equal(info.settings, run_settings, out)
        _remove_checkpoint(out)
        return RunResult(path=out, info=info, resumed_after=0, was_finished=True)
    run = _Run(store, kind, features, options, run_settings, out, device=choose_device(device), resident=resident)
    return run.finish(progress, checkpoint_every_s=checkpoint_every_s)


class _Run:
    """One call's work on one run folder."""

    def __init__(
        self,
        store: Store,
        kind: AdaptorKind[Any],
        features: FeatureSpec,
        options: Any,
        settings: RunSettings,
        out: Path,
        *,
        device: torch.device,
        resident: bool | None,
    ) -> None:
        self.store, self.features, self.settings, self.out, self.device = store, features, settings, out, device
        _require_splits(store)
        self.last = read_checkpoint(out)
        if self.last is not None:
            _require_equal(self.last.settings, settings, out)
        self.resumed_after = len(self.last.epochs) if self.last else 0
        self.train = FeatureBatches(store, features, "train", batch_size=settings.batch_size, resident=resident)
        self.val = FeatureBatches(store, features, "val", batch_size=settings.batch_size, resident=resident)
        _require_two_classes(store, self.train)
        with seeded(settings.seed, INIT_STREAM, device):
            self.model: nn.Module = kind.build(features, options, n_classes=store.n_classes)
        copy_final_norm(self.model, store.norm)
        self.model.to(device)
        self.fitter = Fitter(self.model, settings, device, n_batches=self.train.n_batches)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def finish(self, progress: Progress | None, *, checkpoint_every_s: float) -> RunResult:
        """Does what is left of the run, and writes its folder."""
        written = self.last
        written_at = time.monotonic()
        try:
            if self.last is not None:
                restore_checkpoint(self.last, self.model, self.fitter.optimizer)
                self.fitter.steps = self.last.steps
            for epoch in range(self.resumed_after + 1, self.settings.epochs + 1):
                self.last = self._epoch(epoch)
                if time.monotonic() - written_at >= checkpoint_every_s:
                    write_checkpoint(self.out, self.last)
                    written, written_at = self.last, time.monotonic()
                if progress is not None:
                    progress(self.last.epochs[-1], epochs=self.settings.epochs, best_epoch=self.last.best_epoch)
            assert self.last is not None, "there is at least one epoch"
            return self._write(self.last)
        except KeyboardInterrupt as error:
            if self.last is not None and self.last is not written:
                write_checkpoint(self.out, self.last)
            raise InterruptedRunError(self._interruption()) from error

    def _interruption(self) -> str:
        done = len(self.last.epochs) if self.last else 0
        return (
            f"interrupted after epoch {done} of {self.settings.epochs}; {self.out} keeps what was done: "
            "run the same command again to go on"
        )

    def _epoch(self, epoch: int) -> Checkpoint:
        """Trains and evaluates one epoch; returns the run's state after it."""
        start = time.perf_counter()
        train_loss = self.fitter.fit_epoch(self.train, epoch)
        val = self.fitter.evaluate(self.val.ordered(), split="val", epoch=epoch)
        record = EpochRecord(
            epoch=epoch,
            lr=self.fitter.lr,
            train_loss=train_loss,
            val_loss=val.loss,
            val_top1=val.top1,
            seconds=time.perf_counter() - start,
        )
        epochs = (*(self.last.epochs if self.last else ()), record)
        best_epoch = choose_epoch(epochs)
        return take_checkpoint(
            self.settings,
            self.model,
            self.fitter.optimizer,
            epochs=epochs,
            best_epoch=best_epoch,
            best=copy_weights(self.model) if self.last is None or best_epoch == epoch else self.last.best_weights(),
            steps=self.fitter.steps,
        )

    def _write(self, checkpoint: Checkpoint) -> RunResult:
        """Reads the test split, once, and writes the folder of the finished run."""
        weights = checkpoint.best_weights()
        self.model.load_state_dict(weights)
        data = save(weights)
        info = self._info(checkpoint, self._metrics(checkpoint), adaptor_sha256=sha256(data))
        title = f"{self.settings.adaptor} on {self.store.path.name}, {self.parameters:,} parameters"
        picture = draw_curves(checkpoint.epochs, best_epoch=checkpoint.best_epoch, title=title)
        write_run(self.out, info, data, checkpoint.epochs, picture)
        _remove_checkpoint(self.out)
        return RunResult(path=self.out, info=info, resumed_after=self.resumed_after, was_finished=False)

    def _metrics(self, checkpoint: Checkpoint) -> dict[str, SplitMetrics]:
        best = checkpoint.epochs[checkpoint.best_epoch - 1]
        metrics = {"val": SplitMetrics(top1=best.val_top1, loss=best.val_loss, n_samples=self.val.n_samples)}
        if "test" in self.store.splits:
            size = self.settings.batch_size
            test = FeatureBatches(self.store, self.features, "test", batch_size=size, resident=False)
            metrics["test"] = self.fitter.evaluate(test.ordered(), split="test", epoch=checkpoint.best_epoch)
        return metrics

    def _info(self, checkpoint: Checkpoint, metrics: Mapping[str, SplitMetrics], *, adaptor_sha256: str) -> RunInfo:
        on_gpu = self.device.type == "cuda"
        return RunInfo(
            settings=self.settings,
            features=self.features,
            n_classes=self.store.n_classes,
            class_names=self.store.class_names(),
            parameters=self.parameters,
            metrics=metrics,
            best_epoch=checkpoint.best_epoch,
            epoch_seconds=sum(record.seconds for record in checkpoint.epochs) / len(checkpoint.epochs),
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_memory_bytes(),
            device=describe_device(self.device),
            residency=self.train.residency,
            versions=_versions(),
            store=str(self.store.path),
            extractor=dict(self.store.recipe.extractor),
            adaptor_sha256=adaptor_sha256,
        )


def choose_epoch(epochs: tuple[EpochRecord, ...]) -> int:
    """Returns the number of the epoch to keep: best val accuracy, then lower val loss, then the earlier one.

    Accuracy alone would tie often: a val split of 200 images knows 201 accuracies.
    """
    return max(epochs, key=lambda record: (record.val_top1, -record.val_loss, -record.epoch)).epoch


def _check_arguments(*, epochs: int, lr: float, batch_size: int, weight_decay: float, warmup: float, seed: int) -> None:
    require_at_least(1, epochs=epochs, batch_size=batch_size)
    require_at_least(0, seed=seed)
    require_positive(lr=lr)
    require_probability(warmup=warmup)
    if not 0 <= weight_decay < float("inf"):
        raise OptionError(f"weight_decay={weight_decay}: it must be 0 or more, and finite")


def _make_folder(out: Path) -> None:
    try:
        with machine_errors(out):
            out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"--out {out} is a file, or lies in one: choose a folder") from error


def _require_equal(old: RunSettings, new: RunSettings, out: Path) -> None:
    if different := old.differences(new):
        raise RunError(
            f"{out} holds a run of other settings: {'; '.join(different)}. Choose another --out, or delete it"
        )


def _require_splits(store: Store) -> None:
    held = ", ".join(f"{split} ({n})" for split, n in store.splits.items()) or "none"
    for split, use in (("train", "to learn from"), ("val", "to choose the best epoch on")):
        if split not in store.splits:
            raise SourceError(f"{store.path} has no {split} split {use}; it holds {held}: cache again with --split all")


def _require_two_classes(store: Store, train: FeatureBatches) -> None:
    present = train.targets.unique().tolist()
    if len(present) < 2:
        names = store.class_names()
        name = names[present[0]] if names else present[0]
        raise SourceError(f"{store.path}: every train sample is of class {name!r}: there is nothing to tell apart")


def _remove_checkpoint(out: Path) -> None:
    for name in (CHECKPOINT, CHECKPOINT + TEMPORARY_SUFFIX):
        (out / name).unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("coldtap", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
