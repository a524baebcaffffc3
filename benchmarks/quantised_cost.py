"""How fast the reference backbone runs in float32, quantised, and with each compensation: one process, in rounds."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.machine import describe_machine
from benchmarks.quantised_budget import FLOAT, METHODS, MODEL, Place
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.images.decode import decode_rgb

SCHEME = "w8a8"  # six and four bits run in the same kernel
BATCH = 64
ROUNDS = 9
BATCHES_A_ROUND = 4


def measure_latency(
    place: Place, *, scheme: str = SCHEME, seed: int = 0, rounds: int = ROUNDS, batches: int = BATCHES_A_ROUND
) -> dict[str, Any]:
    """Images/s by contestant, the median of rounds, and the median of the ratios to float32 within a round.

    Args:
        place: with the artefacts of that scheme and seed.
        scheme: of the artefacts.
        seed: of the artefacts.
        rounds: in each of which everyone runs, in rotating order, after one round that does not count.
        batches: that one runs in a round.
    """
    backbones = {FLOAT: load_backbone(MODEL, device="cpu")} | {
        method: load_backbone(quantised=place.artefact(scheme, method, seed), device="cpu") for method in METHODS
    }
    pixels = _batch(place.own, backbones[FLOAT].preprocess.pixels)
    names, seconds = list(backbones), {name: list[float]() for name in backbones}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            for _ in range(batches):
                backbones[name](pixels)
            seconds[name].append(time.perf_counter() - began)
    n_images = len(pixels) * batches
    kernel = backbones["none"].kernel
    return {
        "scheme": scheme,
        "batch_size": len(pixels),
        "threads": torch.get_num_threads(),
        "kernel": kernel and f"{kernel.kernel.name}: {kernel.why}",
        "machine": describe_machine(),
        "images_per_s": {name: statistics.median(n_images / one for one in of[1:]) for name, of in seconds.items()},
        "ratios": {
            name: sorted(plain / one for plain, one in zip(seconds[FLOAT][1:], of[1:], strict=True))
            for name, of in seconds.items()
        },
    }


def _batch(images: Path, to_pixels: Callable[..., Any]) -> torch.Tensor:
    column = pq.read_table(images, columns=["image"])["image"][:BATCH]
    return torch.stack([torch.from_numpy(to_pixels(decode_rgb(image.as_py())).copy()) for image in column])
