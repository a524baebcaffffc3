"""The targets of a store: what is to be learnt of each sample."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldtap.errors import CorruptStoreError, MissingFeaturesError
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.targets import TARGETS, Targets, parse_target_ids, parse_targets, targets_name
from coldtap.stores.reading.manifest_files import ManifestFiles
from coldtap.stores.reading.row_index import RowIndex, Rows


class Labels:
    """The named targets of a complete store, each table read once."""

    def __init__(self, files: ManifestFiles, recipe: Recipe, rows: RowIndex) -> None:
        """Read nothing yet."""
        self._files, self._recipe, self._rows = files, recipe, rows
        self._tables: dict[str, Targets] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the targets, sorted."""
        files = self._files.names_below(TARGETS)
        return tuple(file.removeprefix(f"{TARGETS}/").removesuffix(".parquet") for file in files)

    def table(self, name: str) -> Targets:
        """Return the targets of a name.

        Raises:
            MissingFeaturesError: there are none.
            CorruptStoreError: their table is damaged, or on a grid that the store does not have.
        """
        if name not in self._tables:
            self._tables[name] = self._read(name)
        return self._tables[name]

    def _read(self, name: str) -> Targets:
        storage, file = self._files.storage, targets_name(name)
        if not self._files.has(file):
            raise MissingFeaturesError(f"{storage} has no targets {name!r}; {self._describe()}")
        where = storage.describe(file)
        table = parse_targets(self._files.table(file), most_lines=self._recipe.rows.n_samples, where=where)
        grids = {tap.grid for tap in self._recipe.extractor.taps}
        if table.grid is not None and table.grid not in grids:
            raise CorruptStoreError(
                f"{where}: a grid of {table.grid[0]} × {table.grid[1]}; the taps have "
                f"{', '.join(f'{h} × {w}' for h, w in sorted(grids))}"
            )
        return table

    def _describe(self) -> str:
        names = ", ".join(map(repr, self.names))
        return f"it has {names}" if names else "it was made from images without labels"

    def of_rows(self, rows: Sequence[int] | Rows, name: str) -> np.ndarray[Any, Any]:
        """Return targets of rows, as `Store.targets` does."""
        table = self.table(name)
        if table.order is None or table.order != self._recipe.rows.order:
            return table.of(self._lines_by_id(rows, name, table))
        numbers = self._rows.sample_numbers(rows)
        if len(numbers) and numbers.max() >= table.n_lines:
            where = self._files.storage.describe(targets_name(name))
            raise CorruptStoreError(f"{where} has fewer lines than the store has samples")
        return table.of(numbers)

    def _lines_by_id(self, rows: Sequence[int] | Rows, name: str, table: Targets) -> Rows:
        """The line of each row's sample."""
        storage, file = self._files.storage, targets_name(name)
        where = storage.describe(file)
        ids = pa.array(self._rows.sample_ids(rows), pa.string())
        lines = pc.index_in(ids, parse_target_ids(self._files.table(file), table.kind, where=where))
        if lines.null_count:
            missing = ids[pc.index(lines.is_null(), True).as_py()].as_py()
            raise MissingFeaturesError(f"{where} has no target for sample {missing!r}")
        return np.asarray(lines.to_numpy().astype(np.int64))
