"""One run: what is left of it is done epoch by epoch, kept in checkpoints, and ends in a run folder."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import nn

from coldtap import __version__
from coldtap.adaptors.batches import FeatureBatches
from coldtap.adaptors.checkpoint import (
    Checkpoint,
    copy_weights,
    read_checkpoint,
    remove_checkpoint,
    restore_checkpoint,
    take_checkpoint,
    write_checkpoint,
)
from coldtap.adaptors.contract import AdaptorKind, FeatureSpec, copy_final_norm
from coldtap.adaptors.curves import draw_curves
from coldtap.adaptors.devices import describe_device, seeded
from coldtap.adaptors.fitting import Fitter
from coldtap.adaptors.memory import peak_memory_bytes
from coldtap.adaptors.run_folder import EpochRecord, RunInfo, RunSettings, SplitMetrics, require_equal, write_run
from coldtap.stores import Store
from coldtap.stores.canonical import sha256
from coldtap.stores.errors import InterruptedRunError, SourceError

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


class Run:
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
            require_equal(self.last.settings, settings, out)
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
        remove_checkpoint(self.out)
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
            model=self.store.recorded["model"],
            extractor=dict(self.store.recipe.extractor),
            adaptor_sha256=adaptor_sha256,
        )


def choose_epoch(epochs: tuple[EpochRecord, ...]) -> int:
    """Returns the number of the epoch to keep: best val accuracy, then lower val loss, then the earlier one.

    Accuracy alone would tie often: a val split of 200 images knows 201 accuracies.
    """
    return max(epochs, key=lambda record: (record.val_top1, -record.val_loss, -record.epoch)).epoch


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


def _versions() -> dict[str, str]:
    libraries = {package: version(package) for package in ("torch", "numpy")}
    return {"coldtap": __version__, "python": platform.python_version(), **libraries}
