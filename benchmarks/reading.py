"""Shuffled epochs from a store against `np.memmap`, bare loops and the formats that a user would pick instead.

Batches of 64 of the same samples. Each contestant (`benchmarks/peers.py`) has a process of its own and one unmeasured
epoch; then they take turns, an epoch each a round, in an order that moves on with the rounds. A ratio is taken within a
round; the median, the least and the greatest over the rounds are given. The page cache is warm, but for the
`evicted` epochs: there a fresh process drops its files from the cache, sees that they are gone, and reads one epoch,
checksums included.

Two workloads: features of the reference backbone on real images (`cache_features` on the downstream sets), and
features of ViT-B's geometry, made as `features.VitBFeatures` says. Codes are at the default 30 dB.

    python -m benchmarks reading --json reading.json
    python -m benchmarks.reading reading.json docs/images/reading.png        # the picture
"""

import ctypes
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.features import VIT_B, VitBFeatures, real_images, write_store
from benchmarks.machine import own_process
from benchmarks.peers import (
    CODES,
    COMPACT,
    CONTESTANTS,
    DECODE,
    FAST,
    FLOAT16,
    HUGGING_FACE,
    LITDATA,
    MEMMAP,
    MOSAIC,
    RAW,
    Reader,
    only_array,
    shuffled,
)
from coldtap.stores import open_store

READ_AT_ONCE = 64  # rows
EVICTION_TRIES = 5  # pages that the kernel has at hand stay
MIST_BATCH = 64
MIST_GOAL = 1.1
TIERS = {"float16": ("float16", "fast"), "fast": ("int8", "fast"), "compact": ("int8", "compact")}
# What is to be at least so many times as fast as what.
GOALS = (
    (FAST, MEMMAP, 2.5),
    (FLOAT16, MEMMAP, 1.2),
    (COMPACT, DECODE, 0.9),
    (COMPACT, LITDATA, 1.5),
    (COMPACT, MOSAIC, 1.5),
    (COMPACT, HUGGING_FACE, 1.5),
)
EVICTED_GOALS = ((COMPACT, MEMMAP, 2.0),)
EVICTED = (MEMMAP, FAST, COMPACT)
FIRST = (FLOAT16, FAST, COMPACT)

type Records = list[dict[str, Any]]
type Round = Mapping[str, float]  # seconds of an epoch


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`make` writes a float32 store of one `layers` array with `n_samples` rows."""

    name: str
    make: Callable[[Path, int], None]
    n_samples: int
    rounds: int


def measure_reading(*, quick: bool) -> Records:
    """Records of epochs, first epochs, evicted epochs, and of the goals; then those of MIST."""
    records: Records = []
    for workload in QUICK if quick else WORKLOADS:
        with tempfile.TemporaryDirectory() as folder:
            records += _measure_workload(workload, Path(folder))
    return records + _measure_mist(n_samples=128 if quick else 2048, rounds=1 if quick else 5)


def _measure_workload(workload: Workload, folder: Path) -> Records:
    _make_files(workload, folder)
    warm, first = _warm_rounds(workload, folder)
    evicted, kept = _evicted_rounds(workload, folder)
    records = [
        *_speeds("epoch", workload, folder, warm, warm),
        *_speeds("first epoch", workload, folder, first, warm),
        *_speeds("evicted", workload, folder, evicted, evicted),
    ]
    for record in records:
        if record["measured"] == "evicted":
            record["left_in_cache"] = kept
    missing = [name for name, contestant in CONTESTANTS.items() if not contestant.is_installed]
    records += [
        {"measured": "epoch", "workload": workload.name, "contestant": name, "installed": False} for name in missing
    ]
    return [*records, *_goals("epoch", workload, warm, GOALS), *_goals("evicted", workload, evicted, EVICTED_GOALS)]


def _speeds(measured: str, workload: Workload, folder: Path, rounds: Sequence[Round], base: Sequence[Round]) -> Records:
    """A record a contestant: samples a second, and their ratio to memmap's in the same round of `base`."""
    raw = _bytes_of(folder / RAW)
    return [
        {
            "measured": measured,
            "workload": workload.name,
            "contestant": name,
            "installed": True,
            "samples_per_s": workload.n_samples / statistics.median(seconds[name] for seconds in rounds),
            **_spread([memmap[MEMMAP] / seconds[name] for memmap, seconds in zip(base, rounds, strict=True)]),
            "bytes_per_sample": _bytes_of(folder / CONTESTANTS[name].files) / workload.n_samples,
            "disk_ratio": _bytes_of(folder / CONTESTANTS[name].files) / raw,
        }
        for name in rounds[0]
    ]


def _goals(
    measured: str, workload: Workload, rounds: Sequence[Round], goals: Sequence[tuple[str, str, float]]
) -> Records:
    return [
        {
            "measured": "goal",
            "of": measured,
            "workload": workload.name,
            "contestant": name,
            "against": against,
            "goal": goal,
            **_spread([seconds[against] / seconds[name] for seconds in rounds]),
        }
        for name, against, goal in goals
        if against in rounds[0]
    ]


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_greatest": max(ratios)}


def _bytes_of(path: Path) -> int:
    """Bytes of a file, of a folder's files, or of a store's features."""
    return sum(file.stat().st_size for file in _files_of(path))


def _files_of(path: Path) -> list[Path]:
    features = path / "features.zarr"
    if path.is_file():
        return [path]
    return [file for file in (features if features.exists() else path).rglob("*") if file.is_file()]


def _make_files(workload: Workload, folder: Path) -> None:
    """Every contestant's files, from one float32 store."""
    with own_process() as process:
        process.submit(workload.make, folder / "float32", workload.n_samples).result()
        process.submit(convert_all, folder).result()
    for contestant in CONTESTANTS.values():
        if contestant.prepare and contestant.is_installed:
            with own_process() as process:
                process.submit(contestant.prepare, folder / RAW, folder / contestant.files).result()


def _warm_rounds(workload: Workload, folder: Path) -> tuple[list[Round], list[Round]]:
    """Seconds a contestant and round: epochs, and first epochs of a store just opened."""
    n_samples = workload.n_samples
    with ExitStack() as stack:
        running: dict[str, Executor] = {}
        for name, contestant in CONTESTANTS.items():
            if contestant.is_installed:
                running[name] = stack.enter_context(own_process(OMP_WAIT_POLICY="PASSIVE"))
                running[name].submit(epoch_seconds, name, folder, n_samples, 0).result()  # unmeasured
        warm, first = [], []
        for turn in range(1, workload.rounds + 1):
            order = _turned(list(running), turn)
            warm.append({n: running[n].submit(epoch_seconds, n, folder, n_samples, turn).result() for n in order})
            first.append(
                {n: running[n].submit(first_epoch_seconds, n, folder, n_samples, turn).result() for n in FIRST}
            )
        return warm, first


def _evicted_rounds(workload: Workload, folder: Path) -> tuple[list[Round], float]:
    """Seconds a contestant and round, and the largest share of any files that was still in the cache."""
    rounds, kept = [], 0.0
    for turn in range(1, min(workload.rounds, 3) + 1):
        seconds = {}
        for name in _turned(EVICTED, turn):
            with own_process(OMP_WAIT_POLICY="PASSIVE") as process:
                seconds[name], left = process.submit(
                    evicted_epoch_seconds, name, folder, workload.n_samples, turn
                ).result()
            kept = max(kept, left)
        rounds.append(seconds)
    return rounds, kept


def _turned(names: Sequence[str], turn: int) -> list[str]:
    return [names[(place + turn) % len(names)] for place in range(len(names))]


def _measure_mist(*, n_samples: int, rounds: int) -> Records:
    with tempfile.TemporaryDirectory() as folder:
        with own_process() as process:
            process.submit(make_sums, Path(folder) / "float32", n_samples).result()
            process.submit(convert_all, Path(folder)).result()
        records = []
        for name, (tier, layout) in TIERS.items():
            with own_process(OMP_WAIT_POLICY="PASSIVE") as process:
                record = process.submit(mist_epochs, Path(folder) / name, rounds).result()
            records.append({"measured": "MIST", "tier": tier, "layout": layout, "goal": MIST_GOAL, **record})
        return records


# What follows runs in the processes that are measured.


def make_reference(path: Path, n_samples: int) -> None:
    _cache(path, n_samples, "layers")


def make_sums(path: Path, n_samples: int) -> None:
    _cache(path, n_samples, "sum")


def _cache(path: Path, n_samples: int, gather: str) -> None:
    from benchmarks.pictures import Pictures
    from coldtap import cache_features

    images = real_images(n_samples)
    sources = {"train": Pictures(images, n_samples), "val": Pictures(images, 10)}
    cache_features(sources, path, gather=[gather], taps="all", tier="float32", split=["train"])


def make_vit_b(path: Path, n_samples: int) -> None:
    from coldtap.stores.format.arrays import plan_arrays

    taps = range(1, 13)
    (spec,) = plan_arrays(dict.fromkeys(taps, VIT_B), {"layers": taps}, "float32")
    write_store(path, spec, n_samples, VitBFeatures())


def convert_all(folder: Path) -> None:
    """The float32 store in each tier and layout, and as raw files; the float32 store goes."""
    from coldtap.stores.convert.convert import convert_store

    for name, (tier, layout) in TIERS.items():
        convert_store(folder / "float32", folder / name, tier=tier, layout=layout)
    shutil.rmtree(folder / "float32")
    _write_raw(folder / "float16", folder / RAW)
    _write_raw(folder / "fast", folder / CODES)


def _write_raw(store: Path, path: Path) -> None:
    """The stored numbers of every row; in these stores rows have the numbers from 0, without a gap."""
    array, n_rows = only_array(store), open_store(store).n_rows
    raw = np.lib.format.open_memmap(path, "w+", array.spec.dtype, (n_rows, *array.row_shape))
    for start in range(0, n_rows, READ_AT_ONCE):
        part = np.arange(start, min(start + READ_AT_ONCE, n_rows))
        array.read_stored_into(raw[part[0] : part[-1] + 1], part)
    raw.flush()


@lru_cache(maxsize=1)
def _reader(name: str, folder: Path) -> Reader:
    contestant = CONTESTANTS[name]
    return contestant.open(folder / contestant.files)


def epoch_seconds(name: str, folder: Path, n_samples: int, seed: int) -> float:
    """One epoch of a reader that stays open."""
    return _timed(_reader(name, folder), n_samples, seed)


def first_epoch_seconds(name: str, folder: Path, n_samples: int, seed: int) -> float:
    """The first epoch of a reader just opened: each checksum is held against its bytes."""
    contestant = CONTESTANTS[name]
    return _timed(contestant.open(folder / contestant.files), n_samples, seed)


def _timed(reader: Reader, n_samples: int, seed: int) -> float:
    batches = shuffled(n_samples, seed)
    began = time.perf_counter()
    n_read = reader.epoch(batches)
    seconds = time.perf_counter() - began
    if n_read != n_samples:
        raise RuntimeError(f"{type(reader).__name__} gave {n_read} of {n_samples} samples")
    return seconds


def evicted_epoch_seconds(name: str, folder: Path, n_samples: int, seed: int) -> tuple[float, float]:
    """An epoch after the files were dropped from the page cache, and the share of them that stayed."""
    contestant = CONTESTANTS[name]
    left = _evict_all(_files_of(folder / contestant.files))
    return _timed(contestant.open(folder / contestant.files), n_samples, seed), left


def _evict_all(files: Sequence[Path]) -> float:
    """Drop files from the page cache; returns the share of them that stayed, which should be nothing."""
    left = 1.0
    for _ in range(EVICTION_TRIES):
        for file in files:
            _evict(file)
        left = sum(map(_cached_bytes, files)) / sum(file.stat().st_size for file in files)
        if left == 0:
            break
    return left


def _evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not on disk yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _cached_bytes(path: Path) -> int:
    """Bytes of a file in the page cache (mincore)."""
    n_bytes = path.stat().st_size
    if n_bytes == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), n_bytes, prot=mmap.PROT_READ) as mapped:
        pages = np.zeros(-(-n_bytes // mmap.PAGESIZE), np.uint8)
        first = np.frombuffer(mapped, np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(n_bytes), ctypes.c_void_p(pages.ctypes.data)):
            raise OSError(ctypes.get_errno(), "mincore")
        return int((pages & 1).sum()) * mmap.PAGESIZE


def mist_epochs(path: Path, rounds: int) -> dict[str, Any]:
    """Epochs of two equal MISTs in turn: features read from the store batch by batch, and held in memory."""
    fits = {resident: _mist(path, resident, rounds) for resident in (False, True)}
    for fit in fits.values():
        fit(1)  # unmeasured
    seconds = [{way: _seconds(fits[way], turn) for way in _ways(turn)} for turn in range(2, rounds + 2)]
    return {
        "epoch_s": statistics.median(epoch[False] for epoch in seconds),
        "resident_epoch_s": statistics.median(epoch[True] for epoch in seconds),
        **_spread([epoch[False] / epoch[True] for epoch in seconds]),
    }


def _ways(turn: int) -> tuple[bool, bool]:
    return (False, True) if turn % 2 else (True, False)


def _seconds(fit: Callable[[int], object], epoch: int) -> float:
    began = time.perf_counter()
    fit(epoch)
    return time.perf_counter() - began


def _mist(path: Path, resident: bool, rounds: int) -> Callable[[int], float]:
    """An epoch of MIST's training, by its number."""
    import torch

    from coldtap.adaptors.data.batches import FeatureBatches
    from coldtap.adaptors.training.options import TrainingOptions, TrialOptions
    from coldtap.adaptors.training.plan import plan_trial
    from coldtap.adaptors.training.side_by_side import SideBySide

    store, device = open_store(path), torch.device("cpu")
    asked = TrialOptions(adaptor="mist", training=TrainingOptions(batch_size=MIST_BATCH))
    plan = plan_trial(store, asked, folder=path)
    batches = FeatureBatches(store, plan.features, "train", batch_size=MIST_BATCH, resident=resident)
    network = plan.network(store, n_classes=batches.n_classes, device=device)
    learner = SideBySide([plan], [network], batches.task, device)

    def fit(epoch: int) -> None:
        for batch in batches.shuffled(seed=0, epoch=epoch):
            learner.step(batch.features, batch.targets, [plan.settings.lr])

    return fit


WORKLOADS = (
    Workload(name="reference backbone, real images", make=make_reference, n_samples=2048, rounds=7),
    Workload(name="ViT-B geometry", make=make_vit_b, n_samples=512, rounds=5),
)
QUICK = (Workload(name="reference backbone, real images", make=make_reference, n_samples=128, rounds=1),)


def draw_reading(records: Records, path: Path) -> None:
    """Bars of samples a second against memmap's, a panel a workload, beside each the bytes a sample on disk."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    epochs = [record for record in records if record["measured"] == "epoch" and record["installed"]]
    names = list(dict.fromkeys(record["workload"] for record in epochs))
    figure, panels = plt.subplots(
        1, len(names), figsize=(6.2 * len(names), 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        _draw_panel(panel, name, [record for record in epochs if record["workload"] == name])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_panel(panel: Any, name: str, records: Records) -> None:
    ordered = [next(r for r in records if r["contestant"] == c) for c in CONTESTANTS if _holds(records, c)][::-1]
    ratios = [record["ratio"] for record in ordered]
    bars = panel.barh(
        [record["contestant"] for record in ordered],
        ratios,
        color=[_colour(record["contestant"]) for record in ordered],
        xerr=[
            [record["ratio"] - record["ratio_least"] for record in ordered],
            [record["ratio_greatest"] - record["ratio"] for record in ordered],
        ],
        error_kw={"ecolor": "black", "elinewidth": 0.7, "capsize": 2},
    )
    labels = [
        f"{ratio:.2f} ×, {record['bytes_per_sample'] / 1e6:.2f} MB"
        for ratio, record in zip(ratios, ordered, strict=True)
    ]
    panel.bar_label(bars, labels, fontsize=7, padding=12)
    panel.axvline(1, color="black", linewidth=0.7, linestyle=":")
    panel.set_xlim(0, 1.35 * max(record["ratio_greatest"] for record in ordered))
    panel.set_xlabel("samples a second, np.memmap on float16 = 1; MB a sample on disk")
    panel.set_title(name, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)


def _holds(records: Records, contestant: str) -> bool:
    return any(record["contestant"] == contestant for record in records)


def _colour(contestant: str) -> str:
    if contestant.startswith("coldtap"):
        return "#2a7fb8"
    return "#d1a34b" if contestant.startswith("bare") else "#888888"


if __name__ == "__main__":
    draw_reading(json.loads(Path(sys.argv[1]).read_text())["reading"], Path(sys.argv[2]))
