"""Reading a store: rows of features into a buffer that the caller gives, and the tables beside them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from coldtap.errors import CorruptStoreError, MissingFeaturesError, StoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.compensation import COMPENSATION, SUFFIX, Compensation, compensation_file, parse_compensation
from coldtap.stores.format.manifest import FEATURES, Manifest
from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import Segment
from coldtap.stores.format.targets import targets_name
from coldtap.stores.format.types import TargetKind
from coldtap.stores.reading.array import StoredArray, require_metadata
from coldtap.stores.reading.digest_lists import digests_of
from coldtap.stores.reading.escape_reader import escape_reader
from coldtap.stores.reading.labels import Labels
from coldtap.stores.reading.manifest_files import ManifestFiles
from coldtap.stores.reading.recipe_file import RECIPE, read_recipe
from coldtap.stores.reading.row_index import RowIndex, Rows
from coldtap.stores.reading.shard_files import ShardFiles
from coldtap.stores.reading.stored_numbers import read_metadata, read_norm, read_numbers
from coldtap.stores.storage.address import Place, place_of, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.threads import Threads


def open_store(path: Place, *, threads: int | None = None) -> "Store":
    """Open a complete store for reading.

    Args:
        path: its folder, or the storage whose root it is.
        threads: that read and decode; None is one per core, up to 8.

    Raises:
        StoreError: there is no store at `path`.
        IncompleteStoreError: it has no manifest yet.
        CorruptStoreError: its recipe or metadata is not what the manifest says.
    """
    return Store(storage_at(path), threads=threads)


class Store:
    """A complete store; safe in threads, after a fork, and to be sent to another process.

    Attributes:
        storage: where it lies.
        recipe: what was asked.
        recorded: what the run found out, and where it ran.
        files: its small files, held against the manifest.
        index: which sample each row is.
        arrays: by name, such as `layers/g8x8-p1-c192`.
    """

    def __init__(self, storage: Storage, *, threads: int | None = None) -> None:
        """Open a store; raises as `open_store` does."""
        found = read_recipe(storage)
        if found is None:
            raise StoreError(f"there is no store at {storage}: make one with `cache-features SOURCE {storage}`")
        self.storage = storage
        self.recipe: Recipe = found[0]
        self.recorded: Mapping[str, Any] = found[1]
        self.files = ManifestFiles(storage)
        self._n_threads = threads
        self.files.read(RECIPE)
        self._files = ShardFiles(storage, digests_of(self.files, self.recipe))
        self._threads = Threads(threads)
        self.index = RowIndex(self.files, self.recipe)
        specs = self.recipe.arrays(where=storage.describe(RECIPE))
        self.arrays = {spec.name: self._open_array(spec) for spec in sorted(specs, key=lambda spec: spec.name)}
        self._require_plan()
        self._labels = Labels(self.files, self.recipe, self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store itself."""
        return _reopened, (self.storage, self._n_threads, self.digest)

    @property
    def path(self) -> Path:
        """Its folder.

        Raises:
            StoreError: it does not lie in one; `storage` says where it is.
        """
        place = place_of(self.storage)
        if not isinstance(place, Path):
            raise StoreError(f"the store at {self.storage} lies in no folder of this machine")
        return place

    @property
    def name(self) -> str:
        """The last part of where it lies, for titles."""
        return PurePath(str(self.storage)).name

    @property
    def manifest(self) -> Manifest:
        """What is there."""
        return self.files.manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest."""
        return self.manifest.digest

    def read_file(self, name: str) -> bytes:
        """Return the bytes of a small file, held against the manifest.

        Raises:
            CorruptStoreError: it is missing, or not what the manifest says.
        """
        return self.files.read(name)

    def _open_array(self, spec: ArraySpec) -> StoredArray:
        read, features = self.files.find_feature, self._features
        metadata = read_metadata(read, spec.name, features)
        n_rows = require_metadata(metadata, spec, f"{features}/{spec.name}/zarr.json")
        numbers = read_numbers(read, spec, features)
        origin = _array_of, (self.storage, self._n_threads, self.digest, spec.name)
        return StoredArray(
            spec,
            n_rows,
            numbers,
            self._files,
            self._threads,
            escape_reader(spec, self.recipe, self.files),
            f"{features}/{spec.name}",
            index=self.index,
            origin=origin,
        )

    @property
    def _features(self) -> str:
        return self.storage.describe(FEATURES)

    def _require_plan(self) -> None:
        """Hold the recipe's rows against the arrays, and against the journal's lines in the manifest."""
        where = self.storage.describe(RECIPE)
        block_rows = self.recipe.encoding.block_rows
        n_blocks = self.recipe.rows.n_blocks(block_rows)
        for array in self.arrays.values():
            if array.n_rows != n_blocks * block_rows:
                raise CorruptStoreError(
                    f"{self._features}/{array.name}: {array.n_rows} rows; the recipe has {n_blocks * block_rows}"
                )
        if n_blocks > self.manifest.most_lines:
            raise CorruptStoreError(f"{where}: {n_blocks} blocks, more than the manifest has lines")

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Which rows are planned for which (split, view)."""
        return self.index.segments

    @property
    def samples(self) -> pa.Table:
        """One line per present row, ascending: row, sample_id, view, split, source, source_sha256."""
        return self.index.samples()

    @property
    def n_rows(self) -> int:
        """Present rows."""
        return len(self.index.present)

    @property
    def views(self) -> int:
        """Augmented views of each training image, beside view 0."""
        return self.recipe.rows.views

    @property
    def depth(self) -> int:
        """N, the index of the backbone's last tap."""
        return len(self.recipe.extractor.taps) - 1

    @property
    def splits(self) -> dict[str, int]:
        """Samples (present rows of view 0) of each split."""
        splits = [segment.split for segment in self.segments if segment.view == 0]
        return {split: n for split in splits if (n := len(self.rows(split))) > 0}

    def rows(self, split: str, view: int = 0) -> Rows:
        """Return the numbers of the present rows of a (split, view), ascending; empty where there are none."""
        return self.index.present.of(split, view)

    def sample_numbers(self, rows: Sequence[int] | Rows) -> Rows:
        """Return each row's sample's number, counted over the splits in row order: views of a sample share it.

        Raises:
            MissingFeaturesError: a row is not there.
        """
        return self.index.sample_numbers(rows)

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return sample ids of rows.

        Raises:
            MissingFeaturesError: a row is not there.
        """
        return self.index.sample_ids(rows)

    def sources(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return where the samples of rows came from.

        Raises:
            MissingFeaturesError: a row is not there.
        """
        return self.index.sources(rows)

    def splits_by_id(self) -> dict[str, str]:
        """Return the split of every sample of the plan, rejected ones included, by sample id."""
        return self.index.splits_by_id()

    def has_targets(self, name: str = "label") -> bool:
        """Return whether the store has targets of this name."""
        return self.files.has(targets_name(name))

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the store's targets, sorted."""
        return self._labels.names

    def target_kind(self, name: str = "label") -> TargetKind:
        """Return of which kind the targets of this name are: `class`, `labels` or `token-class`."""
        return self._labels.table(name).kind

    def target_grid(self, name: str = "label") -> tuple[int, int] | None:
        """Return the grid (h, w) of the targets of this name; None where they are not one per token."""
        return self._labels.table(name).grid

    def targets(self, rows: Sequence[int] | Rows, name: str = "label") -> np.ndarray[Any, Any]:
        """Return targets of rows.

        Those of kind `class` are (row,) int64, of `labels` (row, class) bool, of `token-class` (row, patch) int64.

        Raises:
            MissingFeaturesError: the store has no such targets, or not for a row.
        """
        return self._labels.of_rows(rows, name)

    def class_names(self, name: str = "label") -> tuple[str, ...] | None:
        """Return the names of the classes, by number, where the source gave them."""
        return self._labels.table(name).class_names

    def n_classes(self, name: str = "label") -> int:
        """Return how many classes the targets have: as many as have a name, else up to the highest that occurs."""
        return self._labels.table(name).n_classes

    @property
    def compensations(self) -> tuple[str, ...]:
        """Names of the store's compensations, sorted."""
        files = self.files.names_below(COMPENSATION)
        return tuple(file.removeprefix(f"{COMPENSATION}/").removesuffix(SUFFIX) for file in files)

    def compensation(self, name: str) -> Compensation:
        """Return maps that bring the features near to those of the float backbone, and on what they were fitted.

        Raises:
            MissingFeaturesError: the store has no compensation of this name.
            CorruptStoreError: its file is damaged.
        """
        file = compensation_file(name)
        data = self.files.find(file)
        if data is None:
            names = ", ".join(map(repr, self.compensations)) or "none"
            raise MissingFeaturesError(
                f"{self.storage} has no compensation {name!r}; it has {names}: fit one with `coldtap compensate`"
            )
        specs = {array.name: array.spec for array in self.arrays.values()}
        return parse_compensation(data, name, specs, self.storage.describe(file))

    @cached_property
    def norm(self) -> FinalNorm | None:
        """The backbone's frozen final norm, or None where it has none."""
        return read_norm(self.files.find_feature, self._features)


def _reopened(storage: Storage, threads: int | None, digest: str) -> Store:
    store = Store(storage, threads=threads)
    if store.digest != digest:
        raise StoreError(f"{storage} is another store than the one that was opened before: open it again")
    return store


def _array_of(storage: Storage, threads: int | None, digest: str, name: str) -> StoredArray:
    return _reopened(storage, threads, digest).arrays[name]
