"""The end of trials: what they keep is evaluated, for all in one pass over a split, and written to their folders."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save

from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.data.compensated import maps_bytes, maps_of
from coldtap.adaptors.data.devices import describe_device
from coldtap.adaptors.data.memory import peak_memory_bytes
from coldtap.adaptors.runs.curves import draw_curves
from coldtap.adaptors.runs.predictions import SplitPredictions, read_predictions, write_predictions
from coldtap.adaptors.runs.run_folder import RunInfo, SplitMetrics, write_info, write_run
from coldtap.adaptors.training.checkpoint import TrialState
from coldtap.adaptors.training.learner import Tensors
from coldtap.adaptors.training.plan import PlannedTrial
from coldtap.adaptors.training.side_by_side import make_learners
from coldtap.stores import Store
from coldtap.stores.format.canonical import sha256
from coldtap.version import __version__


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What one trial reaches on a split, and what it says of each sample."""

    metrics: SplitMetrics
    predictions: SplitPredictions


def evaluate(
    store: Store, plans: Sequence[PlannedTrial], weights: Sequence[Tensors], batches: FeatureBatches
) -> list[Evaluated]:
    """Evaluates trials on a split that is read once for all of them.

    Args:
        store: The store.
        plans: The trials, over the same features.
        weights: Of each.
        batches: Of the split.
    """
    device = batches.device
    members = []
    for plan, values in zip(plans, weights, strict=True):
        member = plan.member(store, n_classes=batches.n_classes, device=device)
        member.network.load_state_dict(values)
        members.append(member)
    learners = make_learners(members, batches.task, device, row_shape=plans[0].features.row_shape)
    tallies = [
        batches.task.tally(n_trials=len(numbers), n_classes=batches.n_classes, device=device, keep_rows=True)
        for _, numbers in learners
    ]
    for batch in batches.ordered():
        for tally, (learner, _) in zip(tallies, learners, strict=True):
            tally.add(learner.logits(batch.features), batch.targets)
    ids, found = batches.sample_ids(), {}
    for tally, (_, numbers) in zip(tallies, learners, strict=True):
        for number, scores, loss, rows in zip(numbers, tally.scores(), tally.losses(), tally.rows(), strict=True):
            metrics = SplitMetrics(
                score=scores[batches.task.metric], scores=scores, loss=loss, n_samples=batches.n_samples
            )
            found[number] = Evaluated(metrics=metrics, predictions=SplitPredictions(ids=ids, rows=rows))
    return [found[number] for number in range(len(plans))]


def write_trials(
    store: Store,
    plans: Sequence[PlannedTrial],
    states: Sequence[TrialState],
    batches: Mapping[str, FeatureBatches],
    *,
    train: FeatureBatches,
    parameters: Sequence[int],
    trials: int,
) -> list[RunInfo | str]:
    """Evaluates finished trials and writes their folders; returns what each `run.json` says, or why there is none.

    Args:
        store: The store.
        plans: The trials, over the same features.
        states: Of each, ended.
        batches: Of the splits to evaluate on, by name.
        train: Batches that they learnt from.
        parameters: Of each.
        trials: How many shared the pass.
    """
    weights = [state.kept() for state in states]
    by_split = {split: evaluate(store, plans, weights, of) for split, of in batches.items()}
    ended: list[RunInfo | str] = []
    for number, (plan, state) in enumerate(zip(plans, states, strict=True)):
        evaluated = {split: found[number] for split, found in by_split.items()}
        if bad := [split for split, found in evaluated.items() if not math.isfinite(found.metrics.loss)]:
            ended.append(f"the {bad[0]} loss of the kept weights is not finite: train again with a lower lr")
            continue
        data, maps = save(weights[number]), maps_of(store, plan.features, plan.settings.compensation)
        compensation = None if maps is None else maps_bytes(maps)
        info = _info(
            store,
            plan,
            state,
            evaluated,
            train,
            parameters=parameters[number],
            trials=trials,
            weights=data,
            compensation=compensation,
        )
        title = f"{plan.settings.adaptor} on {store.name}, {parameters[number]:,} parameters"
        # Trials that share a pass share one picture: drawing one each would take longer than a probe's training.
        picture = draw_curves(state.records, best=state.best, title=title, metric=info.metric) if trials == 1 else None
        predictions = {split: found.predictions for split, found in evaluated.items()}
        write_predictions(plan.folder, train.task.kind, predictions)
        write_run(plan.folder, info, weights=data, compensation=compensation, epochs=state.records, picture=picture)
        ended.append(info)
    return ended


def add_split(folder: Path, info: RunInfo, split: str, evaluated: Evaluated) -> RunInfo:
    """Adds a split to a finished run: its predictions first, so that `run.json` never names what is not there."""
    there = read_predictions(folder)
    kept = {name: said for name, said in there.splits.items() if name in info.metrics} if there else {}
    write_predictions(folder, info.target_kind, {**kept, split: evaluated.predictions})
    info = replace(info, metrics={**info.metrics, split: evaluated.metrics})
    write_info(folder, info)
    return info


def _info(
    store: Store,
    plan: PlannedTrial,
    state: TrialState,
    evaluated: Mapping[str, Evaluated],
    train: FeatureBatches,
    *,
    parameters: int,
    trials: int,
    weights: bytes,
    compensation: bytes | None,
) -> RunInfo:
    on_gpu = train.device.type == "cuda"
    return RunInfo(
        settings=plan.settings,
        features=plan.features,
        target_kind=train.task.kind,
        metric=train.task.metric,
        n_classes=train.n_classes,
        class_names=store.class_names(plan.settings.target),
        parameters=parameters,
        metrics={split: found.metrics for split, found in evaluated.items()},
        best_epoch=state.best,
        epoch_seconds=sum(record.seconds for record in state.records) / len(state.records),
        peak_memory_bytes=torch.cuda.max_memory_allocated(train.device) if on_gpu else peak_memory_bytes(),
        device=describe_device(train.device),
        residency=train.residency,
        versions=_versions(),
        store=str(store.storage),
        model=store.recorded["model"],
        extractor=store.recipe.extractor.to_dict(),
        adaptor_sha256=sha256(weights),
        mixing=None if train.mixing is None else str(train.mixing),
        trials=trials,
        seconds=state.seconds,
        bytes_per_sample=train.bytes_per_sample,
        compensation_sha256=None if compensation is None else sha256(compensation),
    )


def _versions() -> dict[str, str]:
    libraries = {package: version(package) for package in ("torch", "numpy")}
    return {"coldtap": __version__, "python": platform.python_version(), **libraries}
