"""The tables beside the features: which sample a row is, what was rejected; and how a table is written and read."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import batched
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coldtap.errors import CorruptStoreError
from coldtap.stores.storage.atomic import write_file
from coldtap.stores.storage.files import open_regular

SAMPLES = "samples.parquet"
REJECTED = "rejected.parquet"
ROWS_A_GROUP = 65_536
MOST_LINES_A_BYTE = 8  # every line has an id of its own: no compression brings it below a bit
SAMPLES_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample_id", pa.string()),
        ("view", pa.int32()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
    ]
)
REJECTED_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample_id", pa.string()),
        ("view", pa.int32()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("tap", pa.int32()),
    ]
)
NULLABLE = {"tap"}


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table from rows of values in the schema's order; a group of rows is in memory at a time."""
    write_file(path, _parquet_pieces(schema, rows))


def _parquet_pieces(schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    sink = BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for group in batched(rows, ROWS_A_GROUP):
            columns = zip(*group, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            yield _drained(sink)
    yield _drained(sink)


def _drained(sink: BytesIO) -> bytes:
    """What was written since the last call; pyarrow counts its own position."""
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


def read_schema(path: Path) -> pa.Schema:
    """A table's columns, with what else its schema says.

    Raises:
        CorruptStoreError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return file.schema_arrow


def read_table(
    path: Path, schema: pa.Schema, columns: Sequence[str] | None = None, *, most_values: int | None = None
) -> pa.Table:
    """A table of the given columns, or some of them; the checksums of their pages are verified.

    Args:
        path: its file.
        schema: the columns that it must have; what else the schema says is not compared.
        columns: names of those to read; None reads all.
        most_values: of a column of lists, the most values that all its lines together may have.

    Raises:
        CorruptStoreError: the file is missing, damaged or has other columns.
    """
    with _opened(path) as file:
        found = file.schema_arrow
        if not found.equals(schema, check_metadata=False):
            raise CorruptStoreError(f"{path} has columns {found.names}; expected {schema.names} of their types")
        if file.metadata.num_rows > MOST_LINES_A_BYTE * path.stat().st_size:
            raise CorruptStoreError(f"{path} claims {file.metadata.num_rows} lines, more than its bytes can hold")
        if most_values is not None and _most_values(file.metadata) > max(most_values, file.metadata.num_rows):
            raise CorruptStoreError(
                f"{path} claims {_most_values(file.metadata)} values; expected {most_values} at most"
            )
        table = file.read(columns=columns)
    for name in {*table.column_names} - NULLABLE:
        if table[name].null_count:
            raise CorruptStoreError(f"{path}: a line has no {name}")
    return table


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        os.close(open_regular(path))  # pyarrow would wait for the writer of a pipe
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptStoreError(f"{path} cannot be read: {(str(error).splitlines() or [''])[0]}") from error


def _most_values(metadata: pq.FileMetaData) -> int:
    """Values of the longest column; an empty list counts as one."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return max((sum(group.column(i).num_values for group in groups) for i in range(metadata.num_columns)), default=0)
