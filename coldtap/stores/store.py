"""Reading a store: rows of features into a buffer that the caller gives, and the tables beside them."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from coldtap.stores.array_reader import StoredArray
from coldtap.stores.canonical import sha256
from coldtap.stores.errors import CorruptStoreError, MissingFeaturesError, StoreError
from coldtap.stores.index import (
    REJECTED,
    REJECTED_SCHEMA,
    SAMPLES,
    SAMPLES_SCHEMA,
    read_table,
    read_targets,
    targets_name,
)
from coldtap.stores.manifest import FEATURES, Entry, read_manifest
from coldtap.stores.norm import FinalNorm
from coldtap.stores.recipe import Recipe
from coldtap.stores.recipe_file import RECIPE, read_recipe
from coldtap.stores.rows import SPLITS

type Rows = np.ndarray[Any, np.dtype[np.int64]]


def open_store(path: str | Path) -> "Store":
    """Open a complete store for reading.

    Raises:
        StoreError: there is no store at `path`.
        IncompleteStoreError: it has no manifest yet.
        CorruptStoreError: its recipe or metadata is not what the manifest says.
    """
    return Store(Path(path))


class Store:
    """A complete store.

    Attributes:
        path: its folder.
        recipe: what was asked.
        recorded: what the run found out, and where it ran.
        digest: SHA-256 of the manifest: what is there.
        arrays: by name, such as `layers/g8x8-p1-c192`.
    """

    def __init__(self, path: Path) -> None:
        found = read_recipe(path)
        if found is None:
            raise StoreError(f"there is no store at {path}: make one with `cache-features SOURCE {path}`")
        self.path = path
        self.recipe: Recipe = found[0]
        self.recorded: Mapping[str, Any] = found[1]
        self.entries, self.digest = read_manifest(path)
        self._require(RECIPE)
        self.arrays = self._open_arrays()

    def _require(self, name: str) -> bytes:
        """The bytes of a small file, held against the manifest."""
        entry: Entry | None = self.entries.get(name)
        try:
            data = (self.path / name).read_bytes()
        except FileNotFoundError:
            raise CorruptStoreError(f"{self.path / name} is missing: fetch it again, or run `coldtap verify`") from None
        if entry is None or sha256(data) != entry.sha256:
            raise CorruptStoreError(f"{self.path / name} is not what the manifest says: run `coldtap verify`")
        return data

    def _open_arrays(self) -> dict[str, StoredArray]:
        arrays = {}
        for name in sorted(self.entries):
            parts = name.split("/")
            if parts[0] == FEATURES and parts[-1] == "zarr.json" and parts[1] in ("layers", "sum", "pooled"):
                metadata = json.loads(self._require(name))
                if metadata.get("node_type") == "array":
                    array = StoredArray(self.path, "/".join(parts[1:-1]), metadata)
                    arrays[array.name] = array
        return arrays

    @cached_property
    def samples(self) -> pa.Table:
        """One line a present row, ascending: row, sample_id, view, split, source, source_sha256."""
        self._require(SAMPLES)
        return read_table(self.path / SAMPLES, SAMPLES_SCHEMA)

    @cached_property
    def _present(self) -> Rows:
        return np.asarray(self.samples["row"].to_numpy())

    @property
    def n_rows(self) -> int:
        """Present rows."""
        return len(self._present)

    @property
    def views(self) -> int:
        """Augmented views of each training image, beside view 0."""
        return int(self.recipe.rows["views"])

    @property
    def depth(self) -> int:
        """N, the index of the backbone's last tap."""
        return len(self.recipe.extractor["taps"]) - 1

    @property
    def splits(self) -> dict[str, int]:
        """Samples (present rows of view 0) a split."""
        return {split: n for split in SPLITS if (n := len(self.rows(split))) > 0}

    def rows(self, split: str, view: int = 0) -> Rows:
        """Numbers of the present rows of a (split, view), ascending; empty where there are none."""
        of_split = np.asarray(self.samples["split"].to_numpy() == split)
        return np.asarray(self._present[of_split & (self.samples["view"].to_numpy() == view)])

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Sample ids of rows.

        Raises:
            MissingFeaturesError: a row is not there.
        """
        ids: list[str] = self.samples["sample_id"].take(pa.array(self._places(rows))).to_pylist()
        return ids

    def sources(self, rows: Sequence[int] | Rows) -> list[str]:
        """Where the samples of rows came from."""
        sources: list[str] = self.samples["source"].take(pa.array(self._places(rows))).to_pylist()
        return sources

    def splits_by_id(self) -> dict[str, str]:
        """The split of every sample of the plan, rejected ones included, by sample id."""
        self._require(REJECTED)
        tables = self.samples, read_table(self.path / REJECTED, REJECTED_SCHEMA)
        return {
            sample: split
            for table in tables
            for sample, split in zip(table["sample_id"].to_pylist(), table["split"].to_pylist(), strict=True)
        }

    def _places(self, rows: Sequence[int] | Rows) -> Rows:
        wanted = np.asarray(rows, np.int64)
        places = np.searchsorted(self._present, wanted)
        there = self._present[np.minimum(places, len(self._present) - 1)] == wanted
        if not there.all():
            raise MissingFeaturesError(
                f"{self.path} has no row {int(wanted[~there][0])}: it is padding, was rejected, or is out of range"
            )
        return places

    @cached_property
    def _targets(self) -> dict[str, tuple[Mapping[str, int], tuple[str, ...] | None]]:
        return {}

    def _target_table(self, name: str) -> tuple[Mapping[str, int], tuple[str, ...] | None]:
        if name not in self._targets:
            if targets_name(name) not in self.entries:
                raise MissingFeaturesError(
                    f"{self.path} has no targets {name!r}: it was made from images without labels"
                )
            self._require(targets_name(name))
            self._targets[name] = read_targets(self.path / targets_name(name))
        return self._targets[name]

    def targets(self, rows: Sequence[int] | Rows, name: str = "label") -> Rows:
        """Targets of rows: (row,) int64.

        Raises:
            MissingFeaturesError: the store has no such targets, or not for a row.
        """
        table, _ = self._target_table(name)
        ids = self.sample_ids(rows)
        if missing := next((sample for sample in ids if sample not in table), None):
            raise MissingFeaturesError(f"{self.path / targets_name(name)} has no target for sample {missing!r}")
        return np.array([table[sample] for sample in ids], np.int64)

    def class_names(self, name: str = "label") -> tuple[str, ...] | None:
        """Names of the classes, by number, where the source gave them."""
        return self._target_table(name)[1]

    @property
    def n_classes(self) -> int:
        """Classes of the targets `label`."""
        table, names = self._target_table("label")
        return len(names) if names else max(table.values()) + 1

    @cached_property
    def norm(self) -> FinalNorm | None:
        """The backbone's frozen final norm, or None where it has none."""
        attributes = json.loads(self._require(f"{FEATURES}/norm/zarr.json"))["attributes"]
        if attributes["kind"] == "none":
            return None
        return FinalNorm(
            kind=attributes["kind"],
            eps=attributes["eps"],
            weight=self._norm_values("weight"),
            bias=self._norm_values("bias"),
        )

    def _norm_values(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        file = f"{FEATURES}/norm/{name}/c/0"
        return np.frombuffer(self._require(file), "<f4") if file in self.entries else None
