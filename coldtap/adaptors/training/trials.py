"""Many trials of one adaptor on one store: a run folder each, a table and a picture of all, and the choice by val."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.runs.curves import draw_picture, draw_trials
from coldtap.adaptors.runs.run_folder import read_epochs
from coldtap.adaptors.training.finish import add_test
from coldtap.adaptors.training.grid import trial_options
from coldtap.adaptors.training.loop import Progress
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.adaptors.training.plan import plan_trial
from coldtap.adaptors.training.runner import TrialResult, train_planned
from coldtap.device import choose_device
from coldtap.errors import RunError
from coldtap.stores import Store, open_store
from coldtap.stores.storage.address import Place, place_of, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.text import csv_cell, text_table

TABLE = "trials.csv"
PICTURE = "trials.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """All trials in the order in which they were asked for, and those of the setting that val chose, a seed each."""

    path: Path | Storage
    results: tuple[TrialResult, ...]
    chosen: tuple[TrialResult, ...]


def train_trials(
    store: Store | Place,
    adaptor: str,
    trials: Sequence[Mapping[str, object]],
    *,
    out: Place,
    seeds: int = 1,
    training: TrainingOptions | None = None,
    settings: Mapping[str, object] | None = None,
    device: str = "auto",
    resident: bool | None = None,
    test: bool = True,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    checkpoint_every_s: float = 5.0,
) -> Trials:
    """Train trials that share each batch, every one with every seed; return all of them and the chosen ones.

    The setting with the best mean val score over its seeds is chosen (of equals the first), and only its trials are
    evaluated on test. A trial that diverges ends with its reason in `failed.json`, and the others go on. A
    trial's result is that of `train_adaptor` with its seed and `order_seed`: in equal bits where trials run
    side by side, to rounding where they are computed as one.

    Args:
        store: A store, its path or its storage.
        adaptor: The name of an adaptor, or `module:NAME`.
        trials: Of each its own settings by name: the adaptor's options, or those of `TRAINING_KEYS`. `expand_grid`
            makes them of a grid; an optimiser such as Optuna asks for them.
        out: Folder, or storage, of the trials' run folders and of their table. Called again, it does what is left.
        seeds: Number of seeds: `training.seed` and those after it. They decide start and dropout, not the order.
        training: How all of them are trained.
        settings: The adaptor's options that all have.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resident: Whether to keep features in memory; None decides by their size.
        test: Whether to evaluate the chosen trials on test, where the store has it.
        progress: Called after every epoch.
        note: Told, a sentence each, what was decided.
        checkpoint_every_s: Seconds between checkpoints at least.

    Raises:
        OptionError: An option or a grid has a value that cannot be used.
        StoreError: The store is incomplete, damaged, or lacks what the adaptor needs.
        SourceError: The store has no train or val split, or nothing to learn from.
        RunError: `out` holds other runs or damaged files, or every trial has diverged.
        MachineError: No such device, or the folder cannot be written.
        InterruptedRunError: Ctrl-C; what was done is kept.
    """
    store = store if isinstance(store, Store) else open_store(store)
    folder = storage_at(out)
    kind, place = adaptor_kind(adaptor), choose_device(device)
    asked = trial_options(
        adaptor, kind.options, trials, training=training or TrainingOptions(), options=settings or {}, seeds=seeds
    )
    results = train_planned(
        store,
        [plan_trial(store, each, folder=folder.below(each.name)) for each in asked],
        out=folder,
        device=place,
        resident=resident,
        test=False,
        progress=progress,
        note=note,
        checkpoint_every_s=checkpoint_every_s,
    )
    chosen = choose(results)
    if test and "test" in store.splits:
        infos = [info for number in chosen if (info := results[number].info) is not None]
        tested = add_test(store, [results[number].plan for number in chosen], infos, place)
        for number, info in zip(chosen, tested, strict=True):
            results[number] = replace(results[number], info=info)
    folder.put(TABLE, [table_csv(results, chosen)])
    _draw(folder, results, chosen, f"{adaptor} on {store.name}", note)
    if not chosen:
        reason = next(result.failure for result in results if result.failure is not None)
        table = folder.describe(TABLE)
        raise RunError(f"every setting has a trial without a result; {table} says why; the first: {reason}")
    return Trials(path=place_of(folder), results=tuple(results), chosen=tuple(results[number] for number in chosen))


def choose(results: Sequence[TrialResult]) -> list[int]:
    """Return the numbers of the trials of the setting with the best mean val score over its seeds, ascending.

    A setting of which a trial has failed is not chosen; of equals it is the first. Empty where all have failed.
    """
    by_setting: dict[tuple[tuple[str, object], ...], list[int]] = {}
    for number, result in enumerate(results):
        by_setting.setdefault(tuple(result.setting.varied.items()), []).append(number)
    whole = [numbers for numbers in by_setting.values() if all(results[number].info is not None for number in numbers)]
    return max(whole, key=lambda numbers: statistics.mean(val_score(results[n]) for n in numbers), default=[])


def val_score(result: TrialResult) -> float:
    """Return a trial's deciding score on val."""
    assert result.info is not None, "the trial has failed"
    return result.info.metrics["val"].score


def _draw(
    folder: Storage,
    results: Sequence[TrialResult],
    chosen: Sequence[int],
    title: str,
    note: Callable[[str], None] | None,
) -> None:
    """Draw the val scores of all trials that have a result."""
    found = [result for result in results if result.info is not None]
    curves = {result.plan.name: read_epochs(result.plan.folder) for result in found}
    metric = next((result.info.metric for result in found if result.info), "")
    names = [results[number].plan.name for number in chosen]
    draw_picture(folder, PICTURE, lambda: draw_trials(curves, chosen=names, title=title, metric=metric), note)


def table_rows(results: Sequence[TrialResult], chosen: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Return a header and one line a trial: its setting, scores, cost, and how it has ended; best on val first."""

    def rank(number: int) -> tuple[bool, float]:
        result = results[number]
        return result.info is None, -val_score(result) if result.info else 0.0

    keys = list(dict.fromkeys(key for result in results for key in result.setting.varied))
    header = [*keys, "seed", "val", "test", "epoch", "parameters", "seconds", "chosen", "failure"]
    lines = []
    for number in sorted(range(len(results)), key=rank):
        result, info = results[number], results[number].info
        setting = [*(result.setting.varied.get(key, "") for key in keys), result.setting.training.seed]
        if info is None:
            lines.append([*setting, *[""] * 6, result.failure])
            continue
        # A grid that has grown may have chosen another setting before: what is not chosen now shows no test score.
        shown = ("val", "test") if number in chosen else ("val",)
        scores = [
            f"{info.metrics[split].score:.4f}" if split in shown and split in info.metrics else ""
            for split in ("val", "test")
        ]
        cost = [info.best_epoch, info.parameters, f"{result.seconds:.2f}"]
        lines.append([*setting, *scores, *cost, "yes" if number in chosen else "", ""])
    return header, [[str(cell) for cell in line] for line in lines]


def table_csv(results: Sequence[TrialResult], chosen: Sequence[int]) -> bytes:
    """Return the table of trials as CSV."""
    text = io.StringIO()
    header, lines = table_rows(results, chosen)
    csv.writer(text, lineterminator="\n").writerows([map(csv_cell, line) for line in (header, *lines)])
    return text.getvalue().encode()


def trials_table(trials: Trials) -> str:
    """Return the table of trials as text."""
    chosen = [number for number, result in enumerate(trials.results) if result in trials.chosen]
    return text_table(*table_rows(trials.results, chosen))
