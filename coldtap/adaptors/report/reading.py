"""Run folders into a report: the one place that knows how a run is kept."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from coldtap.adaptors.metrics.metrics import TrialRows
from coldtap.adaptors.report.finding import find_run_folders, short_names
from coldtap.adaptors.report.model import EpochPoint, Outcome, Report, RunReport, SplitScore, StoreReport, Unfinished
from coldtap.adaptors.report.outcome import many_labels, single_label, token_classes
from coldtap.adaptors.report.rerun import NOT_FLAGS, rerun_command
from coldtap.adaptors.report.tables import by_setting
from coldtap.adaptors.runs.predictions import read_predictions
from coldtap.adaptors.runs.record import EpochRecord, RunInfo
from coldtap.adaptors.runs.run_folder import RUN, read_epochs, read_failure, read_run
from coldtap.adaptors.runs.settings import RunSettings
from coldtap.errors import ColdtapError, RunError
from coldtap.stores import Store, open_store
from coldtap.stores.format.rows import SPLITS

UNDER_WAY = "a checkpoint of what is not finished: run the same command again to go on"


@dataclass(frozen=True, slots=True, kw_only=True)
class _NoEnd:
    """A folder without a finished run: why it has none, and the settings of a trial that has failed."""

    reason: str
    failed: RunSettings | None = None


def read_report(paths: Sequence[Path]) -> Report:
    """Read runs, and the runs below folders of trials, into a report.

    Raises:
        RunError: A path is not there, holds a damaged run of its own, or no finished run is among them.
    """
    folders = find_run_folders(paths)
    names = short_names(folders)
    infos: dict[Path, RunInfo] = {}
    unfinished: list[Unfinished] = []
    failed: list[RunSettings] = []
    for folder in folders:
        found = _read(folder, is_given=folder in paths)
        if isinstance(found, RunInfo):
            infos[folder] = found
        else:
            said = _said(found.failed) if found.failed else ""
            unfinished.append(Unfinished(folder=names[folder], settings=said, reason=found.reason))
            failed += [found.failed] if found.failed else []
    if not infos:
        raise RunError(_nothing(paths, unfinished))
    by_store: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for folder, info in infos.items():
        by_store[info.settings.store_digest, info.settings.target].append(folder)
    stores = [_store_report({folder: infos[folder] for folder in group}, names, failed) for group in by_store.values()]
    return Report(stores=tuple(stores), unfinished=tuple(unfinished))


def _nothing(paths: Sequence[Path], unfinished: Sequence[Unfinished]) -> str:
    also = f"; {len(unfinished)} are not: first {unfinished[0].folder}: {unfinished[0].reason}" if unfinished else ""
    where = ", ".join(map(str, paths))
    return f"no finished run at or below {where}{also}. Train one with `train-adaptor`"


def _read(folder: Path, *, is_given: bool) -> RunInfo | _NoEnd:
    try:
        if (info := read_run(folder)) is not None:
            return info
        failure = read_failure(folder)
    except RunError as error:
        if is_given:
            raise
        return _NoEnd(reason=str(error))
    if failure is None:
        return _NoEnd(reason=UNDER_WAY)
    return _NoEnd(reason=failure.reason, failed=failure.settings)


def _said(settings: RunSettings) -> str:
    flat = {"adaptor": settings.adaptor, "lr": settings.lr, "seed": settings.seed, **settings.options}
    return ", ".join(f"{name}={value}" for name, value in flat.items())


def _store_report(
    infos: Mapping[Path, RunInfo], names: Mapping[Path, str], failed: Sequence[RunSettings]
) -> StoreReport:
    first = next(iter(infos.values()))
    store, problem = _open(first)
    runs = [
        _run_report(folder, info, names[folder], _failed_seeds(info.settings, failed)) for folder, info in infos.items()
    ]
    return StoreReport(
        path=first.store,
        digest=first.settings.store_digest,
        target=first.settings.target,
        problem=problem,
        encoding=None if store is None else f"{store.recipe.encoding.tier}, {store.recipe.encoding.layout}",
        runs=tuple(run for group in by_setting(runs) for run in group),
    )


def _open(info: RunInfo) -> tuple[Store | None, str | None]:
    """The store of a run if it is still where it was; else why not."""
    try:
        store = open_store(info.store)
    except (ColdtapError, OSError) as error:
        return None, str(error)
    if store.digest != info.settings.store_digest:
        return None, f"the store at {info.store} is another one now: its digest is {store.digest[:12]}"
    return store, None


def _failed_seeds(settings: RunSettings, failed: Sequence[RunSettings]) -> tuple[int, ...]:
    """The seeds with which trials failed that are equal to this one but for the seed."""
    alike = (other for other in failed if _without_seeds(other) == _without_seeds(settings))
    return tuple(sorted({other.seed for other in alike}))


def _without_seeds(settings: RunSettings) -> RunSettings:
    return dataclasses.replace(settings, seed=0, order_seed=0)


def _run_report(folder: Path, info: RunInfo, name: str, failed_seeds: tuple[int, ...]) -> RunReport:
    epochs = _epochs(folder)
    return RunReport(
        name=name,
        folder=str(folder),
        adaptor=info.settings.adaptor,
        settings={key: value for key, value in dataclasses.asdict(info.settings).items() if key not in NOT_FLAGS},
        options=info.settings.options,
        command=rerun_command(folder, info.store, info.settings),
        metric=info.metric,
        splits={split: _score(info, split) for split in sorted(info.metrics, key=SPLITS.index)},
        epochs=tuple(_point(record) for record in epochs),
        best_epoch=info.best_epoch,
        parameters=info.parameters,
        features=f"{info.features.array}, taps {', '.join(map(str, info.features.taps))}",
        bytes_per_sample=info.bytes_per_sample or None,
        epoch_seconds=info.epoch_seconds,
        seconds=_seconds(info, epochs),
        peak_memory_bytes=info.peak_memory_bytes,
        n_sharing=info.trials,
        residency=info.residency.reason,
        device=info.device,
        versions=info.versions,
        written=datetime.fromtimestamp((folder / RUN).stat().st_mtime, UTC),
        backbone=info.model,
        extractor_digest=info.extractor_digest,
        weights_digest=str(info.extractor.get("weights", "")),
        adaptor_digest=info.adaptor_sha256,
        outcome=_outcome(folder, info),
        failed_seeds=failed_seeds,
    )


def _score(info: RunInfo, split: str) -> SplitScore:
    metrics = info.metrics[split]
    others = {name: score for name, score in metrics.scores.items() if name != info.metric}
    return SplitScore(score=metrics.score, others=others, loss=metrics.loss, n_samples=metrics.n_samples)


def _epochs(folder: Path) -> tuple[EpochRecord, ...]:
    """The table of epochs; none where it is missing or damaged, which costs the page its curves and nothing else."""
    try:
        return read_epochs(folder)
    except RunError:
        return ()


def _point(record: EpochRecord) -> EpochPoint:
    return EpochPoint(
        epoch=record.epoch, train_loss=record.train_loss, val_loss=record.val_loss, val_score=record.val_score
    )


def _seconds(info: RunInfo, epochs: Sequence[EpochRecord]) -> float | None:
    """Seconds of training; earlier formats do not say a trial's share, so it is an equal one of its epochs'."""
    return info.seconds or (sum(record.seconds for record in epochs) / info.trials if epochs else None)


def _outcome(folder: Path, info: RunInfo) -> Outcome | str:
    """The predictions of test, or of val where there is no test, summed up; else a sentence."""
    try:
        predictions = read_predictions(folder)
        if predictions is None:
            return "The run folder has no predictions, so there is nothing to say of single classes and samples."
        split = "test" if "test" in predictions.splits else "val"
        said = predictions.split(split)
        return _summed(info, split, said.ids, said.rows)
    except (RunError, ValueError, IndexError) as error:
        return f"There is nothing to say of single classes and samples: {error}."


def _summed(info: RunInfo, split: str, ids: Sequence[str], rows: TrialRows) -> Outcome:
    names = info.class_names or tuple(str(number) for number in range(info.n_classes))
    sum_up = {"class": single_label, "labels": many_labels, "token-class": token_classes}[info.target_kind]
    return sum_up(split, names, ids, rows)
