"""How an accuracy is come by: which splits are learnt from, what chooses a setting, and when test is read.

val   every setting with every seed on train; the best mean val score chooses; its trials, as they are, are tested
vtab  every setting on train with the first seed; the val score after the last epoch chooses; with every seed the
      chosen setting learns anew from train and val, and is tested once, after the last epoch

`vtab` is the two-stage use of VTAB-1K (arXiv 1910.04867): 800 images to fit, 200 to choose, all 1,000 for the result.
Codes of the field differ in it, and some choose on test; `docs/methods.md` says more.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from coldtap.adaptors.runs.record import RunInfo
from coldtap.adaptors.training.loop import Progress
from coldtap.adaptors.training.options import TrainingOptions, TrialOptions
from coldtap.adaptors.training.plan import TrialPlan, plan_trial
from coldtap.adaptors.training.runner import train_planned
from coldtap.adaptors.training.trials import Trials, train_trials, val_score
from coldtap.device import choose_device
from coldtap.errors import OptionError, RunError, SourceError
from coldtap.stores import Store, open_store
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage

type Protocol = Literal["val", "vtab"]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol.__value__)
SEARCH, REFIT = "search", "refit"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolResult:
    """What an adaptor reaches on a store.

    Attributes:
        metric: Name of the score.
        setting: What was chosen, by name.
        val: Scores of the chosen setting on val, one a seed that searched.
        test: Its scores on test, one a seed.
        runs: Folders of the tested runs, one a seed.
        parameters: Trainable ones.
        bytes_per_sample: Stored bytes that a sample's features take.
        seconds: Of the epochs of all trials, those that failed included.
    """

    metric: str
    setting: Mapping[str, object]
    val: tuple[float, ...]
    test: tuple[float, ...]
    runs: tuple[Path | Storage, ...]
    parameters: int
    bytes_per_sample: float
    seconds: float


def run_protocol(
    store: Store | Place,
    adaptor: str,
    trials: Sequence[Mapping[str, object]],
    *,
    protocol: str = "val",
    out: Place,
    seeds: int = 1,
    training: TrainingOptions | None = None,
    settings: Mapping[str, object] | None = None,
    device: str = "auto",
    resident: bool | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    checkpoint_every_s: float = 5.0,
) -> ProtocolResult:
    """Fit, choose and test an adaptor on a store by a protocol; called again, do what is left.

    Args:
        store: A store, its path or its storage, with train, val and test.
        adaptor: The name of an adaptor, or `module:NAME`.
        trials: The settings to choose from, as `train_trials` takes them.
        protocol: `val` or `vtab`.
        out: Folder, or storage, of all runs.
        seeds: Number of seeds of the result.
        training: How all are trained.
        settings: The adaptor's options that all have.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resident: Whether to keep features in memory; None decides by their size.
        progress: Called after every epoch.
        note: Told, a sentence each, what was decided.
        checkpoint_every_s: Seconds between checkpoints at least.

    Raises:
        OptionError: No such protocol, or as `train_trials` does.
        SourceError: The store has no test split.
        RunError: Every trial, or a refitted one, has diverged; or as `train_trials` does.
    """
    store = store if isinstance(store, Store) else open_store(store)
    folder, training = storage_at(out), training or TrainingOptions()
    if protocol not in PROTOCOLS:
        raise OptionError(f"protocol={protocol}: it must be one of {', '.join(PROTOCOLS)}")
    if "test" not in store.splits:
        raise SourceError(f"{store.storage} has no test split, which a protocol ends with: cache again without `split`")
    two_stages = protocol == "vtab"
    if two_stages and (training.patience is not None or any("patience" in trial for trial in trials)):
        raise OptionError(
            "protocol=vtab keeps the last epoch, since its refit has no val to stop by: leave patience out"
        )
    how: dict[str, Any] = {
        "resident": resident,
        "progress": progress,
        "note": note,
        "checkpoint_every_s": checkpoint_every_s,
    }
    searched = train_trials(
        store,
        adaptor,
        trials,
        out=folder.below(SEARCH) if two_stages else folder,
        seeds=1 if two_stages else seeds,
        training=replace(training, keep="last") if two_stages else training,
        settings=settings,
        device=device,
        test=not two_stages,
        **how,
    )
    seconds = sum(result.seconds for result in searched.results)
    if not two_stages:
        runs = [(result.path, result.info) for result in searched.chosen if result.info is not None]
        return _result(searched, runs, seconds)
    refits = folder.below(REFIT)
    plans = _refits(store, searched.chosen[0].setting, seeds, refits)
    refitted = train_planned(store, plans, out=refits, device=choose_device(device), test=True, **how)
    if failed := [result for result in refitted if result.info is None]:
        raise RunError(f"{failed[0].path}: {failed[0].failure}")
    runs = [(result.path, result.info) for result in refitted if result.info is not None]
    return _result(searched, runs, seconds + sum(result.seconds for result in refitted))


def _refits(store: Store, chosen: TrialOptions, seeds: int, out: Storage) -> list[TrialPlan]:
    """Return plans of the chosen setting on train and val together, one per seed."""
    first = chosen.training
    again = [
        replace(chosen, training=replace(first, seed=seed, order_seed=first.order_seed, fit="train+val"))
        for seed in range(first.seed, first.seed + seeds)
    ]
    return [plan_trial(store, each, folder=out.below(each.name)) for each in again]


def _result(searched: Trials, runs: Sequence[tuple[Path | Storage, RunInfo]], seconds: float) -> ProtocolResult:
    first = runs[0][1]
    return ProtocolResult(
        metric=first.metric,
        setting=dict(searched.chosen[0].setting.varied),
        val=tuple(val_score(result) for result in searched.chosen),
        test=tuple(info.metrics["test"].score for _, info in runs),
        runs=tuple(folder for folder, _ in runs),
        parameters=first.parameters,
        bytes_per_sample=first.bytes_per_sample,
        seconds=seconds,
    )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation (n − 1) of some scores; of one score the deviation is 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
