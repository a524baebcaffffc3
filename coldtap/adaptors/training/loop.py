"""Trials that share the batches of their epochs: each batch is read and restored once, for all of them."""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from coldtap.adaptors.data.batches import Batch, FeatureBatches
from coldtap.adaptors.runs.run_folder import EpochRecord, RunSettings
from coldtap.adaptors.training.checkpoint import Checkpoint, TrialState, write_checkpoint
from coldtap.adaptors.training.learner import Learner, Tensors
from coldtap.adaptors.training.optimizer import learning_rate_at
from coldtap.adaptors.training.plan import PlannedTrial
from coldtap.adaptors.training.side_by_side import make_learners
from coldtap.errors import InterruptedRunError
from coldtap.stores import Store


class Progress(Protocol):
    """Told of every epoch as it ends."""

    def __call__(self, trials: Sequence[TrialState], *, epoch: int, epochs: int, seconds: float) -> None:
        """Shows the states of all trials after an epoch of `epochs`."""


@dataclass(slots=True)
class _Trial:
    """What changes of a trial while it learns."""

    plan: PlannedTrial
    records: tuple[EpochRecord, ...] = ()
    best: int = 0
    kept: Tensors = field(default_factory=dict)
    ended: bool = False
    failure: str | None = None
    seconds: float = 0.0

    @property
    def settings(self) -> RunSettings:
        return self.plan.settings

    @property
    def learns(self) -> bool:
        return not self.ended and self.failure is None


class SharedPass:
    """Trials over one kind of features, with batches of one size in one order.

    Attributes:
        train: Their batches.
        val: Those of val; None where val is learnt from.
        parameters: How many each trial trains.
        steps: Steps done, by the trials that have not ended.
        last: The state after the last epoch, or the last one that was written inside one; None before there is any.
        resumed_after: Epochs that an earlier, interrupted call had done.
    """

    def __init__(
        self,
        store: Store,
        plans: Sequence[PlannedTrial],
        *,
        out: Path,
        train: FeatureBatches,
        val: FeatureBatches | None,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Builds the networks, or goes on from a checkpoint of these very trials.

        Args:
            store: The store.
            plans: The trials.
            out: Folder of the checkpoint.
            train: Batches to learn from.
            val: Batches to choose the epoch on.
            device: That trains.
            checkpoint: What an interrupted call has left.
        """
        self._out, self._device, self.train, self.val = out, device, train, val
        self._trials = [_Trial(plan) for plan in plans]
        self._epochs, self._batches, self.steps, self._seconds, self._last_seconds = 0, 0, 0, 0.0, 0.0
        self._rates = [0.0] * len(plans)
        self._losses = torch.zeros(len(plans), dtype=torch.float64, device=device)
        members = [plan.member(store, n_classes=train.n_classes, device=device) for plan in plans]
        self.parameters = [sum(p.numel() for p in member.network.parameters()) for member in members]
        self._learners = make_learners(members, train.task, device, row_shape=plans[0].features.row_shape)
        self.last = checkpoint
        self.resumed_after = checkpoint.epochs if checkpoint else 0
        if checkpoint is not None:
            self._restore(checkpoint)
        self._written, self._written_at, self._write_s, self._every_s = checkpoint, time.monotonic(), 0.0, 0.0

    def run(self, progress: Progress | None, *, checkpoint_every_s: float) -> tuple[TrialState, ...]:
        """Does what is left of every trial; returns their last states.

        Raises:
            InterruptedRunError: Ctrl-C; a checkpoint keeps what was done.
        """
        self._written_at, self._every_s = time.monotonic(), checkpoint_every_s
        epochs = max(trial.settings.epochs for trial in self._trials)
        try:
            while any(trial.learns for trial in self._trials):
                self._epoch(self._epochs + 1)
                self.last = self._snapshot()
                self._write_if_due()
                if progress is not None:
                    progress(self.last.trials, epoch=self._epochs, epochs=epochs, seconds=self._last_seconds)
            assert self.last is not None, "there is at least one epoch"
            return self.last.trials
        except KeyboardInterrupt as error:
            if self.last is not None and self.last is not self._written:
                write_checkpoint(self._out, self.last)
            raise InterruptedRunError(self._interruption(epochs)) from error

    def _interruption(self, epochs: int) -> str:
        done, batches = (self.last.epochs, self.last.batches) if self.last else (0, 0)
        more = f" and {batches} of {self.train.n_batches} batches" if batches else ""
        return (
            f"interrupted after epoch {done} of {epochs}{more}; {self._out} keeps what was done: "
            "run the same command again to go on"
        )

    def _epoch(self, epoch: int) -> None:
        """Trains and evaluates what is left of an epoch."""
        began = time.perf_counter() - self._seconds
        if self._batches == 0:
            self._losses.zero_()
            for learner, _ in self._learners:
                learner.begin_epoch(epoch)
        order = self.train.shuffled(seed=self._trials[0].settings.order_seed, epoch=epoch, start_batch=self._batches)
        with closing(order):
            for batch in order:
                self._step(batch)
                self._batches += 1
                if self._batches < self.train.n_batches and self._is_due():
                    self._seconds = time.perf_counter() - began
                    self.last = self._snapshot()
                    self._write_if_due()
        train_losses = (self._losses / self.train.n_samples).tolist()
        val = self._evaluate()
        self._last_seconds = time.perf_counter() - began
        self._epochs, self._batches, self._seconds = epoch, 0, 0.0
        learning = sum(len(numbers) for _, numbers in self._learners)
        for learner, numbers in self._learners:
            for place, number in enumerate(numbers):
                loss = train_losses[number]
                self._end_epoch(number, epoch, loss, val.get(number), learner, place, learning=learning)
        self._drop_ended()

    def _step(self, batch: Batch) -> None:
        for learner, numbers in self._learners:
            for number in numbers:
                settings = self._trials[number].settings
                self._rates[number] = learning_rate_at(
                    self.steps,
                    steps=settings.epochs * self.train.n_batches,
                    peak=settings.lr,
                    warmup=settings.warmup,
                )
            losses = learner.step(batch.features, batch.targets, [self._rates[number] for number in numbers])
            if len(numbers) == len(self._trials):
                self._losses += losses * len(batch.targets)
            else:
                self._losses[numbers] += (losses * len(batch.targets)).double()
        self.steps += 1

    def _evaluate(self) -> dict[int, tuple[float, float]]:
        """Loss and deciding score on val, by number of the trial that learns."""
        if self.val is None:
            return {}
        task, found = self.val.task, {}
        tallies = [
            task.tally(n_trials=len(numbers), n_classes=self.val.n_classes, device=self._device)
            for _, numbers in self._learners
        ]
        for batch in self.val.ordered():
            for tally, (learner, _) in zip(tallies, self._learners, strict=True):
                tally.add(learner.logits(batch.features), batch.targets)
        for tally, (_, numbers) in zip(tallies, self._learners, strict=True):
            for number, loss, scores in zip(numbers, tally.losses(), tally.scores(), strict=True):
                found[number] = (loss, scores[task.metric])
        return found

    def _end_epoch(
        self,
        number: int,
        epoch: int,
        train_loss: float,
        val: tuple[float, float] | None,
        learner: Learner,
        place: int,
        *,
        learning: int,
    ) -> None:
        trial = self._trials[number]
        settings = trial.settings
        trial.seconds += self._last_seconds / learning
        for loss, what in ((train_loss, "training"), (val[0] if val else 0.0, "val")):
            if not math.isfinite(loss):
                trial.failure = _divergence(settings, loss, what, epoch)
                return
        record = EpochRecord(
            epoch=epoch,
            lr=self._rates[number],
            train_loss=train_loss,
            val_loss=val[0] if val else None,
            val_score=val[1] if val else None,
            seconds=self._last_seconds,
        )
        trial.records = (*trial.records, record)
        best = choose_epoch(trial.records) if settings.keep == "best" else epoch
        stalled = settings.patience is not None and epoch - choose_epoch(trial.records) >= settings.patience
        trial.ended = stalled or epoch == settings.epochs
        if best == epoch and (settings.keep == "best" or trial.ended):
            trial.best, trial.kept = epoch, learner.weights(place)
            if not all(value.isfinite().all() for value in trial.kept.values()):
                # With val its loss has said so; without val nothing has looked at the weights after the last step.
                trial.failure = _divergence(settings, math.nan, "training", epoch)

    def _drop_ended(self) -> None:
        """Goes on with the trials that still learn."""
        left = []
        for learner, numbers in self._learners:
            places = [place for place, number in enumerate(numbers) if self._trials[number].learns]
            if places and len(places) < len(numbers):
                learner.keep(places)
            if places:
                left.append((learner, [numbers[place] for place in places]))
        self._learners = left

    def _is_due(self) -> bool:
        # Every 5 s, as is the default, a write of more than 0.25 s takes a twentieth of the time and no more.
        return time.monotonic() - self._written_at >= self._every_s * max(1, 4 * self._write_s)

    def _write_if_due(self) -> None:
        if self.last is not None and self._is_due():
            began = time.monotonic()
            write_checkpoint(self._out, self.last)
            self._written, self._written_at = self.last, time.monotonic()
            self._write_s = self._written_at - began

    def _snapshot(self) -> Checkpoint:
        """Copies all that is needed to go on from here."""
        tensors: list[Tensors] = [{f"kept.{name}": value for name, value in t.kept.items()} for t in self._trials]
        for learner, numbers in self._learners:
            for place, number in enumerate(numbers):
                tensors[number] |= learner.state(place)
        losses = self._losses.tolist()
        return Checkpoint(
            trials=tuple(
                TrialState(
                    settings=trial.settings,
                    name=trial.plan.name,
                    records=trial.records,
                    best=trial.best,
                    ended=trial.ended,
                    failure=trial.failure,
                    seconds=trial.seconds,
                    # A loss that is not finite is a failure once its epoch has ended; JSON has no such number.
                    loss=repr(losses[number]),
                    tensors=tensors[number],
                )
                for number, trial in enumerate(self._trials)
            ),
            epochs=self._epochs,
            batches=self._batches,
            steps=self.steps,
            seconds=self._seconds,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._epochs, self._batches = checkpoint.epochs, checkpoint.batches
        self.steps, self._seconds = checkpoint.steps, checkpoint.seconds
        for trial, state in zip(self._trials, checkpoint.trials, strict=True):
            trial.records, trial.best, trial.kept = state.records, state.best, state.kept()
            trial.ended, trial.failure, trial.seconds = state.ended, state.failure, state.seconds
        self._losses.copy_(torch.tensor([float(state.loss) for state in checkpoint.trials], dtype=torch.float64))
        self._drop_ended()
        for learner, numbers in self._learners:
            for place, number in enumerate(numbers):
                learner.restore(place, checkpoint.trials[number].tensors, steps=self.steps)


def choose_epoch(records: Sequence[EpochRecord]) -> int:
    """Returns the number of the epoch to keep: best val score, then lower val loss, then the earlier one.

    A score alone would tie often: a val split of 200 images knows 201 accuracies.
    """

    def rank(record: EpochRecord) -> tuple[float, float, int]:
        assert record.val_score is not None, "val chooses"
        assert record.val_loss is not None, "val chooses"
        return record.val_score, -record.val_loss, -record.epoch

    return max(records, key=rank).epoch


def _divergence(settings: RunSettings, loss: float, what: str, epoch: int) -> str:
    return (
        f"the {what} loss is {loss} in epoch {epoch} of {settings.epochs}, at lr={settings.lr:g}: train again with a "
        f"lower one, such as lr={settings.lr / 3:.1g}"
    )
