"""Training one adaptor from a store: no backbone, no image.

AdamW, a linear warm-up and a cosine, the best epoch chosen on val, the test split read once at the end. A run is
resumable: killed at any moment and started again, on the CPU it ends in the same bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coldtap.adaptors.runs.record import RunInfo
from coldtap.adaptors.runs.settings import Fit, Keep
from coldtap.adaptors.training.checkpoint import remove_checkpoint
from coldtap.adaptors.training.loop import Progress
from coldtap.adaptors.training.options import TrainingOptions, TrialOptions
from coldtap.adaptors.training.plan import plan_trial
from coldtap.adaptors.training.runner import train_planned
from coldtap.device import choose_device
from coldtap.errors import RunError
from coldtap.stores import Store, open_store
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run: its folder, what `run.json` says, and what this call had to do.

    `resumed_after` is the number of epochs that an earlier, interrupted call had done.
    """

    path: Path | Storage
    info: RunInfo
    resumed_after: int
    was_finished: bool


def train_adaptor(
    store: Store | Place,
    adaptor: str = "mist",
    *,
    out: Place,
    epochs: int = 100,
    lr: float | None = None,
    batch_size: int = 32,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    label_smoothing: float = 0.0,
    patience: int | None = None,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    order_seed: int | None = None,
    target: str = "label",
    fit: Fit = "train",
    keep: Keep = "best",
    compensation: str | None = None,
    device: str = "auto",
    resident: bool | None = None,
    shuffle: str = "uniform",
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    checkpoint_every_s: float = 5.0,
) -> RunResult:
    """Train an adaptor on a store's train split and leave a run folder.

    The epoch that is kept has the best val score; among equals the lower val loss wins, then the earlier epoch.

    Args:
        store: A store, its path or its storage.
        adaptor: The name of an adaptor, or `module:NAME`.
        out: The run folder, or its storage. A finished run of equal settings is returned as it is, an
            unfinished one goes on.
        epochs: Passes over the train split.
        lr: Peak learning rate; None is the adaptor's own default.
        batch_size: Samples a step.
        weight_decay: Of matrices; biases and norms have none.
        warmup: Share of all steps in which the learning rate rises.
        label_smoothing: Share of each target that is spread evenly over the classes.
        patience: Epochs without a better val score after which the run ends; None trains all of them.
        settings: The adaptor's own options, such as `{"rank": 4}` or `{"rank": "4"}`.
        seed: Decides the start and dropout.
        order_seed: Decides the order of samples and the views drawn; None is the seed.
        target: Name of the targets.
        fit: The splits that are learnt from: `train`, or `train+val`.
        keep: The epoch that is kept: `best`, by val, or `last`.
        compensation: Name of the store's compensation that features go through; the run carries its map.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resident: Whether to keep features in memory; None decides by their size.
        shuffle: `uniform`, or `block`, which reads rows near each other, for a store far larger than memory.
        progress: Called after every epoch.
        note: Told, a sentence each, what the run decided: where features are kept, how far its shuffle is from uniform.
        checkpoint_every_s: Seconds between checkpoints at least, more where writing is slow; 0 writes one a step.

    Raises:
        OptionError: An option has a value that cannot be used.
        StoreError: The store is incomplete, damaged, or lacks what the adaptor needs.
        SourceError: The store has no train or val split, or nothing to learn from.
        RunError: `out` holds a run of other settings or damaged files, or the loss is no longer finite.
        MachineError: No such device, or the folder cannot be written.
        InterruptedRunError: Ctrl-C; what was done is kept.
    """
    store = store if isinstance(store, Store) else open_store(store)
    folder = storage_at(out)
    training = TrainingOptions(
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        label_smoothing=label_smoothing,
        patience=patience,
        seed=seed,
        order_seed=order_seed,
        shuffle=shuffle,
        target=target,
        fit=fit,
        keep=keep,
        compensation=compensation,
    )
    asked = TrialOptions(adaptor=adaptor, training=training, options=settings or {})
    result = train_planned(
        store,
        [plan_trial(store, asked, folder=folder)],
        out=folder,
        device=choose_device(device),
        resident=resident,
        test=True,
        progress=progress,
        note=note,
        checkpoint_every_s=checkpoint_every_s,
    )[0]
    if result.info is None:
        raise RunError(f"{result.failure}, into another `out`")
    if result.was_finished:
        remove_checkpoint(folder)
    return RunResult(
        path=result.path, info=result.info, resumed_after=result.resumed_after, was_finished=result.was_finished
    )
