"""16 trials that share their batches against 16 solo runs, in one warm process.

    python -m benchmarks trials

Both sides are whole calls of the API, run folders and all: `train_trials` on a grid of learning rates and seeds,
against `train_adaptor` once a trial (which draws a picture each; trials share one). Beside the wall clock of the calls
stands that of their epochs alone, and how near the epochs come to reading once and computing 16 times. The store: 800
training and 200 val images of digits, reference backbone.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = 4
EPOCHS = {"linear": 20, "attentive": 2, "mist": 2, "last": 1}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def measure_one(store: Path, adaptor: str, *, rounds: int, epochs: int) -> dict[str, Any]:
    from coldtap.adaptors import TrainingOptions, expand_grid, train_adaptor, train_trials

    ratios: list[tuple[float, float, float]] = []
    for number in range(rounds + 1):
        folder = Path(tempfile.mkdtemp())

        def together(folder: Path = folder) -> Any:
            training = TrainingOptions(epochs=epochs)
            grid = expand_grid({"lr": RATES})
            return train_trials(
                store, adaptor, grid, out=folder / "all", seeds=SEEDS, training=training, device="cpu", test=False
            )

        def alone(folder: Path = folder) -> Any:
            return [
                train_adaptor(
                    store,
                    adaptor,
                    out=folder / f"{lr}-{seed}",
                    lr=lr,
                    seed=seed,
                    order_seed=0,
                    epochs=epochs,
                    device="cpu",
                )
                for lr in RATES
                for seed in range(SEEDS)
            ]

        calls = [together, alone] if number % 2 else [alone, together]
        took = {call.__name__: seconds(call) for call in calls}
        read = reading_seconds(store, adaptor) * epochs
        shared = took["together"][1].results[0].info.epoch_seconds * epochs
        solo = [result.info.epoch_seconds * epochs for result in took["alone"][1]]
        compute = sum(solo) - len(solo) * read
        ratios.append((took["alone"][0] / took["together"][0], sum(solo) / shared, (read + compute) / shared))
        shutil.rmtree(folder)
    calls_, epochs_, goal = (spread(column) for column in zip(*ratios[1:], strict=True))  # the first warms up
    return {"adaptor": adaptor, "epochs": epochs, "calls": calls_, "of_epochs": epochs_, "of_goal": goal}


def reading_seconds(store: Path, adaptor: str) -> float:
    """An epoch's batches of train and val, read and restored, and nothing computed."""
    from coldtap.adaptors import FeatureBatches
    from coldtap.adaptors.networks.kinds import adaptor_kind
    from coldtap.stores import open_store

    opened, kind = open_store(store), adaptor_kind(adaptor)
    spec, _ = kind.plan(opened, kind.options())
    splits = [FeatureBatches(opened, spec, split, batch_size=32) for split in ("train", "val")]

    def read() -> None:
        for _ in splits[0].shuffled(seed=0, epoch=1):
            pass
        for _ in splits[1].ordered():
            pass

    read()
    return seconds(read)[0]


def measure_trials(*, quick: bool = False) -> list[dict[str, Any]]:
    from coldtap import cache_features
    from examples.demo.digits import write_digits

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        images = write_digits(Path(folder) / "digits")
        shutil.rmtree(images / "test")  # solo runs would read it, and trials only for what val chooses
        cache_features(images, store)
        rounds = 1 if quick else 3
        return [
            measure_one(store, adaptor, rounds=rounds, epochs=1 if quick else epochs)
            for adaptor, epochs in EPOCHS.items()
        ]
