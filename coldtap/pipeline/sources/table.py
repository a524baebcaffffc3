"""A CSV or Parquet list of local paths: columns path and label, optionally label_name, split, id."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from coldtap.pipeline.sources.columns import (
    OPTIONAL_COLUMNS,
    class_names_of,
    labels_of,
    require_columns,
    strings,
    whole_strings,
)
from coldtap.pipeline.sources.files import FileSource, file_sizes
from coldtap.pipeline.sources.listing import fingerprint_of, make_listing
from coldtap.pipeline.sources.splits import Labels
from coldtap.stores.errors import SourceError

TEXT_COLUMNS = ("path", "label_name", "split", "id")


def open_table(file: Path, *, labels: Labels, seed: int) -> FileSource:
    """List the files that a table names. Relative paths start from the table's folder.

    Without an id column, ids are the paths: relative to that folder where they lie below it.

    Raises:
        SourceError: The table cannot be read, lacks a column, or none of its files is there.
    """
    name, root = str(file), str(file.parent)
    table = _read_csv(file, name) if file.suffix.lower() == ".csv" else _read_parquet(file, name)
    require_columns(table.column_names, ("path", "label") if labels == "required" else ("path",), name=name)
    paths = [_relative(path, root) for path in whole_strings(table, "path", name=name) or ()]
    ids = whole_strings(table, "id", name=name) or paths
    sizes, missing = file_sizes(root, paths, name=name)
    listing = make_listing(
        name=name,
        ids=ids,
        splits=strings(table, "split", name=name),
        targets=labels_of(table, name=name),
        class_names=class_names_of(table, name=name),
        fingerprint=fingerprint_of(ids, sizes, name=name),
        place=lambda index: f"row {index} ({paths[index]})",
        labels=labels,
        seed=seed,
        notes=[missing],
    )
    return FileSource(name=name, listing=listing, root=root, paths=tuple(paths))


def _relative(path: str, root: str) -> str:
    path = os.path.normpath(path)
    below = os.path.relpath(path, os.path.abspath(root)) if os.path.isabs(path) else path
    return path if below.startswith("..") else below


def _read_csv(file: Path, name: str) -> pa.Table:
    # An empty field is null, and nothing else is: a class may be called 'NA'.
    options = pacsv.ConvertOptions(
        column_types=dict.fromkeys(TEXT_COLUMNS, pa.large_string()), null_values=[""], strings_can_be_null=True
    )
    try:
        return pacsv.read_csv(file, convert_options=options)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{name}: not a CSV table: {error}") from error


def _read_parquet(file: Path, name: str) -> pa.Table:
    try:
        wanted = {"path", "label", *OPTIONAL_COLUMNS}
        with pq.ParquetFile(file) as parquet:
            return parquet.read([column for column in parquet.schema_arrow.names if column in wanted])
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{name}: not a Parquet file: {error}") from error
