"""A CSV or Parquet list of local paths: columns path and label, optionally label_name, split, id.

Where an image has any number of labels, `label` of a Parquet list holds lists; a CSV has the column `labels` instead,
with integers or names between bars: `3|7`, `cat|dog`, and nothing where there is none.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from coldtap.errors import SourceError
from coldtap.pipeline.images.sources.columns import (
    OPTIONAL_COLUMNS,
    class_names_of,
    labels_of,
    require_columns,
    strings,
    whole_strings,
)
from coldtap.pipeline.images.sources.files import FileSource, file_sizes
from coldtap.pipeline.images.sources.listing import fingerprint_of, make_listing
from coldtap.pipeline.images.sources.splits import Labels

TEXT_COLUMNS = ("path", "label_name", "split", "id", "labels")
BETWEEN_LABELS = "|"


def open_table(file: Path, *, labels: Labels, seed: int) -> FileSource:
    """List the files that a table names. Relative paths start from the table's folder.

    Without an id column, ids are the paths: relative to that folder where they lie below it.

    Raises:
        SourceError: the table cannot be read, lacks a column, or none of its files is there.
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
        table = pacsv.read_csv(file, convert_options=options)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{name}: not a CSV table: {error}") from error
    wanted = "labels" in table.column_names and "label" not in table.column_names
    return _with_label_sets(table) if wanted else table


def _with_label_sets(table: pa.Table) -> pa.Table:
    """The table with a column of lists in place of text: of integers where every label is one."""
    text = table["labels"].fill_null("").to_pylist()
    rows = [[label.strip() for label in line.split(BETWEEN_LABELS)] if line.strip() else [] for line in text]
    if all(label.isascii() and label.isdecimal() for labels in rows for label in labels):
        lists = pa.array([[int(label) for label in labels] for labels in rows], pa.list_(pa.int64()))
    else:
        lists = pa.array(rows, pa.list_(pa.large_string()))
    return table.drop_columns(["labels"]).append_column("label", lists)


def _read_parquet(file: Path, name: str) -> pa.Table:
    try:
        wanted = {"path", "label", *OPTIONAL_COLUMNS}
        with pq.ParquetFile(file) as parquet:
            return parquet.read([column for column in parquet.schema_arrow.names if column in wanted])
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{name}: not a Parquet file: {error}") from error
