"""Extraction against a bare loop of the same backbone: how much of the loop's speed coldtap keeps.

The bare loop runs timm's `forward_intermediates` over batches and lets go of what it gets: no gather, no float16,
no checksum, no file. It takes the batch size, the number of threads and the way in which idle threads wait that
suit it best, found by a search before. coldtap takes its defaults, once in float16 and once in int8 (compact): all
gathers, a store on disk. Its clock starts after the forecast (the bare loop's model is loaded too by then, and the
calibration prefix has run) and stops when the store is complete. They take turns, and ratios are taken within a round.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import own_process, paused
from benchmarks.pictures import Pictures, decode, decoded_images, encoded_images

# Whether torch's threads spin or sleep when they have nothing to do: read once, when torch is loaded.
WAITING = ("PASSIVE", "ACTIVE")
TIERS = ("float16", "int8")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A backbone with what to give it; `goal` is the share of the bare loop's images/s to reach."""

    name: str
    model: str
    random_weights: bool
    side: int
    file_side: int
    n_images: int
    n_search: int
    batch_sizes: tuple[int, ...]
    repeats: int
    goal: float

    @property
    def preprocess(self) -> dict[str, Any]:
        """One resizing to the input size, as the bare loop does it."""
        return {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}


REFERENCE = Case(
    name="reference backbone",
    model="coldtap/vit-reference",
    random_weights=False,
    side=32,
    file_side=32,
    n_images=2048,
    n_search=256,
    batch_sizes=(16, 32, 64, 128),
    repeats=5,
    goal=0.85,
)
VIT_B = Case(
    name="ViT-B/16, 224 pixels",
    model="vit_base_patch16_224",
    random_weights=True,
    side=224,
    file_side=256,
    n_images=128,
    n_search=8,
    batch_sizes=(4, 8, 16),
    repeats=3,
    goal=0.95,
)
QUICK = Case(**{**asdict(REFERENCE), "n_images": 96, "n_search": 32, "batch_sizes": (32,), "repeats": 1})


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One measurement; `cpu_ms` counts every thread of the process, an image."""

    images_per_s: float
    cpu_ms: float
    n_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How the bare loop runs."""

    batch_size: int
    n_threads: int
    waiting: str


def measure_extraction(*, quick: bool) -> list[dict[str, Any]]:
    """A record for each case, with decoding in both and in neither."""
    return [record for case in ([QUICK] if quick else [REFERENCE, VIT_B]) for record in _measure_case(case, quick)]


def _measure_case(case: Case, quick: bool) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        waiting = WAITING[:1] if quick else WAITING
        loops = {way: stack.enter_context(own_process(OMP_WAIT_POLICY=way)) for way in waiting}
        extraction = stack.enter_context(own_process(OMP_WAIT_POLICY="PASSIVE"))
        best = _search(case, loops)
        bare = loops.pop(best.waiting)
        for unused in loops.values():
            stack.enter_context(paused(unused))
        records = []
        for decoding in (False, True):
            rounds = [_round(case, bare, extraction, best, decoding, turn) for turn in range(case.repeats)]
            for tier in TIERS:
                pairs = [(speeds["bare"], speeds[tier]) for speeds in rounds]
                n_bytes = pairs[0][1].n_bytes
                plain = [extraction.submit(plain_write_mb_per_s, n_bytes).result() for _ in range(min(case.repeats, 3))]
                records.append({"tier": tier, **_record(case, best, decoding, pairs, statistics.median(plain))})
        return records


def _search(case: Case, loops: dict[str, Executor]) -> Loop:
    """The bare loop's fastest way, decoding left out."""
    threads = sorted({1, os.cpu_count() or 1})
    tried = [
        Loop(batch_size=size, n_threads=n, waiting=way) for size, n, way in product(case.batch_sizes, threads, loops)
    ]

    def speed(loop: Loop) -> Speed:
        with paused(*(other for way, other in loops.items() if way != loop.waiting)):
            return loops[loop.waiting].submit(bare_speed, case, loop, False, case.n_search).result()

    rounds = [[speed(loop) for loop in tried] for _ in range(3)]
    fastest = [max(speeds, key=lambda speed: speed.images_per_s) for speeds in zip(*rounds, strict=True)]
    return max(zip(tried, fastest, strict=True), key=lambda pair: pair[1].images_per_s)[0]


def _round(case: Case, bare: Executor, extraction: Executor, loop: Loop, decoding: bool, turn: int) -> dict[str, Speed]:
    """One measurement of each, one after the other; who is first changes with every turn."""

    def run(name: str) -> Speed:
        if name == "bare":
            with paused(extraction):
                return bare.submit(bare_speed, case, loop, decoding, case.n_images).result()
        with paused(bare):
            return extraction.submit(extraction_speed, case, decoding, name).result()

    names = ("bare", *TIERS)
    return {name: run(name) for name in names[turn % len(names) :] + names[: turn % len(names)]}


def _record(
    case: Case, loop: Loop, decoding: bool, pairs: Sequence[tuple[Speed, Speed]], plain_mb_per_s: float
) -> dict[str, Any]:
    ratios = [ours.images_per_s / bare.images_per_s for bare, ours in pairs]
    speed = statistics.median(ours.images_per_s for _, ours in pairs)
    return {
        "case": case.name,
        "decoding": "in both" if decoding else "in neither",
        "bare_loop": asdict(loop),
        "bare_images_per_s": statistics.median(bare.images_per_s for bare, _ in pairs),
        "images_per_s": speed,
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_greatest": max(ratios),
        "cpu_ratio": statistics.median(bare.cpu_ms / ours.cpu_ms for bare, ours in pairs),
        "bare_cpu_ms": statistics.median(bare.cpu_ms for bare, _ in pairs),
        "cpu_ms": statistics.median(ours.cpu_ms for _, ours in pairs),
        "goal": case.goal,
        "written_mb_per_s": speed * pairs[0][1].n_bytes / case.n_images / 1e6,
        "plain_write_mb_per_s": plain_mb_per_s,
    }


# What follows runs in the processes that are measured.


def bare_speed(case: Case, loop: Loop, decoding: bool, n_images: int) -> Speed:
    """The loop that one would write without coldtap, features thrown away."""
    torch.set_num_threads(loop.n_threads)
    model, mean, std = _bare_model(case)
    with torch.inference_mode():
        model.forward_intermediates(torch.zeros(loop.batch_size, 3, case.side, case.side))
    batches = _decoded(case, loop.batch_size, n_images) if decoding else _given(case, loop.batch_size, n_images)
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for pixels in batches:
            images = (pixels.float() / 255 - mean) / std
            model.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)
    return _speed(wall, cpu, n_images)


def _speed(wall: float, cpu: float, n_images: int, n_bytes: int = 0) -> Speed:
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Speed(images_per_s=n_images / wall, cpu_ms=1e3 * cpu / n_images, n_bytes=n_bytes)


@lru_cache(maxsize=1)
def _bare_model(case: Case) -> tuple[Any, torch.Tensor, torch.Tensor]:
    from coldtap.pipeline.backbones.backbone import load_backbone

    backbone = load_backbone(case.model, random_weights=case.random_weights, preprocess=case.preprocess)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.preprocess.mean, backbone.preprocess.std)
    )
    return backbone.module, mean, std


def _given(case: Case, batch_size: int, n_images: int) -> list[torch.Tensor]:
    """Batches of pixels that lie in memory."""
    images = decoded_images(case.file_side, case.side)
    whole = images.repeat(-(-n_images // len(images)), 1, 1, 1)[:n_images]
    return list(whole.split(batch_size))


def _decoded(case: Case, batch_size: int, n_images: int) -> Iterator[torch.Tensor]:
    """Batches decoded in a thread a core, one batch ahead of the backbone."""
    files = encoded_images(case.file_side)
    numbers = list(range(n_images))
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def begin(start: int) -> Iterator[torch.Tensor]:
            part = numbers[start : start + batch_size]
            return pool.map(lambda number: decode(files[number % len(files)], case.side), part)

        coming = begin(0)
        for start in range(batch_size, n_images + batch_size, batch_size):
            batch, coming = coming, begin(start)
            yield torch.stack(list(batch))


class Clock:
    """A reporter that notes when extraction begins."""

    def note(self, text: str) -> None:
        pass

    def forecast(self, forecast: Any) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.n_bytes = forecast.n_bytes

    def advance(self, n_rows: int) -> None:
        pass


def extraction_speed(case: Case, decoding: bool, tier: str) -> Speed:
    """coldtap as a user runs it, into a temporary folder."""
    from coldtap import cache_features

    images = encoded_images(case.file_side) if decoding else decoded_images(case.file_side, case.side)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        cache_features(
            # A val split of its own, so that none is cut from train; it is not extracted.
            {"train": Pictures(images, case.n_images), "val": Pictures(images, 10)},
            Path(folder) / "store",
            model=case.model,
            random_weights=case.random_weights,
            preprocess=case.preprocess,
            split=["train"],
            tier=tier,
            reporter=clock,
        )
        return _speed(clock.wall, clock.cpu, case.n_images, clock.n_bytes)


def plain_write_mb_per_s(n_bytes: int) -> float:
    """How fast one file of so many bytes is written and made durable, and nothing else done."""
    piece = memoryview(bytes(2**24))
    with tempfile.TemporaryFile(buffering=0) as file:
        began = time.perf_counter()
        for start in range(0, n_bytes, len(piece)):
            file.write(piece[: n_bytes - start])
        os.fsync(file.fileno())
        return n_bytes / (time.perf_counter() - began) / 1e6
