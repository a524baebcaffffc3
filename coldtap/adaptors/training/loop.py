"""Trials that share the batches of their epochs: each batch is read and restored once, for all of them."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from coldtap.adaptors.data.batches import Batch, FeatureBatches
from coldtap.adaptors.runs.record import EpochRecord, SplitMetrics
from coldtap.adaptors.training.checkpoint import Checkpoint, CheckpointWriter
from coldtap.adaptors.training.grouping import make_learner
from coldtap.adaptors.training.optimizer import learning_rate_at
from coldtap.adaptors.training.plan import TrialPlan
from coldtap.adaptors.training.split_metrics import evaluate_split
from coldtap.adaptors.training.state import TrialState
from coldtap.errors import InterruptedRunError
from coldtap.stores import Store
from coldtap.stores.storage.contract import Storage


class Progress(Protocol):
    """What is called after every epoch."""

    def __call__(self, trials: Sequence[TrialState], *, epoch: int, epochs: int, seconds: float) -> None:
        """Show the states of all trials after an epoch of `epochs`."""


class SharedPass:
    """Trials over one kind of features, with batches of one size in one order.

    Attributes:
        train: Their batches.
        val: Those of val; None where val is learnt from.
        trials: What has become of each so far.
        parameters: How many each trial trains.
        steps: Steps done, by the trials that have not ended.
        resumed_after: Epochs that an earlier, interrupted call had done.
    """

    def __init__(
        self,
        store: Store,
        plans: Sequence[TrialPlan],
        *,
        out: Storage,
        train: FeatureBatches,
        val: FeatureBatches | None,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Build the networks, or go on from a checkpoint of these very trials.

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
        self.trials = [TrialState(settings=plan.settings, name=plan.name) for plan in plans]
        self._learning = list(range(len(plans)))  # numbers of the trials that learn, in the learner's order
        self._epochs, self._batches, self.steps, self._seconds = 0, 0, 0, 0.0
        self._losses = torch.zeros(len(plans), dtype=torch.float64, device=device)  # sums of the epoch that is begun
        networks = [plan.network(store, n_classes=train.n_classes, device=device) for plan in plans]
        self.parameters = [sum(p.numel() for p in network.parameters()) for network in networks]
        self._learner = make_learner(plans, networks, train.task, device)
        self.resumed_after = checkpoint.epochs if checkpoint else 0
        self._found = checkpoint
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self, progress: Progress | None, *, checkpoint_every_s: float) -> list[TrialState]:
        """Do what is left of every trial; return their last states.

        Raises:
            InterruptedRunError: Ctrl-C; a checkpoint keeps what was done.
        """
        checkpoints = CheckpointWriter(self._out, self._found, every_s=checkpoint_every_s)
        epochs = max(trial.settings.epochs for trial in self.trials)
        try:
            while self._learning:
                began = time.perf_counter() - self._seconds  # an epoch that is gone on with has taken some already
                with closing(self._begin_epoch()) as batches:
                    for batch in batches:
                        self._step(batch)
                        self._batches += 1
                        if self._batches < self.train.n_batches and checkpoints.is_due():
                            self._seconds = time.perf_counter() - began
                            checkpoints.take(self._snapshot())
                val = self._evaluate()
                seconds = time.perf_counter() - began
                self._end_epoch(val, seconds)
                checkpoints.take(self._snapshot())
                if progress is not None:
                    progress(tuple(self.trials), epoch=self._epochs, epochs=epochs, seconds=seconds)
        except KeyboardInterrupt as error:
            checkpoints.write_last()
            raise InterruptedRunError(self._interruption(checkpoints.last, epochs)) from error
        return self.trials

    def _begin_epoch(self) -> Generator[Batch]:
        """Return the batches that are left of the next epoch."""
        epoch = self._epochs + 1
        if self._batches == 0:
            self._learner.begin_epoch(epoch)
        order_seed = self.trials[0].settings.order_seed
        return self.train.shuffled(seed=order_seed, epoch=epoch, start_batch=self._batches)

    def _step(self, batch: Batch) -> None:
        """Do one step of every trial that learns."""
        losses = self._learner.step(batch.features, batch.targets, self._rates(self.steps))  # (trial,)
        self._losses += losses * len(batch.targets)
        self.steps += 1

    def _rates(self, step: int) -> list[float]:
        """The learning rate in a step of each trial that learns."""
        return [
            learning_rate_at(step, steps=own.epochs * self.train.n_batches, peak=own.lr, warmup=own.warmup)
            for own in (self.trials[number].settings for number in self._learning)
        ]

    def _evaluate(self) -> list[SplitMetrics] | None:
        """What each trial that learns reaches on val."""
        if self.val is None:
            return None
        evaluated = evaluate_split(self._learner.logits, self.val, n_trials=len(self._learning))
        return [each.metrics for each in evaluated]

    def _end_epoch(self, val: Sequence[SplitMetrics] | None, seconds: float) -> None:
        """Record an epoch of every trial that learns, and go on with those that still do."""
        self._epochs, self._batches, self._seconds = self._epochs + 1, 0, 0.0
        train_losses = (self._losses / self.train.n_samples).tolist()
        for place, (number, rate) in enumerate(zip(self._learning, self._rates(self.steps - 1), strict=True)):
            record = EpochRecord(
                epoch=self._epochs,
                lr=rate,
                train_loss=train_losses[place],
                val_loss=val[place].loss if val else None,
                val_score=val[place].score if val else None,
                seconds=seconds,
            )
            self.trials[number] = self.trials[number].after_epoch(
                record, seconds=seconds / len(self._learning), weights=partial(self._learner.weights, place)
            )
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Go on with the trials that still learn."""
        places = [place for place, number in enumerate(self._learning) if self.trials[number].learns]
        if len(places) < len(self._learning):
            self._learner.keep(places)
            self._learning = [self._learning[place] for place in places]
        self._losses = torch.zeros(len(places), dtype=torch.float64, device=self._device)

    def _snapshot(self) -> Checkpoint:
        """Copy all that is needed to go on from here."""
        trials = list(self.trials)
        for place, (number, loss) in enumerate(zip(self._learning, self._losses.tolist(), strict=True)):
            tensors = {**trials[number].tensors, **self._learner.state(place)}
            # A loss that is not finite is a failure once its epoch has ended; JSON has no such number.
            trials[number] = replace(trials[number], loss=repr(loss), tensors=tensors)
        return Checkpoint(
            trials=tuple(trials),
            epochs=self._epochs,
            batches=self._batches,
            steps=self.steps,
            seconds=self._seconds,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._epochs, self._batches = checkpoint.epochs, checkpoint.batches
        self.steps, self._seconds = checkpoint.steps, checkpoint.seconds
        for number, (trial, found) in enumerate(zip(self.trials, checkpoint.trials, strict=True)):
            # Two names can stand for equal settings: the present one stays.
            self.trials[number] = replace(found, settings=trial.settings, name=trial.name).with_kept(found.kept())
        self._drop_ended()
        left = [checkpoint.trials[number] for number in self._learning]
        self._losses += torch.tensor([float(trial.loss) for trial in left], dtype=torch.float64).to(self._device)
        for place, trial in enumerate(left):
            self._learner.restore(place, trial.tensors, steps=self.steps)

    def _interruption(self, last: Checkpoint | None, epochs: int) -> str:
        done, batches = (last.epochs, last.batches) if last else (0, 0)
        more = f" and {batches} of {self.train.n_batches} batches" if batches else ""
        return (
            f"interrupted after epoch {done} of {epochs}{more}; {self._out} keeps what was done: "
            "run the same command again to go on"
        )
