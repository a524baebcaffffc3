"""Batches of features from a store: kept as stored numbers where they fit, else read ahead by one thread.

The order of an epoch and the view of each sample are a pure function of (seed, epoch). There are no worker
processes: a fork deadlocks several readers, and threads read and decode while torch computes.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coldtap.adaptors.data.devices import free_gpu_bytes, to_device
from coldtap.adaptors.data.epoch_order import Mixing, Shuffle, batch_bounds, block_mixing, block_starts, epoch_draw
from coldtap.adaptors.data.memory import available_memory_bytes, decide_residency
from coldtap.adaptors.data.read_ahead import ReadAhead
from coldtap.adaptors.data.resident import HeldRows
from coldtap.adaptors.data.restore import Restorer, StoredTaps
from coldtap.adaptors.metrics.tasks import Task, task_of
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.errors import SourceError
from coldtap.stores import Store
from coldtap.stores.format.compensation import TapMaps

type Rows = np.ndarray[Any, np.dtype[np.int64]]

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Features (sample, *row shape) float32, and targets; valid until the next batch is asked for.

    Targets are (sample,) int64, of labels (sample, class) float32, of token classes (sample, patch) int64.
    """

    features: torch.Tensor
    targets: torch.Tensor


class FeatureBatches:
    """Batches of one split of a store, as one adaptor reads it, on the device that trains.

    Attributes:
        task: What is learnt, by the kind of the targets.
        n_classes: How many classes the targets have.
        n_samples: Samples of the split: present rows of view 0.
        n_batches: Batches of a shuffled epoch, of this process.
        targets: Of every sample, on the CPU: as in a batch, but labels are bool.
        device: Where batches are.
        bytes_per_sample: Stored bytes of a sample's features.
        residency: Whether the features are kept in memory, and why.
        mixing: How far a block shuffle is from a uniform one; None where the shuffle is uniform.
    """

    def __init__(
        self,
        store: Store,
        spec: FeatureSpec,
        split: str,
        *,
        batch_size: int,
        target: str = "label",
        resident: bool | None = None,
        device: torch.device = CPU,
        shuffle: Shuffle = "uniform",
        rank: int = 0,
        world_size: int = 1,
        maps: TapMaps | None = None,
    ) -> None:
        """Look up the split's rows and targets; read the features if they are to be kept.

        Args:
            store: An open store.
            spec: The array and taps to read.
            split: Name of the split, or `train+val`; of train samples all views are read, of others view 0.
            batch_size: Samples a batch; the last one of an epoch may be smaller.
            target: Name of the targets.
            resident: Whether to keep the features in memory; None decides by their size.
            device: Where batches are wanted.
            shuffle: `uniform`, or `block`, which reads rows near each other.
            rank: Number of this process among those that train together.
            world_size: Number of those processes; each takes its part of a shuffled epoch.
            maps: A compensation of the taps of `spec`, which features go through.

        Raises:
            MissingFeaturesError: The store has no such targets, or not of every sample.
            SourceError: The split is empty, or its targets are no classes of the store.
            OptionError: `rank` is no process of `world_size`.
        """
        self.batch_size, self.device = batch_size, device
        self._store, self._split, self._target = store, split, target
        self._rows = _rows_by_view(store, split)  # (view, sample)
        self.n_samples = int(self._rows.shape[1])
        self._bounds = batch_bounds(self.n_samples, batch_size=batch_size, rank=rank, world_size=world_size)
        self.n_batches = len(self._bounds)
        self.task: Task = task_of(store.target_kind(target))
        self.n_classes = store.n_classes(target)
        self.targets = torch.from_numpy(_targets_in_range(store, self._rows[0], split, target))
        block_rows = store.arrays[spec.array].spec.block_rows
        self._blocks = block_starts(self._rows[0], block_rows) if shuffle == "block" else None
        self.mixing: Mixing | None = None if self._blocks is None else block_mixing(self._blocks, batch_size)
        taps = StoredTaps(store, spec, maps)
        self.bytes_per_sample = taps.bytes_per_row
        rows = self._rows[0] if len(self._rows) == 1 else np.unique(self._rows)
        self.residency = decide_residency(
            len(rows) * taps.bytes_per_row,
            ram_bytes=available_memory_bytes(),
            gpu_bytes=free_gpu_bytes(device),
            asked=resident,
        )
        self._features_of = self._open(taps, rows)

    @property
    def absent_classes(self) -> tuple[str, ...]:
        """Classes that other samples of the store have and none of these has: by name, else by number."""
        rows = np.concatenate([self._store.rows(split) for split in self._store.splits])
        elsewhere = _classes_of(self._store.targets(rows, self._target))
        names = self._store.class_names(self._target)
        absent = np.setdiff1d(elsewhere, _classes_of(self.targets.numpy())).tolist()
        return tuple(names[number] if names else str(number) for number in absent)

    def sample_ids(self) -> list[str]:
        """Return the id of each sample, in the order of `ordered`."""
        return self._store.sample_ids(self._rows[0])

    def _open(self, taps: StoredTaps, rows: Rows) -> Callable[[Iterable[Rows]], Generator[torch.Tensor]]:
        """Read the rows if they are kept; return what yields the features of batches of rows."""

        # Buffers belong to one iteration: two epochs at a time must not share them.
        def restorer() -> Restorer:
            return Restorer(taps, self.device, self.batch_size)

        if not self.residency.resident:
            return lambda batches: ReadAhead(taps, restorer(), self.device, self.batch_size).features(batches)
        here = self.residency.on_gpu or self.device.type == "cpu"
        held = HeldRows(taps, rows, self.device if here else CPU)
        if here:
            return lambda batches: held.features(batches, restorer())
        return lambda batches: ReadAhead(held, restorer(), self.device, self.batch_size).features(batches)

    def shuffled(self, *, seed: int, epoch: int, start_batch: int = 0) -> Generator[Batch]:
        """Yield this process's batches of an epoch: of every sample one view, in the order that (seed, epoch) gives.

        Args:
            seed: The run's seed.
            epoch: The epoch's number.
            start_batch: Batches to leave out: those that an interrupted epoch has had.
        """
        order, views = epoch_draw(self.n_samples, len(self._rows), seed=seed, epoch=epoch, blocks=self._blocks)
        yield from self._batches(order, views, self._bounds[start_batch:])

    def ordered(self) -> Iterator[Batch]:
        """Yield view 0 of every sample of the split in the order of the rows, in each process."""
        bounds = batch_bounds(self.n_samples, batch_size=self.batch_size)
        yield from self._batches(np.arange(self.n_samples), np.zeros(self.n_samples, np.int64), bounds)

    def _batches(self, samples: Rows, views: Rows, bounds: Rows) -> Iterator[Batch]:
        rows = (self._rows[views[start:stop], samples[start:stop]] for start, stop in bounds)
        with closing(self._features_of(rows)) as features:
            for (start, stop), values in zip(bounds, features, strict=True):
                targets = to_device(self.targets[torch.from_numpy(samples[start:stop])], self.device)
                yield Batch(features=values, targets=targets.float() if targets.dtype == torch.bool else targets)


def _rows_by_view(store: Store, split: str) -> Rows:
    """Row numbers (view, sample): a view that a sample lacks is its view 0."""
    parts = [_rows_of_split(store, part) for part in split.split("+")]
    n_views = max(len(part) for part in parts)
    whole = [np.concatenate([part, np.broadcast_to(part[:1], (n_views - len(part), part.shape[1]))]) for part in parts]
    return np.concatenate(whole, axis=1)


def _rows_of_split(store: Store, split: str) -> Rows:
    base = store.rows(split)
    if len(base) == 0:
        raise SourceError(f"{store.storage} has no {split} samples")
    if split != "train" or store.views == 0:
        return base[None]
    samples = store.sample_numbers(base)
    return np.stack([base, *(_rows_of(store, split, view, samples, base) for view in range(1, store.views + 1))])


def _rows_of(store: Store, split: str, view: int, samples: Rows, otherwise: Rows) -> Rows:
    """Row numbers of a view of some samples, by number; of those that lack it, the rows given."""
    rows = store.rows(split, view)
    if len(rows) == 0:
        return otherwise
    there = store.sample_numbers(rows)  # ascending, since every view keeps the order of view 0
    places = np.minimum(np.searchsorted(there, samples), len(there) - 1)
    return np.where(there[places] == samples, rows[places], otherwise)


def _targets_in_range(store: Store, rows: Rows, split: str, name: str) -> np.ndarray[Any, Any]:
    """Targets of rows; those of kind `class` are held against the class names here, others were when they were read."""
    targets, n_classes = store.targets(rows, name), store.n_classes(name)
    if store.target_kind(name) == "class" and (targets.min() < 0 or targets.max() >= n_classes):
        raise SourceError(
            f"{store.storage} has {split} targets {name!r} from {targets.min()} to {targets.max()}; its classes are 0 "
            f"to {n_classes - 1}"
        )
    return targets


def _classes_of(targets: np.ndarray[Any, Any]) -> Rows:
    """The classes that occur in some targets, ascending."""
    if targets.dtype == bool:
        return np.flatnonzero(targets.any(axis=0))
    classes = np.unique(targets)
    return np.asarray(classes[classes >= 0])
