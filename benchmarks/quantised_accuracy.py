"""One quantised backbone at a time: top-1 of its own task, adaptors on its features, and adaptors taken across."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.quantised_budget import (
    ADAPTORS,
    CROSSED,
    FLOAT,
    MODEL,
    RANGES,
    REPARAMETERISED,
    SITES,
    TARGET,
    Budget,
    Place,
)
from coldtap import cache_features, evaluate_adaptor, fit_compensation, train_adaptor
from coldtap.pipeline.backbones.backbone import Backbone, load_backbone
from coldtap.pipeline.backbones.reference import build_reference
from coldtap.pipeline.images.decode import decode_rgb
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.quantisation.quantize import Compensation, quantize

GATHERS = ("sum", "pooled")  # what MIST and the linear probe read
BATCH = 64
STORED = "stored"  # the compensation of stored features

type Scores = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class CellTask:
    """A backbone: a scheme, a method and the seed of calibration and adaptors; the method `float` has no scheme."""

    place: Place
    budget: Budget
    scheme: str
    method: Compensation | str
    seed: int

    @property
    def cell(self) -> str:
        """Name of its file."""
        parts = (self.method,) if self.method == FLOAT else (self.scheme, self.method)
        return "-".join((*parts, f"s{self.seed}"))


@dataclass(frozen=True, kw_only=True)
class StoreTask:
    """The float features of a set."""

    place: Place
    dataset: str


def float_store(task: StoreTask) -> str:
    """Caches the float features of a set; those that are there already stay."""
    _cache(task.place.dataset(task.dataset), task.place.float_store(task.dataset), None)
    return task.dataset


def run_cell(task: CellTask) -> str:
    """Fills a cell; one that is done is left as it is."""
    place, work = task.place, task.place.work(task.cell)
    if place.read(task.cell, task.budget) is None:
        shutil.rmtree(work, ignore_errors=True)  # of a call that was killed: its store may be of another artefact
        began = time.perf_counter()
        found = _float_cell(task) if task.method == FLOAT else _quantised_cell(task, work)
        place.write(task.cell, task.budget, {**found, "seconds": time.perf_counter() - began})
    shutil.rmtree(work, ignore_errors=True)
    return task.cell


def _float_cell(task: CellTask) -> dict[str, Any]:
    place = task.place
    backbone = load_backbone(MODEL, device="cpu")
    scores = {
        name: {
            adaptor: _train(task, place.float_store(name), adaptor, name, place.float_run(name, adaptor, task.seed))
            for adaptor in ADAPTORS
        }
        for name in task.budget.sets
    }
    return {"own": _own_task(place.own, backbone), "adaptors": scores}


def _quantised_cell(task: CellTask, work: Path) -> dict[str, Any]:
    place, artefact = task.place, task.place.artefact(task.scheme, task.method, task.seed)
    artefact.parent.mkdir(parents=True, exist_ok=True)
    report = quantize(
        MODEL,
        place.own,
        artefact,
        scheme=task.scheme,
        compensate=task.method,  # type: ignore[arg-type]  # `float` is no method here
        device="cpu",
        images=task.budget.images,
        ranges=RANGES,
        reparameterise=REPARAMETERISED,
        sites=SITES if task.method == "cwac" else None,
        target=TARGET,
        seed=task.seed,
    )
    backbone = load_backbone(quantised=artefact, device="cpu")
    assert backbone.kernel is not None
    found: dict[str, Any] = {
        "kernel": backbone.kernel.kernel.name,
        "n_bytes": report.n_bytes,
        "float_bytes": report.float_bytes,
        "n_parameters": sum(fit.n_parameters for fit in report.fits),
        "n_folded_parameters": sum(fit.n_folded_parameters for fit in report.fits),
        "own": _own_task(place.own, backbone),
        "adaptors": {},
        "crossed": {},
    }
    for name in task.budget.sets:
        store, runs = work / "stores" / name, {adaptor: work / "runs" / f"{name}-{adaptor}" for adaptor in ADAPTORS}
        _cache(place.dataset(name), store, artefact)
        # Before any training: a store with a compensation has another digest.
        crossed = task.scheme in CROSSED
        if crossed and task.method == "none":
            fit_compensation(store, place.float_store(name), name=STORED)
        found["adaptors"][name] = {adaptor: _train(task, store, adaptor, name, run) for adaptor, run in runs.items()}
        if crossed:
            found["crossed"][name] = _crossed(task, name, store, runs)
    return found


def _crossed(task: CellTask, name: str, store: Path, runs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Adaptors on features of the other kind, by direction: with none of the fits that `stored` says, and with it."""
    place = task.place
    from_float = {adaptor: place.float_run(name, adaptor, task.seed) for adaptor in ADAPTORS}
    found = {
        "float to quantised": {adaptor: _evaluate(run, store) for adaptor, run in from_float.items()},
        "quantised to float": {adaptor: _evaluate(run, place.float_store(name)) for adaptor, run in runs.items()},
    }
    if task.method == "none":
        stored = {adaptor: run.with_name(f"{run.name}-{STORED}") for adaptor, run in runs.items()}
        found[f"{STORED}: own"] = {
            adaptor: _train(task, store, adaptor, name, run, compensation=STORED) for adaptor, run in stored.items()
        }
        found[f"{STORED}: float to quantised"] = {
            adaptor: _evaluate(run, store, STORED) for adaptor, run in from_float.items()
        }
        found[f"{STORED}: quantised to float"] = {
            adaptor: _evaluate(run, place.float_store(name)) for adaptor, run in stored.items()
        }
    return found


def _cache(dataset: Path, store: Path, artefact: Path | None) -> None:
    cache_features(
        dataset,
        store,
        model=MODEL if artefact is None else None,
        quantized=artefact,
        gather=GATHERS,
        taps="last:1",
        device="cpu",
        decode_threads=1,
    )


def _train(
    task: CellTask, store: Path, adaptor: str, dataset: str, out: Path, *, compensation: str | None = None
) -> float:
    """Trains on train and val together; test accuracy after the last epoch."""
    result = train_adaptor(
        store,
        adaptor,
        out=out,
        epochs=task.budget.epochs,
        lr=task.budget.rate(adaptor, dataset),
        settings=ADAPTORS[adaptor],
        seed=task.seed,
        fit="train+val",
        keep="last",
        compensation=compensation,
        device="cpu",
    )
    return result.info.metrics["test"].score


def _evaluate(run: Path, store: Path, compensation: str | None = None) -> float:
    return evaluate_adaptor(run, store, compensation=compensation, across_quantisation=True, device="cpu").metrics.score


def _own_task(images: Path, backbone: Backbone) -> dict[str, Any]:
    """Top-1 on test, and which images were right: bits in hexadecimal."""
    pixels, labels = _own_images(images, backbone.preprocess)
    reference = build_reference()
    right = []
    with torch.inference_mode():
        for some, wanted in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
            logits = reference.forward_head(reference.norm(backbone(some)[-1]))
            right.append(logits.argmax(1) == wanted)
    bits = torch.cat(right).numpy()
    return {"top1": float(bits.mean()), "n_images": len(bits), "right": np.packbits(bits).tobytes().hex()}


@lru_cache(maxsize=1)
def _own_images(images: Path, preprocess: Preprocess) -> tuple[torch.Tensor, torch.Tensor]:
    """The test split as pixels, (image, 3, height, width) uint8, and its labels."""
    table = pq.read_table(images, columns=["image", "label"], filters=[("split", "==", "test")])
    pixels = np.stack([preprocess.pixels(decode_rgb(image.as_py())) for image in table["image"]])
    return torch.from_numpy(pixels), torch.from_numpy(np.array(table["label"].to_pylist()))
