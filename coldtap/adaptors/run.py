"""One run: what is left of it is done step by step, kept in checkpoints, and ends in a run folder."""

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
    EpochPart,
    copy_weights,
    read_checkpoint,
    remove_checkpoint,
    restore_checkpoint,
    take_checkpoint,
    write_checkpoint,
)
from coldtap.adaptors.curves import draw_curves
from coldtap.adaptors.devices import describe_device, random_states, seeded
from coldtap.adaptors.fitting import Fitter
from coldtap.adaptors.memory import peak_memory_bytes
from coldtap.adaptors.networks.contract import AdaptorKind, FeatureSpec, copy_final_norm
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
        self._written, self._written_at, self._write_s = self.last, time.monotonic(), 0.0
        self._checkpoint_every_s = 0.0
        self.train, self.val = (
            FeatureBatches(
                store,
                features,
                split,
                batch_size=settings.batch_size,
                resident=resident,
                device=device,
                shuffle=settings.shuffle,
            )
            for split in ("train", "val")
        )
        _require_two_classes(store, self.train)
        with seeded(settings.seed, INIT_STREAM, device):
            self.model: nn.Module = kind.build(features, options, n_classes=store.n_classes)
        copy_final_norm(self.model, store.norm)
        self.model.to(device)
        self.fitter = Fitter(self.model, settings, device, n_batches=self.train.n_batches)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def finish(self, progress: Progress | None, *, checkpoint_every_s: float) -> RunResult:
        """Does what is left of the run, and writes its folder."""
        self._written_at, self._checkpoint_every_s = time.monotonic(), checkpoint_every_s
        try:
            if self.last is not None:
                restore_checkpoint(self.last, self.model, self.fitter.optimizer)
                self.fitter.steps = self.last.steps
            for epoch in range(self.resumed_after + 1, self.settings.epochs + 1):
                self.last = self._epoch(epoch)
                self._write_if_due()
                if progress is not None:
                    progress(self.last.epochs[-1], epochs=self.settings.epochs, best_epoch=self.last.best_epoch)
            assert self.last is not None, "there is at least one epoch"
            return self._write(self.last)
        except KeyboardInterrupt as error:
            if self.last is not None and self.last is not self._written:
                write_checkpoint(self.out, self.last)
            raise InterruptedRunError(self._interruption()) from error

    def _is_due(self) -> bool:
        # Every 5 s, as is the default, a write of more than 0.25 s takes a twentieth of the time and no more.
        return time.monotonic() - self._written_at >= self._checkpoint_every_s * max(1, 4 * self._write_s)

    def _write_if_due(self) -> None:
        if self.last is not None and self._is_due():
            began = time.monotonic()
            write_checkpoint(self.out, self.last)
            self._written, self._written_at = self.last, time.monotonic()
            self._write_s = self._written_at - began

    def _interruption(self) -> str:
        done = len(self.last.epochs) if self.last else 0
        part = self.last.part if self.last else None
        more = f" and {part.batches} of {self.train.n_batches} batches" if part else ""
        return (
            f"interrupted after epoch {done} of {self.settings.epochs}{more}; {self.out} keeps what was done: "
            "run the same command again to go on"
        )

    def _epoch(self, epoch: int) -> Checkpoint:
        """Trains and evaluates what is left of an epoch; returns the run's state after it."""
        inside = self.last if self.last is not None and self.last.part is not None else None
        began = time.perf_counter() - (inside.part.seconds if inside and inside.part else 0)

        def between_steps() -> None:
            if self._is_due():
                self.last = self._state_inside(epoch, seconds=time.perf_counter() - began)
                self._write_if_due()

        train_loss = self.fitter.fit_epoch(self.train, epoch, after=inside, between_steps=between_steps)
        val = self.fitter.evaluate(self.val.ordered(), split="val", epoch=epoch)
        record = EpochRecord(
            epoch=epoch,
            lr=self.fitter.lr,
            train_loss=train_loss,
            val_loss=val.loss,
            val_top1=val.top1,
            seconds=time.perf_counter() - began,
        )
        epochs = (*self._epochs_done(), record)
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

    def _epochs_done(self) -> tuple[EpochRecord, ...]:
        return self.last.epochs if self.last else ()

    def _state_inside(self, epoch: int, *, seconds: float) -> Checkpoint:
        """The run's state between two steps of an epoch."""
        loss = self.fitter.loss_so_far(epoch)  # a state that cannot go on is not kept
        return take_checkpoint(
            self.settings,
            self.model,
            self.fitter.optimizer,
            epochs=self._epochs_done(),
            best_epoch=self.last.best_epoch if self.last else 0,
            best=self.last.best_weights() if self.last else {},
            steps=self.fitter.steps,
            part=EpochPart(batches=self.fitter.epoch_batches, loss=loss, seconds=seconds),
            random_states=random_states(self.device),
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
            test = FeatureBatches(
                self.store, self.features, "test", batch_size=size, resident=False, device=self.device
            )
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
            mixing=None if self.train.mixing is None else str(self.train.mixing),
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
