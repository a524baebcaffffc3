"""Opening a store of ten million rows, and an epoch in less memory than a tenth of the store.

The first measurement opens a store and draws one shuffled batch, features and targets, in a fresh process whose imports
are done. The second sets a limit on a process and reads every row of the store, shuffled, without torch.
The limit is RLIMIT_AS, which counts all address space: what the process holds once it has read a store of a few rows
(the libraries' threads have started by then), and a tenth of the store's bytes. Under such a limit coldtap maps no
shard; without one it does, and the resident size then counts pages of the store that the kernel may take back.
"""

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.features import ManyFew, Noise, write_store
from benchmarks.machine import own_process, peak_bytes, resident_bytes
from coldtap.stores import Store, StoredArray, open_store
from coldtap.stores.format.arrays import plan_arrays
from coldtap.stores.format.geometry import Geometry

BATCH_SIZE = 64
GOAL_S = 1.0
GOAL_BYTES = 500e6
TIMES_THE_LIMIT = 10
TINY = Geometry(grid=(1, 1), prefix_tokens=1, channels=4)
REFERENCE = Geometry(grid=(8, 8), prefix_tokens=1, channels=192)
N_TAPS = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the two stores are, and how often the first is opened."""

    n_opened: int
    n_read: int
    repeats: int


PLAN = Plan(n_opened=10_000_000, n_read=6_144, repeats=3)
QUICK = Plan(n_opened=20_000, n_read=3_072, repeats=1)


def measure_opening(*, quick: bool) -> list[dict[str, Any]]:
    """Records of opening with and without torch, and of an epoch under a limit."""
    plan = QUICK if quick else PLAN
    return [*_opened(plan), _limited(plan)]


def _opened(plan: Plan) -> list[dict[str, Any]]:
    with _scratch() as folder:
        store = Path(folder) / "store"
        with own_process() as process:
            process.submit(make_many_rows, store, plan.n_opened).result()
        records = [_fresh(draw, store) for _ in range(plan.repeats) for draw in (draw_first_batch, train_first_batch)]
    return [
        {
            "measured": "opening",
            "n_rows": plan.n_opened,
            "goal_s": GOAL_S,
            "goal_bytes": GOAL_BYTES,
            **_median_record([record for record in records if record["way"] == way]),
        }
        for way in dict.fromkeys(record["way"] for record in records)
    ]


def _limited(plan: Plan) -> dict[str, Any]:
    with _scratch() as folder:
        with own_process() as process:
            process.submit(make_wide_rows, Path(folder) / "few", BATCH_SIZE).result()
            process.submit(make_wide_rows, Path(folder) / "store", plan.n_read).result()
        return {"measured": "limit", "n_rows": plan.n_read, **_fresh(read_under_limit, Path(folder))}


def _scratch() -> "tempfile.TemporaryDirectory[str]":
    """A folder in memory where there is room: making ten million rows is two files a block, each made durable."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**33
    return tempfile.TemporaryDirectory(dir=memory if roomy and "TMPDIR" not in os.environ else None)


def _fresh(work: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    with own_process(OMP_WAIT_POLICY="PASSIVE") as process:
        return process.submit(work, path).result()


def _median_record(records: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {
        name: statistics.median(record[name] for record in records)
        for name in records[0]
        if name.endswith(("_s", "_bytes"))
    }
    return {"way": records[0]["way"], **numbers}


# What follows runs in the processes that are measured.


def make_many_rows(path: Path, n_rows: int) -> None:
    (spec,) = plan_arrays({0: TINY}, {"sum": [0]}, "float16")
    write_store(path, spec, n_rows, ManyFew(spec.row_shape))


def make_wide_rows(path: Path, n_rows: int) -> None:
    (spec,) = plan_arrays(dict.fromkeys(range(N_TAPS), REFERENCE), {"layers": range(N_TAPS)}, "float16")
    write_store(path, spec, n_rows, Noise(spec.row_shape))


def draw_first_batch(path: Path) -> dict[str, Any]:
    """`open_store`, the rows of a split, and one batch of them, as code without torch does it."""
    watch = _Watch()
    store = open_store(path)
    watch.lap("open")
    rows = store.rows("train")
    watch.lap("rows")
    batch = np.random.default_rng(0).permutation(rows)[:BATCH_SIZE]
    watch.lap("order")
    (array,) = store.arrays.values()
    array.read_into(np.empty((len(batch), *array.row_shape), np.float32), batch)
    watch.lap("features")
    store.targets(batch)
    watch.lap("targets")
    return watch.record("open_store")


def train_first_batch(path: Path) -> dict[str, Any]:
    """`FeatureBatches`, as training draws its first batch."""
    from coldtap.adaptors.data.batches import FeatureBatches
    from coldtap.adaptors.networks.kinds import adaptor_kind

    watch = _Watch()
    store = open_store(path)
    watch.lap("open")
    kind = adaptor_kind("mist")
    spec, _ = kind.plan(store, kind.options())
    batches = FeatureBatches(store, spec, "train", batch_size=BATCH_SIZE, resident=False)
    watch.lap("rows_targets")
    next(batches.shuffled(seed=0, epoch=1))
    watch.lap("order_features")
    return watch.record("FeatureBatches")


class _Watch:
    """Seconds of each lap, and the memory taken since the start."""

    def __init__(self) -> None:
        self._imported_bytes = resident_bytes()
        self._laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[f"{name}_s"], self._last = now - self._last, now

    def record(self, way: str) -> dict[str, Any]:
        memory = peak_bytes() - self._imported_bytes
        return {"way": way, "total_s": sum(self._laps.values()), **self._laps, "memory_bytes": memory}


def read_under_limit(folder: Path) -> dict[str, Any]:
    """An epoch over a store of ten times the bytes that the process may take from here on."""
    _epoch(open_store(folder / "few"))
    store = folder / "store"
    stored = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    limit, held = stored // TIMES_THE_LIMIT, resident_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (_address_space_bytes() + limit,) * 2)
    began = time.perf_counter()
    n_read = _epoch(open_store(store))
    return {
        "store_bytes": stored,
        "limit_bytes": limit,
        "memory_bytes": peak_bytes() - held,
        "n_read": n_read,
        "epoch_s": time.perf_counter() - began,
    }


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _epoch(store: Store) -> int:
    (array,) = store.arrays.values()
    rows = np.random.default_rng(0).permutation(store.rows("train"))
    out = np.empty((BATCH_SIZE, *array.row_shape), np.float32)
    return sum(_read(array, out, rows[start : start + BATCH_SIZE]) for start in range(0, len(rows), BATCH_SIZE))


def _read(array: StoredArray, out: np.ndarray[Any, np.dtype[np.float32]], rows: np.ndarray[Any, Any]) -> int:
    array.read_into(out[: len(rows)], rows)
    return len(rows)
