"""Adaptor training from the store against the same adaptor with the backbone run in every step.

Both sides run coldtap's own training step (`Fitter`), with equal images, order, batches and optimizer; only where
the features come from differs. Every measurement has a process of its own, and memory counts from what the process
held when all its imports were done.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import own_process, peak_bytes, resident_bytes
from benchmarks.pictures import Pictures, decode, encoded_images
from coldtap.adaptors.batches import Batch, FeatureBatches
from coldtap.adaptors.epoch_order import epoch_draw
from coldtap.adaptors.fitting import Fitter, make_optimizer
from coldtap.adaptors.networks.contract import FeatureSpec, copy_final_norm
from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.run_folder import RunSettings
from coldtap.stores import Store, open_store

MODEL = "coldtap/vit-reference"
SIDE = 32
BATCH_SIZE = 32
SEED = 0
WAYS = {"store, held in memory": True, "store, read batch by batch": False, "backbone in every step": None}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    adaptors: tuple[str, ...]
    n_images: int
    epochs: int


PLAN = Plan(adaptors=("linear", "mist", "last"), n_images=512, epochs=4)
QUICK = Plan(adaptors=("mist",), n_images=64, epochs=2)


def measure_training(*, quick: bool) -> list[dict[str, Any]]:
    """A record for each adaptor and way; time and memory against those of the backbone in every step."""
    plan = QUICK if quick else PLAN
    records = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        with own_process(OMP_WAIT_POLICY="PASSIVE") as process:
            process.submit(make_store, store, plan).result()
        for adaptor in plan.adaptors:
            of_adaptor = [_measure(store, plan, adaptor, way) for way in WAYS]
            for record in of_adaptor:
                record["time_ratio"] = of_adaptor[-1]["epoch_s"] / record["epoch_s"]
                record["memory_ratio"] = of_adaptor[-1]["memory_bytes"] / record["memory_bytes"]
            records += of_adaptor
    return records


def _measure(store: Path, plan: Plan, adaptor: str, way: str) -> dict[str, Any]:
    with own_process(OMP_WAIT_POLICY="PASSIVE") as process:
        return {"adaptor": adaptor, "way": way, **process.submit(train, store, plan, adaptor, WAYS[way]).result()}


# What follows runs in the processes that are measured.


def make_store(store: Path, plan: Plan) -> None:
    from coldtap import cache_features

    images = encoded_images(SIDE)
    cache_features({"train": Pictures(images, plan.n_images), "val": Pictures(images, 10)}, store, model=MODEL)


def train(path: Path, plan: Plan, adaptor: str, resident: bool | None) -> dict[str, Any]:
    """Epochs of one adaptor; `resident` None runs the backbone. The first epoch warms up."""
    if resident is None:
        import coldtap.pipeline.backbone
        import coldtap.pipeline.gather  # noqa: F401
    _take_a_step()
    imported = resident_bytes()
    store, kind = open_store(path), adaptor_kind(adaptor)
    spec, options = kind.plan(store, kind.options())
    batches: Any = (
        BackboneBatches(store, spec)
        if resident is None
        else FeatureBatches(store, spec, "train", batch_size=BATCH_SIZE, resident=resident)
    )
    model = kind.build(spec, options, n_classes=store.n_classes)
    copy_final_norm(model, store.norm)
    settings = _settings(store, adaptor, plan.epochs, kind.lr)
    fitter = Fitter(model, settings, torch.device("cpu"), n_batches=batches.n_batches)
    seconds = []
    for epoch in range(1, plan.epochs + 1):
        began = time.perf_counter()
        loss = fitter.fit_epoch(batches, epoch)
        seconds.append(time.perf_counter() - began)
    peak = peak_bytes()
    return {
        "epoch_s": statistics.median(seconds[1:]),
        "last_loss": loss,
        "memory_bytes": peak - imported,
        "peak_bytes": peak,
    }


def _take_a_step() -> None:
    """Make torch load what it loads at the first step only: 180 MB of compiler that nothing here uses."""
    model = torch.nn.Linear(2, 2)
    torch.nn.functional.cross_entropy(model(torch.zeros(2, 2)), torch.zeros(2, dtype=torch.int64)).backward()
    make_optimizer(model, weight_decay=0.0).step()


def _settings(store: Store, adaptor: str, epochs: int, lr: float) -> RunSettings:
    return RunSettings(
        adaptor=adaptor,
        options={},
        epochs=epochs,
        lr=lr,
        batch_size=BATCH_SIZE,
        weight_decay=0.05,
        warmup=0.1,
        seed=SEED,
        store_digest=store.digest,
        extractor_digest=store.recipe.extractor_digest,
    )


class BackboneBatches:
    """Batches of a split as `FeatureBatches` gives them, each made from files by decoding and the backbone."""

    def __init__(self, store: Store, spec: FeatureSpec) -> None:
        from coldtap.pipeline.backbone import load_backbone

        self.spec = spec
        self._files = encoded_images(SIDE)
        self._backbone = load_backbone(MODEL)
        rows = store.rows("train")
        self.targets = torch.from_numpy(store.targets(rows))
        # An item's id is its number in the split, so that both sides see the same image beside the same target.
        self._items = [_number(sample) for sample in store.sample_ids(rows)]
        self.n_samples = len(rows)
        self.n_batches = -(-self.n_samples // BATCH_SIZE)
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def shuffled(self, *, seed: int, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Every sample once, in the order in which `FeatureBatches` gives them; decoded one batch ahead."""
        order, _ = epoch_draw(self.n_samples, 1, seed=seed, epoch=epoch)
        parts = np.split(order, range(BATCH_SIZE, self.n_samples, BATCH_SIZE))[start_batch:]
        coming = self._begin(parts[0])
        for number, part in enumerate(parts):
            images, coming = coming, self._begin(parts[number + 1] if number + 1 < len(parts) else [])
            yield Batch(features=self._features(torch.stack(list(images))), targets=self.targets[part])

    def _begin(self, samples: Any) -> Iterator[torch.Tensor]:
        files = [self._files[self._items[sample] % len(self._files)] for sample in samples]
        return self._pool.map(lambda file: decode(file, SIDE), files)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        from coldtap.pipeline.gather import gather
        from coldtap.stores.arrays import ArraySpec

        spec = ArraySpec(
            gather=self.spec.gather,
            geometry=self.spec.geometry,
            taps=self.spec.taps,
            tier="float32",
            layout="fast",
            block_rows=1,
        )
        parts = [part.values for part in gather(self._backbone(pixels), [spec])]
        # A copy, since what comes out of inference mode cannot be kept for a backward pass.
        return parts[0].clone() if spec.gather == "sum" else torch.stack(parts, dim=1)


def _number(sample_id: str) -> int:
    return int("".join(filter(str.isdigit, sample_id)))
