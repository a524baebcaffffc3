"""Reading a store: rows of features into a buffer that the caller gives, and the tables beside them."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldtap.errors import CorruptStoreError, MissingFeaturesError, StoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.canonical import sha256
from coldtap.stores.format.codes import Floats
from coldtap.stores.format.compensation import COMPENSATION, SUFFIX, Compensation, compensation_file, parse_compensation
from coldtap.stores.format.manifest import FEATURES, file_entry, read_manifest
from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import Segment, segments_of
from coldtap.stores.format.tables import (
    REJECTED,
    REJECTED_SCHEMA,
    SAMPLES,
    SAMPLES_SCHEMA,
    read_table,
)
from coldtap.stores.format.targets import TARGETS, Targets, read_target_ids, read_targets, targets_name
from coldtap.stores.format.types import TargetKind
from coldtap.stores.reading.array import StoredArray, require_metadata
from coldtap.stores.reading.recipe_file import RECIPE, read_recipe
from coldtap.stores.reading.row_index import PresentRows
from coldtap.stores.reading.shard_files import ShardFiles
from coldtap.stores.reading.stored_numbers import read_metadata, read_numbers
from coldtap.stores.storage.files import read_small
from coldtap.stores.storage.threads import Threads

type Rows = np.ndarray[Any, np.dtype[np.int64]]


def open_store(path: str | Path, *, threads: int | None = None) -> "Store":
    """Open a complete store for reading.

    Args:
        path: its folder.
        threads: that read and decode; None is one a core, up to 8.

    Raises:
        StoreError: there is no store at `path`.
        IncompleteStoreError: it has no manifest yet.
        CorruptStoreError: its recipe or metadata is not what the manifest says.
    """
    return Store(Path(path), threads=threads)


class Store:
    """A complete store; safe in threads, after a fork, and to be sent to another process.

    Attributes:
        path: its folder.
        recipe: what was asked.
        recorded: what the run found out, and where it ran.
        arrays: by name, such as `layers/g8x8-p1-c192`.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        found = read_recipe(path)
        if found is None:
            raise StoreError(f"there is no store at {path}: make one with `cache-features SOURCE {path}`")
        self.path = path
        self.recipe: Recipe = found[0]
        self.recorded: Mapping[str, Any] = found[1]
        self.manifest = read_manifest(path)
        self._n_threads = threads
        self.read_file(RECIPE)
        self._files, self._threads = ShardFiles(path / FEATURES), Threads(threads)
        specs = self.recipe.arrays(where=str(path / RECIPE))
        self.arrays = {spec.name: self._open_array(spec) for spec in sorted(specs, key=lambda spec: spec.name)}
        self._require_plan()
        self._targets: dict[str, Targets] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store itself."""
        return _reopened, (self.path, self._n_threads, self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest: what is there."""
        return self.manifest.digest

    def read_file(self, name: str) -> bytes:
        """The bytes of a small file, held against the manifest.

        Raises:
            CorruptStoreError: it is missing, or not what the manifest says.
        """
        data = self._listed(name)
        if data is None:
            raise CorruptStoreError(f"{self.path / name}: the manifest does not list it: run `coldtap verify`")
        return data

    def _listed(self, name: str) -> bytes | None:
        """The bytes of a small file, held against the manifest; None where there is no such file.

        A file that is there and not in the manifest is no file of another: its line is damaged.
        """
        entry = self.manifest.find(name)
        if entry is None:
            if os.path.lexists(self.path / name):
                raise CorruptStoreError(f"{self.path / name}: the manifest does not list it: run `coldtap verify`")
            return None
        try:
            data = read_small(self.path / name)
        except OSError:
            raise CorruptStoreError(f"{self.path / name} is missing: fetch it again, or run `coldtap verify`") from None
        if sha256(data) != entry.sha256:
            raise CorruptStoreError(f"{self.path / name} is not what the manifest says: run `coldtap verify`")
        return data

    def require_intact(self, name: str) -> None:
        """Hold a table against the manifest without having all of it in memory."""
        entry = self.manifest.find(name)
        try:
            same = entry is not None and (self.path / name).stat().st_size == entry.n_bytes
            same = same and file_entry(self.path, name) == entry
        except OSError:
            raise CorruptStoreError(f"{self.path / name} is missing: fetch it again, or run `coldtap verify`") from None
        if not same:
            raise CorruptStoreError(f"{self.path / name} is not what the manifest says: run `coldtap verify`")

    def _open_array(self, spec: ArraySpec) -> StoredArray:
        metadata = read_metadata(self._listed_feature, spec.name, self.path / FEATURES)
        n_rows = require_metadata(metadata, spec, self.path / FEATURES / spec.name / "zarr.json")
        numbers = read_numbers(self._listed_feature, spec, self.path / FEATURES)
        return StoredArray(spec, n_rows, numbers, self._files, self._threads, self._listed_feature)

    def _require_plan(self) -> None:
        """Hold the recipe's rows against the arrays, and against the journal's lines in the manifest."""
        block_rows = self.recipe.encoding.block_rows
        n_blocks = self.recipe.rows.n_blocks(block_rows)
        for array in self.arrays.values():
            if array.n_rows != n_blocks * block_rows:
                raise CorruptStoreError(
                    f"{self.path / FEATURES / array.name}: {array.n_rows} rows; the recipe has {n_blocks * block_rows}"
                )
        if n_blocks > self.manifest.most_lines:
            raise CorruptStoreError(f"{self.path / RECIPE}: {n_blocks} blocks, more than the manifest has lines")

    def _listed_feature(self, key: str) -> bytes | None:
        return self._listed(f"{FEATURES}/{key}")

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Which rows are planned for which (split, view)."""
        rows = self.recipe.rows
        return segments_of(rows.splits, rows.views, self.recipe.encoding.block_rows)

    @cached_property
    def _present(self) -> PresentRows:
        self.require_intact(REJECTED)
        rejected = read_table(self.path / REJECTED, REJECTED_SCHEMA, ["row"])["row"].to_numpy()
        planned = PresentRows(self.segments, self.recipe.encoding.block_rows, np.empty(0, np.int64))
        if (np.diff(rejected) <= 0).any() or len(planned.missing(rejected)):
            raise CorruptStoreError(f"{self.path / REJECTED}: its rows are not ascending, or not planned")
        return PresentRows(self.segments, self.recipe.encoding.block_rows, rejected)

    @property
    def samples(self) -> pa.Table:
        """One line a present row, ascending: row, sample_id, view, split, source, source_sha256."""
        self.require_intact(SAMPLES)
        return read_table(self.path / SAMPLES, SAMPLES_SCHEMA)

    @property
    def n_rows(self) -> int:
        """Present rows."""
        return len(self._present)

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
        """Samples (present rows of view 0) a split."""
        splits = [segment.split for segment in self.segments if segment.view == 0]
        return {split: n for split in splits if (n := len(self.rows(split))) > 0}

    def rows(self, split: str, view: int = 0) -> Rows:
        """Numbers of the present rows of a (split, view), ascending; empty where there are none."""
        return self._present.of(split, view)

    def sample_numbers(self, rows: Sequence[int] | Rows) -> Rows:
        """The number of each row's sample, counted over the splits in row order: views of a sample share it."""
        return self._present.sample_numbers(self._require_present(rows))

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Sample ids of rows.

        Raises:
            MissingFeaturesError: a row is not there.
        """
        ids: list[str] = self._ids.take(pa.array(self._lines(rows))).to_pylist()
        return ids

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        self.require_intact(SAMPLES)
        return read_table(self.path / SAMPLES, SAMPLES_SCHEMA, ["sample_id"])["sample_id"]

    def sources(self, rows: Sequence[int] | Rows) -> list[str]:
        """Where the samples of rows came from."""
        self.require_intact(SAMPLES)
        column = read_table(self.path / SAMPLES, SAMPLES_SCHEMA, ["source"])["source"]
        sources: list[str] = column.take(pa.array(self._lines(rows))).to_pylist()
        return sources

    def splits_by_id(self) -> dict[str, str]:
        """The split of every sample of the plan, rejected ones included, by sample id."""
        self.require_intact(REJECTED)
        tables = self.samples, read_table(self.path / REJECTED, REJECTED_SCHEMA)
        return {
            sample: split
            for table in tables
            for sample, split in zip(table["sample_id"].to_pylist(), table["split"].to_pylist(), strict=True)
        }

    def _require_present(self, rows: Sequence[int] | Rows) -> Rows:
        wanted = np.asarray(rows, np.int64)
        missing = self._present.missing(wanted)
        if len(missing):
            raise MissingFeaturesError(
                f"{self.path} has no row {int(missing[0])}: it is padding, was rejected, or is out of range"
            )
        return wanted

    def _lines(self, rows: Sequence[int] | Rows) -> Rows:
        """The lines of rows in `samples.parquet`."""
        lines = self._present.lines(self._require_present(rows))
        if len(lines) and int(lines.max()) >= len(self._ids):
            raise CorruptStoreError(f"{self.path / SAMPLES} has fewer lines than the store has rows")
        return lines

    def has_targets(self, name: str = "label") -> bool:
        """Whether the store has targets of this name."""
        listed = self.manifest.find(targets_name(name)) is not None
        if not listed and os.path.lexists(self.path / targets_name(name)):
            raise CorruptStoreError(
                f"{self.path / targets_name(name)}: the manifest does not list it: run `coldtap verify`"
            )
        return listed

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the store's targets, sorted."""
        files = [file for file in self.manifest.entries() if file.startswith(f"{TARGETS}/")]
        return tuple(file.removeprefix(f"{TARGETS}/").removesuffix(".parquet") for file in files)

    def target_kind(self, name: str = "label") -> TargetKind:
        """Of which kind the targets of this name are: `class`, `labels` or `token-class`."""
        return self._target_table(name).kind

    def target_grid(self, name: str = "label") -> tuple[int, int] | None:
        """The grid (h, w) of the targets of this name; None where they are not a target a token."""
        return self._target_table(name).grid

    def _target_table(self, name: str) -> Targets:
        if name not in self._targets:
            if not self.has_targets(name):
                raise MissingFeaturesError(f"{self.path} has no targets {name!r}; {self._describe_targets()}")
            self.require_intact(targets_name(name))
            table = read_targets(self.path / targets_name(name), most_lines=self.recipe.rows.n_samples)
            grids = {tap.grid for tap in self.recipe.extractor.taps}
            if table.grid is not None and table.grid not in grids:
                raise CorruptStoreError(
                    f"{self.path / targets_name(name)}: a grid of {table.grid[0]} × {table.grid[1]}; the taps have "
                    f"{', '.join(f'{h} × {w}' for h, w in sorted(grids))}"
                )
            self._targets[name] = table
        return self._targets[name]

    def _describe_targets(self) -> str:
        names = ", ".join(map(repr, self.target_names))
        return f"it has {names}" if names else "it was made from images without labels"

    def targets(self, rows: Sequence[int] | Rows, name: str = "label") -> np.ndarray[Any, Any]:
        """Targets of rows: of kind `class` (row,) int64, `labels` (row, class) bool, `token-class` (row, patch) int64.

        Raises:
            MissingFeaturesError: the store has no such targets, or not for a row.
        """
        table = self._target_table(name)
        if table.order is not None and table.order == self.recipe.rows.order:
            numbers = self.sample_numbers(rows)
            if len(numbers) and numbers.max() >= table.n_lines:
                raise CorruptStoreError(f"{self.path / targets_name(name)} has fewer lines than the store has samples")
            return table.of(numbers)
        ids = pa.array(self.sample_ids(rows), pa.string())
        lines = pc.index_in(ids, read_target_ids(self.path / targets_name(name), table.kind))
        if lines.null_count:
            missing = ids[pc.index(lines.is_null(), True).as_py()].as_py()
            raise MissingFeaturesError(f"{self.path / targets_name(name)} has no target for sample {missing!r}")
        return table.of(lines.to_numpy().astype(np.int64))

    def class_names(self, name: str = "label") -> tuple[str, ...] | None:
        """Names of the classes, by number, where the source gave them."""
        return self._target_table(name).class_names

    def n_classes(self, name: str = "label") -> int:
        """Classes of the targets of this name: as many as have a name, else up to the highest that occurs."""
        return self._target_table(name).n_classes

    @property
    def compensations(self) -> tuple[str, ...]:
        """Names of the store's compensations, sorted."""
        files = [file for file in self.manifest.entries() if file.startswith(f"{COMPENSATION}/")]
        return tuple(file.removeprefix(f"{COMPENSATION}/").removesuffix(SUFFIX) for file in files)

    def compensation(self, name: str) -> Compensation:
        """Maps that bring the features near to those of the float backbone, and on what they were fitted.

        Raises:
            MissingFeaturesError: the store has no compensation of this name.
            CorruptStoreError: its file is damaged.
        """
        file = compensation_file(name)
        data = self._listed(file)
        if data is None:
            names = ", ".join(map(repr, self.compensations)) or "none"
            raise MissingFeaturesError(
                f"{self.path} has no compensation {name!r}; it has {names}: fit one with `coldtap compensate`"
            )
        specs = {array.name: array.spec for array in self.arrays.values()}
        return parse_compensation(data, name, specs, self.path / file)

    @cached_property
    def norm(self) -> FinalNorm | None:
        """The backbone's frozen final norm, or None where it has none."""
        attributes = read_metadata(self._listed_feature, "norm", self.path / FEATURES)["attributes"]
        kind, eps = attributes.get("kind"), attributes.get("eps")
        if kind == "none":
            return None
        if kind not in ("layer_norm", "rms_norm") or type(eps) is not float:
            raise CorruptStoreError(f"{self.path / FEATURES}/norm/zarr.json does not describe a norm")
        return FinalNorm(
            kind=kind,
            eps=eps,
            weight=self._norm_values("weight"),
            bias=self._norm_values("bias"),
        )

    def _norm_values(self, name: str) -> Floats | None:
        data = self._listed(f"{FEATURES}/norm/{name}/c/0")
        if data is not None and len(data) % 4:
            raise CorruptStoreError(f"{self.path / FEATURES}/norm/{name}: {len(data)} bytes are no float32 numbers")
        return None if data is None else np.frombuffer(data, "<f4")


def _reopened(path: Path, threads: int | None, digest: str) -> Store:
    store = Store(path, threads=threads)
    if store.digest != digest:
        raise StoreError(f"{path} is another store than the one that was opened before: open it again")
    return store
