"""The tables beside the features: which sample a row is, what was rejected; and Parquet from rows, and back.

A table is parsed from an Arrow file (`pa.NativeFile`), which may be bytes in memory (`pa.BufferReader`) or anything
that can be read at a place; so a table of ten million rows need not be in memory for one of its columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import batched
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coldtap.errors import CorruptStoreError

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


def table_pieces(schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    """Yield the bytes of a table from rows of values in the schema's order; a group of rows is in memory at a time."""
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


def parse_schema(file: pa.NativeFile, *, where: str) -> pa.Schema:
    """Return a table's columns, with what else its schema says.

    Raises:
        CorruptStoreError: the file is damaged; the message names it as `where`.
    """
    with _parquet(file, where) as parquet:
        return parquet.schema_arrow


def parse_table(
    file: pa.NativeFile,
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    *,
    most_values: int | None = None,
    where: str,
) -> pa.Table:
    """Return a table of the given columns, or some of them; the checksums of their pages are verified.

    Args:
        file: its bytes.
        schema: the columns that it must have; what else the schema says is not compared.
        columns: names of those to read; None reads all.
        most_values: of a column of lists, the most values that all its lines together may have.
        where: the file, for errors.

    Raises:
        CorruptStoreError: the file is damaged or has other columns.
    """
    with _parquet(file, where) as parquet:
        found = parquet.schema_arrow
        if not found.equals(schema, check_metadata=False):
            raise CorruptStoreError(f"{where} has columns {found.names}; expected {schema.names} of their types")
        if parquet.metadata.num_rows > MOST_LINES_A_BYTE * file.size():
            raise CorruptStoreError(f"{where} claims {parquet.metadata.num_rows} lines, more than its bytes can hold")
        if most_values is not None and _most_values(parquet.metadata) > max(most_values, parquet.metadata.num_rows):
            raise CorruptStoreError(
                f"{where} claims {_most_values(parquet.metadata)} values; expected {most_values} at most"
            )
        table = parquet.read(columns=columns)
    for name in {*table.column_names} - NULLABLE:
        if table[name].null_count:
            raise CorruptStoreError(f"{where}: a line has no {name}")
    return table


@contextmanager
def _parquet(file: pa.NativeFile, where: str) -> Iterator[pq.ParquetFile]:
    try:
        yield pq.ParquetFile(file, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptStoreError(f"{where} cannot be read: {(str(error).splitlines() or [''])[0]}") from error


def _most_values(metadata: pq.FileMetaData) -> int:
    """Values of the longest column; an empty list counts as one."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return max((sum(group.column(i).num_values for group in groups) for i in range(metadata.num_columns)), default=0)
