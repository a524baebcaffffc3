"""The end of trials: what they keep is evaluated, for all in one pass over a split, and written to their folders."""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version

import torch
from safetensors.torch import save

from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.data.compensated import maps_bytes
from coldtap.adaptors.data.devices import describe_device
from coldtap.adaptors.data.memory import peak_memory_bytes
from coldtap.adaptors.runs.curves import draw_run
from coldtap.adaptors.runs.predictions import SplitPredictions, read_predictions, write_predictions
from coldtap.adaptors.runs.record import RunInfo
from coldtap.adaptors.runs.run_folder import read_weights, write_info, write_run
from coldtap.adaptors.training.grouping import make_learner
from coldtap.adaptors.training.learner import Tensors
from coldtap.adaptors.training.plan import TrialPlan
from coldtap.adaptors.training.split_metrics import Evaluated, evaluate_split
from coldtap.adaptors.training.state import TrialState
from coldtap.stores import Store
from coldtap.stores.format.canonical import sha256
from coldtap.version import __version__


def evaluate_trials(
    store: Store, plans: Sequence[TrialPlan], weights: Sequence[Tensors], batches: FeatureBatches
) -> list[Evaluated]:
    """Evaluate trials on a split, and keep what they say of each sample.

    Args:
        store: The store.
        plans: The trials, over the same features.
        weights: Of each.
        batches: Of the split.
    """
    networks = [plan.network(store, n_classes=batches.n_classes, device=batches.device) for plan in plans]
    for network, values in zip(networks, weights, strict=True):
        network.load_state_dict(values)
    learner = make_learner(plans, networks, batches.task, batches.device)
    return evaluate_split(learner.logits, batches, n_trials=len(plans), keep_rows=True)


def write_trials(
    store: Store,
    plans: Sequence[TrialPlan],
    states: Sequence[TrialState],
    batches: Mapping[str, FeatureBatches],
    *,
    train: FeatureBatches,
    parameters: Sequence[int],
    trials: int,
    note: Callable[[str], None],
) -> list[RunInfo | str]:
    """Evaluate finished trials and write their folders; return what each `run.json` says, or why there is none.

    Args:
        store: The store.
        plans: The trials, over the same features.
        states: Of each, ended.
        batches: Of the splits to evaluate on, by name.
        train: Batches that they learnt from.
        parameters: Of each.
        trials: How many shared the pass.
        note: Called with a sentence where a picture could not be drawn.
    """
    weights = [state.kept() for state in states]
    by_split = {split: evaluate_trials(store, plans, weights, each) for split, each in batches.items()}
    ids = {split: each.sample_ids() for split, each in batches.items()}
    ended: list[RunInfo | str] = []
    for number, (plan, state) in enumerate(zip(plans, states, strict=True)):
        evaluated = {split: found[number] for split, found in by_split.items()}
        if bad := [split for split, found in evaluated.items() if not math.isfinite(found.metrics.loss)]:
            ended.append(f"the {bad[0]} loss of the kept weights is not finite: train again with a lower lr")
            continue
        data, maps = save(weights[number]), plan.maps(store)
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
        predictions = {split: _predictions(ids[split], found) for split, found in evaluated.items()}
        write_predictions(plan.folder, train.task.kind, predictions)
        write_run(plan.folder, info, weights=data, compensation=compensation, epochs=state.records)
        # Trials that share a pass share one picture: drawing one each would take longer than a probe's training.
        if trials == 1:
            draw_run(plan.folder, info, state.records, note)
        ended.append(info)
    return ended


def add_test(store: Store, plans: Sequence[TrialPlan], infos: Sequence[RunInfo], device: torch.device) -> list[RunInfo]:
    """Evaluate finished trials on test, those that have not been before, and add that to their folders.

    Returns:
        What each `run.json` says then.
    """
    infos = list(infos)
    missing = [number for number, info in enumerate(infos) if "test" not in info.metrics]
    if missing:
        batches = plans[0].batches(store, "test", device=device, resident=False)
        untested = [plans[number] for number in missing]
        evaluated = evaluate_trials(store, untested, [read_weights(plan.folder) for plan in untested], batches)
        for number, found in zip(missing, evaluated, strict=True):
            infos[number] = _add_split(plans[number], infos[number], "test", found, batches.sample_ids())
    return infos


def _add_split(plan: TrialPlan, info: RunInfo, split: str, evaluated: Evaluated, ids: Sequence[str]) -> RunInfo:
    """Add a split to a finished run: its predictions first, so that `run.json` never names what is not there."""
    there = read_predictions(plan.folder)
    kept = {name: said for name, said in there.splits.items() if name in info.metrics} if there else {}
    write_predictions(plan.folder, info.target_kind, {**kept, split: _predictions(ids, evaluated)})
    info = replace(info, metrics={**info.metrics, split: evaluated.metrics})
    write_info(plan.folder, info)
    return info


def _predictions(ids: Sequence[str], evaluated: Evaluated) -> SplitPredictions:
    assert evaluated.rows is not None, "what is written was asked to be kept"
    return SplitPredictions(ids=ids, rows=evaluated.rows)


def _info(
    store: Store,
    plan: TrialPlan,
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
