"""Trials to the end: finished ones are read, the rest share passes as far as their batches and the memory allow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.data.devices import free_gpu_bytes
from coldtap.adaptors.data.memory import available_memory_bytes
from coldtap.adaptors.runs.out_folder import sole_writer
from coldtap.adaptors.runs.record import Failure, RunInfo
from coldtap.adaptors.runs.run_folder import read_failure, read_run, write_failure
from coldtap.adaptors.runs.settings import require_equal
from coldtap.adaptors.training.checkpoint import Checkpoint, read_checkpoint, remove_checkpoint
from coldtap.adaptors.training.finish import write_trials
from coldtap.adaptors.training.loop import Progress, SharedPass
from coldtap.adaptors.training.options import TrialOptions
from coldtap.adaptors.training.plan import TrialPlan
from coldtap.adaptors.training.state import TrialState
from coldtap.adaptors.training.store_checks import require_something_to_learn, require_splits
from coldtap.adaptors.training.trial_memory import TrialMemory, forecast_trial, how_many_fit
from coldtap.errors import InterruptedRunError
from coldtap.stores import Store
from coldtap.stores.storage.address import place_of
from coldtap.stores.storage.contract import Storage

type Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """A trial that has ended: its record, `info` as its run folder has it, or `failure`, the reason why there is none.

    `seconds` is its share of the time of the epochs that it had in common with others; `resumed_after` is the number of
    epochs that an earlier, interrupted call had done; `was_finished` says that there was nothing left to do. How a
    result was come by does not count in comparisons.
    """

    plan: TrialPlan
    info: RunInfo | None
    failure: str | None = None
    seconds: float = 0.0
    resumed_after: int = field(default=0, compare=False)
    was_finished: bool = field(default=False, compare=False)

    @property
    def path(self) -> Path | Storage:
        """The run folder, or its storage."""
        return place_of(self.plan.folder)

    @property
    def setting(self) -> TrialOptions:
        """What was asked for."""
        return self.plan.asked


def train_planned(
    store: Store,
    plans: Sequence[TrialPlan],
    *,
    out: Storage,
    device: torch.device,
    resident: bool | None,
    test: bool,
    progress: Progress | None,
    note: Note | None,
    checkpoint_every_s: float,
) -> list[TrialResult]:
    """Train what is not trained yet; return how each trial has ended, in the order of the plans.

    Args:
        store: The store.
        plans: The trials.
        out: Folder of the checkpoint of trials that are under way.
        device: That trains.
        resident: Whether to keep features in memory; None decides by their size.
        test: Whether to evaluate on the test split, where there is one.
        progress: Called after every epoch.
        note: Told what was decided, a sentence each.
        checkpoint_every_s: Seconds between checkpoints at least.

    Raises:
        RunError: A folder holds a run of other settings, or damaged files, or the checkpoint is of other trials.
        SourceError: A split that is needed is missing, or has nothing to learn from.
        InterruptedRunError: Ctrl-C; what was done is kept.
    """
    trainer = _Trainer(store, out, device, resident, test, progress, note or (lambda _: None), checkpoint_every_s)
    with sole_writer(out):
        results = {plan.name: found for plan in plans if (found := _ended_before(plan)) is not None}
        checkpoint = read_checkpoint(out)
        begun = _begun(checkpoint, plans, out) if checkpoint else []
        if all(plan.name in results for plan in begun):  # the end came between their last folder and this file
            remove_checkpoint(out)
            begun = []
        waiting = [plan for plan in plans if plan.name not in results and plan not in begun]
        for group in ([begun] if begun else []) + _alike(waiting):
            for result in trainer.train(group, checkpoint if group is begun else None, results):
                results[result.plan.name] = result
    return [results[plan.name] for plan in plans]


def _ended_before(plan: TrialPlan) -> TrialResult | None:
    if (info := read_run(plan.folder)) is not None:
        require_equal(info.settings, plan.settings, plan.folder)
        return TrialResult(plan=plan, info=info, seconds=info.seconds, was_finished=True)
    if (failed := read_failure(plan.folder)) is not None:
        require_equal(failed.settings, plan.settings, plan.folder)
        return TrialResult(plan=plan, info=None, failure=failed.reason, seconds=failed.seconds, was_finished=True)
    return None


def _begun(checkpoint: Checkpoint, plans: Sequence[TrialPlan], out: Storage) -> list[TrialPlan]:
    """The trials that an interrupted call was at, in its order; folders of some of them may be written already.

    Raises:
        RunError: They are not among those that were asked for.
    """
    found: list[TrialPlan] = []
    for state in checkpoint.trials:
        # Two names can stand for equal settings, as tap=-1 and tap=9.
        alike = [plan for plan in plans if plan.settings == state.settings and plan not in found]
        if not alike:
            nearest = min(plans, key=lambda plan: len(state.settings.differences(plan.settings)))
            require_equal(state.settings, nearest.settings, out)
        found.append(next((plan for plan in alike if plan.name == state.name), alike[0]))
    return found


def _alike(plans: Sequence[TrialPlan]) -> list[list[TrialPlan]]:
    """Trials that can share batches, together."""
    groups: dict[object, list[TrialPlan]] = {}
    for plan in plans:
        same = plan.settings
        key = (plan.features, same.batch_size, same.order_seed, same.shuffle, same.target, same.fit, same.compensation)
        groups.setdefault(key, []).append(plan)
    return list(groups.values())


class _Trainer:
    """What all passes of one call have in common."""

    def __init__(
        self,
        store: Store,
        out: Storage,
        device: torch.device,
        resident: bool | None,
        test: bool,
        progress: Progress | None,
        note: Note,
        checkpoint_every_s: float,
    ) -> None:
        self._store, self._out, self._device, self._resident = store, out, device, resident
        self._test, self._progress, self._note, self._every_s = test, progress, note, checkpoint_every_s

    def train(
        self, plans: Sequence[TrialPlan], checkpoint: Checkpoint | None, done: Mapping[str, TrialResult]
    ) -> Iterator[TrialResult]:
        """Train trials that can share batches, in as few passes as the memory allows.

        Of those that are `done`, which go on only with others from a checkpoint, nothing is written again.
        """
        require_splits(self._store, plans[0].settings.fit)
        try:
            train, val = self._batches(plans[0])
            require_something_to_learn(self._store, train, plans[0].settings.target)
        except KeyboardInterrupt as error:
            raise InterruptedRunError(
                f"interrupted while {self._store.storage} was read: run the same command again"
            ) from error
        self._tell(train, val)
        left = list(plans)
        while left:
            fitting = len(left) if checkpoint or len(left) == 1 else self._how_many_fit(left, train)
            yield from self._train_pass(left[:fitting], train, val, checkpoint, done)
            left = left[fitting:]

    def _batches(self, plan: TrialPlan) -> tuple[FeatureBatches, FeatureBatches | None]:
        """Those to learn from, and those of val, unless it is learnt from."""

        def batches(split: str) -> FeatureBatches:
            return plan.batches(self._store, split, device=self._device, resident=self._resident)

        fit = plan.settings.fit
        return batches(fit), batches("val") if fit == "train" else None

    def _tell(self, train: FeatureBatches, val: FeatureBatches | None) -> None:
        self._note(f"features {train.residency.reason}")
        if train.mixing is not None:
            self._note(str(train.mixing))
        if val is not None and val.n_samples == 1:
            self._note("val has 1 sample: its score is 0 or 1, so that the epoch is chosen by its loss")
        if absent := train.absent_classes:
            shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            self._note(f"no train sample has class {shown}, which other splits have: it cannot be learnt")

    def _how_many_fit(self, plans: Sequence[TrialPlan], train: FeatureBatches) -> int:
        """How many trials, from the first on, share a pass: as many as fit into memory."""
        with closing(train.shuffled(seed=0, epoch=1)) as batches:
            batch = next(batches)
            forecasts: dict[object, TrialMemory] = {}
            for plan in plans:
                if (key := _shape_key(plan)) not in forecasts:
                    network = plan.network(self._store, n_classes=train.n_classes, device=self._device)
                    forecasts[key] = forecast_trial(plan, network, train.task, batch, device=self._device)
        trials = [forecasts[_shape_key(plan)] for plan in plans]
        free = free_gpu_bytes(self._device) if self._device.type == "cuda" else available_memory_bytes()
        fitting = how_many_fit(trials, free=free)
        together = "in one computation" if trials[0].stacked else "one after the other on each batch"
        self._note(
            f"{len(plans)} trials, {together}: a forecast of up to {max(trial.state for trial in trials) / 1e6:.1f} MB "
            f"each and {max(trial.step for trial in trials) / 1e6:.1f} MB for a step; {fitting} at a time "
            f"({free / 1e6:.0f} MB free)"
        )
        return fitting

    def _train_pass(
        self,
        plans: Sequence[TrialPlan],
        train: FeatureBatches,
        val: FeatureBatches | None,
        checkpoint: Checkpoint | None,
        done: Mapping[str, TrialResult],
    ) -> list[TrialResult]:
        shared = SharedPass(
            self._store, plans, out=self._out, train=train, val=val, device=self._device, checkpoint=checkpoint
        )
        states = shared.run(self._progress, checkpoint_every_s=self._every_s)
        results = self._finish(plans, states, shared, done)
        remove_checkpoint(self._out)
        return results

    def _finish(
        self,
        plans: Sequence[TrialPlan],
        states: Sequence[TrialState],
        shared: SharedPass,
        done: Mapping[str, TrialResult],
    ) -> list[TrialResult]:
        """Write the folder of each trial that has none."""
        failures = {plan.name: state.failure for plan, state in zip(plans, states, strict=True) if state.failure}
        numbers = [n for n, plan in enumerate(plans) if plan.name not in failures and plan.name not in done]
        written = self._write(plans, states, shared, numbers) if numbers else []
        infos: dict[str, RunInfo] = {}
        for number, ended in zip(numbers, written, strict=True):
            if isinstance(ended, RunInfo):
                infos[plans[number].name] = ended
            else:
                failures[plans[number].name] = ended
        for plan, state in zip(plans, states, strict=True):
            if plan.name in failures and plan.folder != self._out:  # a run of its own may be tried again
                failure = Failure(settings=plan.settings, reason=failures[plan.name], seconds=state.seconds)
                write_failure(plan.folder, failure)
        return [
            done.get(plan.name)
            or TrialResult(
                plan=plan,
                info=infos.get(plan.name),
                failure=failures.get(plan.name),
                seconds=state.seconds,
                resumed_after=shared.resumed_after,
            )
            for plan, state in zip(plans, states, strict=True)
        ]

    def _write(
        self,
        plans: Sequence[TrialPlan],
        states: Sequence[TrialState],
        shared: SharedPass,
        numbers: Sequence[int],
    ) -> list[RunInfo | str]:
        """Evaluate the trials of these numbers and write their folders."""
        splits = {} if shared.val is None else {"val": shared.val}
        if self._test and "test" in self._store.splits:
            splits["test"] = plans[0].batches(self._store, "test", device=self._device, resident=False)
        return write_trials(
            self._store,
            [plans[number] for number in numbers],
            [states[number] for number in numbers],
            splits,
            train=shared.train,
            parameters=[shared.parameters[number] for number in numbers],
            trials=len(plans),
            note=self._note,
        )


def _shape_key(plan: TrialPlan) -> object:
    """What trials have in common whose networks are of one size."""
    return (plan.settings.adaptor, tuple(plan.settings.options.items()))
