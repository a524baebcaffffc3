"""Training one adaptor from a store: no backbone, no image.

AdamW, a linear warm-up and a cosine, the best epoch chosen on val, the test split read once at the end. A run is
resumable: killed at any moment and started again, on the CPU it ends in the same bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from coldtap.adaptors.checkpoint import remove_checkpoint
from coldtap.adaptors.devices import choose_device
from coldtap.adaptors.epoch_order import SHUFFLES
from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.networks.options import parse_options, require_at_least, require_positive, require_probability
from coldtap.adaptors.run import Progress, Run, RunResult
from coldtap.adaptors.run_folder import RunSettings, read_run, require_equal
from coldtap.stores import Store, open_store
from coldtap.stores.durable import machine_errors
from coldtap.stores.errors import InterruptedRunError, OptionError, RunError
from coldtap.stores.recipe_file import RECIPE


def train_adaptor(
    store: Store | str | Path,
    adaptor: str = "mist",
    *,
    out: str | Path,
    epochs: int = 100,
    lr: float | None = None,
    batch_size: int = 32,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    device: str = "auto",
    resident: bool | None = None,
    shuffle: str = "uniform",
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    checkpoint_every_s: float = 5.0,
) -> RunResult:
    """Trains an adaptor on a store's train split and leaves a run folder.

    The epoch that is kept has the best val accuracy; among equals the lower val loss wins, then the earlier epoch.

    Args:
        store: A store or its path.
        adaptor: `linear`, `mist` or `last`.
        out: The run folder. A finished run of equal settings is returned as it is, an unfinished one goes on.
        epochs: Passes over the train split.
        lr: Peak learning rate; None is the adaptor's own default.
        batch_size: Samples a step.
        weight_decay: Of matrices; biases and norms have none.
        warmup: Share of all steps in which the learning rate rises.
        settings: The adaptor's own options, such as `{"rank": 4}` or `{"rank": "4"}`.
        seed: Decides the start, the order of samples, the views drawn and dropout.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resident: Whether to keep features in memory; None decides by their size.
        shuffle: `uniform`, or `block`, which reads rows near each other, for a store far larger than memory.
        progress: Called after every epoch.
        note: Told, a sentence each, what the run decided: where features are kept, how far its shuffle is from uniform.
        checkpoint_every_s: Seconds between checkpoints at least, more where writing is slow; 0 writes one a step.

    Raises:
        OptionError: An option has a value that cannot be used.
        StoreError: The store is incomplete, damaged, or lacks what the adaptor needs.
        SourceError: The store has no train or val split, or a single class.
        RunError: `out` holds a run of other settings or damaged files, or the loss is no longer finite.
        MachineError: No such device, or the folder cannot be written.
        InterruptedRunError: Ctrl-C; what was done is kept.
    """
    store = store if isinstance(store, Store) else open_store(store)
    kind = adaptor_kind(adaptor)
    peak = kind.lr if lr is None else lr
    if shuffle not in SHUFFLES:
        raise OptionError(f"shuffle={shuffle}: it must be one of {', '.join(SHUFFLES)}")
    _check_arguments(epochs=epochs, lr=peak, batch_size=batch_size, weight_decay=weight_decay, warmup=warmup, seed=seed)
    features, options = kind.plan(store, parse_options(kind.options, settings or {}, adaptor=adaptor))
    run_settings = RunSettings(
        adaptor=adaptor,
        options=asdict(options),
        epochs=epochs,
        lr=peak,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        seed=seed,
        store_digest=store.digest,
        extractor_digest=store.recipe.extractor_digest,
        shuffle=shuffle,
    )
    out = Path(out)
    _make_folder(out)
    if (info := read_run(out)) is not None:
        require_equal(info.settings, run_settings, out)
        remove_checkpoint(out)
        return RunResult(path=out, info=info, resumed_after=0, was_finished=True)
    chosen = choose_device(device)
    try:
        run = Run(store, kind, features, options, run_settings, out, device=chosen, resident=resident)
    except KeyboardInterrupt as error:
        raise InterruptedRunError(f"interrupted while {store.path} was read: run the same command again") from error
    if note is not None:
        note(f"features {run.train.residency.reason}")
        if run.train.mixing is not None:
            note(str(run.train.mixing))
    return run.finish(progress, checkpoint_every_s=checkpoint_every_s)


def _check_arguments(*, epochs: int, lr: float, batch_size: int, weight_decay: float, warmup: float, seed: int) -> None:
    require_at_least(1, epochs=epochs, batch_size=batch_size)
    require_at_least(0, seed=seed)
    require_positive(lr=lr)
    require_probability(warmup=warmup)
    if not 0 <= weight_decay < float("inf"):
        raise OptionError(f"weight_decay={weight_decay}: it must be 0 or more, and finite")


def _make_folder(out: Path) -> None:
    if (out / RECIPE).exists():
        raise RunError(f"--out {out} is a store: choose a folder of its own for the run")
    try:
        with machine_errors(out):
            out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"--out {out} is a file, or lies in one: choose a folder") from error
