"""Batches of features from a store: kept in memory where they fit, else read ahead by one thread.

The order of an epoch and the view of each sample are a pure function of (seed, epoch). There are no worker
processes: a fork deadlocks several readers, and a thread reads while torch computes.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coldtap.adaptors.contract import FeatureSpec
from coldtap.adaptors.memory import Residency, available_memory_bytes, decide_residency
from coldtap.stores import Store, StoredArray
from coldtap.stores.errors import SourceError

type Rows = np.ndarray[Any, np.dtype[np.int64]]
type Floats = np.ndarray[Any, np.dtype[np.float32]]

PREFETCH = 2  # batches read ahead: one being filled while one waits
LOAD_ROWS = 256  # rows a call while a split is loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Features (sample, *row shape) float32 and targets (sample,) int64; valid until the next batch is asked for."""

    features: torch.Tensor
    targets: torch.Tensor


def epoch_draw(n_samples: int, n_views: int, *, seed: int, epoch: int) -> tuple[Rows, Rows]:
    """Draws an epoch: the order of the samples, and the view of each.

    Args:
        n_samples: Samples of the split.
        n_views: Views of each, view 0 included; every one is drawn with the same probability.
        seed: The run's seed.
        epoch: The epoch's number.

    Returns:
        order (n_samples,), a permutation, and views (n_samples,) in that order: a pure function of the arguments.
    """
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(n_samples), rng.integers(0, n_views, n_samples)


class FeatureBatches:
    """Batches of one split of a store, as one adaptor reads it.

    Attributes:
        n_samples: Samples of the split: present rows of view 0.
        targets: (sample,) int64.
        residency: Whether the features are kept in memory, and why.
    """

    def __init__(
        self, store: Store, spec: FeatureSpec, split: str, *, batch_size: int, resident: bool | None = None
    ) -> None:
        """Looks up the split's rows and targets; loads the features if they are to be kept.

        Args:
            store: An open store.
            spec: The array and taps to read.
            split: Name of the split; of `train` all views are read, of the others view 0.
            batch_size: Samples a batch; the last one of an epoch may be smaller.
            resident: Whether to keep the features in memory; None decides by their size.

        Raises:
            SourceError: The split is empty, or its targets are no classes of the store.
        """
        self.spec, self.batch_size = spec, batch_size
        self._array: StoredArray = store.arrays[spec.array]
        self._rows = _rows_by_view(store, split)  # (view, sample)
        self.n_samples = int(self._rows.shape[1])
        self.targets = torch.from_numpy(_class_targets(store, self._rows[0], split))
        n_bytes = 4 * int(np.prod(spec.row_shape)) * len(np.unique(self._rows))
        self.residency = (
            decide_residency(n_bytes, available_memory_bytes())
            if resident is None
            else Residency(resident=resident, n_bytes=n_bytes, reason="as asked")
        )
        self._held = self._load() if self.residency.resident else None

    @property
    def n_batches(self) -> int:
        """Batches an epoch."""
        return -(-self.n_samples // self.batch_size)

    def shuffled(self, *, seed: int, epoch: int) -> Iterator[Batch]:
        """Yields every sample once, one view of each, in the order that (seed, epoch) gives."""
        order, views = epoch_draw(self.n_samples, len(self._rows), seed=seed, epoch=epoch)
        yield from self._batches(order, views)

    def ordered(self) -> Iterator[Batch]:
        """Yields view 0 of every sample in the order of the rows."""
        yield from self._batches(np.arange(self.n_samples), np.zeros(self.n_samples, np.int64))

    def _batches(self, samples: Rows, views: Rows) -> Iterator[Batch]:
        cuts = [slice(start, start + self.batch_size) for start in range(0, len(samples), self.batch_size)]
        parts = [samples[cut] for cut in cuts]
        rows = [self._rows[views[cut], part] for cut, part in zip(cuts, parts, strict=True)]
        features = self._held_features(rows) if self._held is not None else self._read_features(rows)
        for part, values in zip(parts, features, strict=True):
            yield Batch(features=values, targets=self.targets[torch.from_numpy(part)])

    def _load(self) -> tuple[Rows, torch.Tensor]:
        """The split's rows in ascending order, and their features."""
        rows = np.unique(self._rows)
        held = np.empty((len(rows), *self.spec.row_shape), np.float32)
        for start in range(0, len(rows), LOAD_ROWS):
            part = slice(start, start + LOAD_ROWS)
            self._read(held[part], rows[part])
        return rows, torch.from_numpy(held)

    def _read(self, out: Floats, rows: Rows) -> None:
        self._array.read_into(out, rows, None if self.spec.gather == "sum" else self.spec.taps)

    def _held_features(self, batches: list[Rows]) -> Iterator[torch.Tensor]:
        assert self._held is not None
        rows, held = self._held
        buffer = held.new_empty(self.batch_size, *self.spec.row_shape)
        for batch in batches:
            out = buffer[: len(batch)]
            torch.index_select(held, 0, torch.from_numpy(np.searchsorted(rows, batch)), out=out)
            yield out

    def _read_features(self, batches: list[Rows]) -> Iterator[torch.Tensor]:
        """Reads ahead in a thread, into a ring of buffers: memory does not depend on the store's size."""
        ring = [np.empty((self.batch_size, *self.spec.row_shape), np.float32) for _ in range(PREFETCH + 1)]
        free: queue.SimpleQueue[Floats | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[Floats | BaseException] = queue.SimpleQueue()
        for buffer in ring:
            free.put(buffer)

        def read_ahead() -> None:
            try:
                for batch in batches:
                    buffer = free.get()
                    if buffer is None:
                        return
                    self._read(buffer[: len(batch)], batch)
                    ready.put(buffer)
            except BaseException as error:
                ready.put(error)

        thread = threading.Thread(target=read_ahead, name="coldtap-read-ahead", daemon=True)
        thread.start()
        try:
            for batch in batches:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield torch.from_numpy(item[: len(batch)])
                free.put(item)
        finally:
            # An epoch that is left early must not leave the thread waiting for a buffer, nor a batch unread.
            free.put(None)
            thread.join()


def _rows_by_view(store: Store, split: str) -> Rows:
    """Row numbers (view, sample): a view that a sample lacks is its view 0."""
    base = store.rows(split)
    if len(base) == 0:
        raise SourceError(f"{store.path} has no {split} samples")
    if split != "train" or store.views == 0:
        return base[None]
    ids = store.sample_ids(base)
    views = [base]
    for view in range(1, store.views + 1):
        rows = store.rows(split, view)
        row_of = dict(zip(store.sample_ids(rows), rows.tolist(), strict=True))
        views.append(np.array([row_of.get(sample, row) for sample, row in zip(ids, base.tolist(), strict=True)]))
    return np.stack(views)


def _class_targets(store: Store, rows: Rows, split: str) -> Rows:
    targets = store.targets(rows)
    if targets.min() < 0 or targets.max() >= store.n_classes:
        raise SourceError(
            f"{store.path} has {split} labels from {targets.min()} to {targets.max()}; its classes are 0 to "
            f"{store.n_classes - 1}"
        )
    return targets
