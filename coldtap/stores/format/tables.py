"""The tables beside the features: which sample a row is, what was rejected; and Parquet from rows, and back.

A table may claim far more than it holds: 38 kB of Parquet can stand for gigabytes of text. What its columns take in
memory is taken from its metadata and its dictionaries, and held against a budget before they are expanded.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import batched
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
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
# Of the file's bytes, what its columns may take in memory: real tables of ids, digests and paths take up to 30 times.
MOST_BYTES_A_BYTE = 200
LEAST_BUDGET = 1 << 26  # bytes
NUMBERS, NUMBER_BYTES = ("INT32", "INT64", "FLOAT", "DOUBLE"), 8


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
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    with _parquet(file, where, dictionaries=texts) as parquet:
        found = _without_dictionaries(parquet.schema_arrow)
        if not found.equals(schema, check_metadata=False):
            raise CorruptStoreError(f"{where} has columns {found.names}; expected {schema.names} of their types")
        if parquet.metadata.num_rows > MOST_LINES_A_BYTE * file.size():
            raise CorruptStoreError(f"{where} claims {parquet.metadata.num_rows} lines, more than its bytes can hold")
        if most_values is not None and _most_values(parquet.metadata) > max(most_values, parquet.metadata.num_rows):
            raise CorruptStoreError(
                f"{where} claims {_most_values(parquet.metadata)} values; expected {most_values} at most"
            )
        budget = max(LEAST_BUDGET, MOST_BYTES_A_BYTE * file.size())
        if (n_bytes := _stated_bytes(parquet.metadata, columns, numbers=most_values is None)) > budget:
            raise CorruptStoreError(f"{where} claims {n_bytes} bytes, more than a table of its size can hold")
        read = parquet.read(columns=columns)
        if (n_bytes := _expanded_bytes(read)) > budget:
            raise CorruptStoreError(f"{where} holds {n_bytes} bytes of text, more than a table of its size can")
        table = read.cast(_without_dictionaries(read.schema))
    for name in {*table.column_names} - NULLABLE:
        if table[name].null_count:
            raise CorruptStoreError(f"{where}: a line has no {name}")
    return table


@contextmanager
def _parquet(file: pa.NativeFile, where: str, dictionaries: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    try:
        yield pq.ParquetFile(file, page_checksum_verification=True, read_dictionary=dictionaries)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptStoreError(
            f"{where} cannot be read: {(str(error).splitlines() or [''])[0].rstrip('.')}"
        ) from error


def _without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """The schema with plain texts where the reader gives a dictionary of them."""
    plain = [field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field for field in schema]
    return pa.schema(plain, schema.metadata)


def _stated_bytes(metadata: pq.FileMetaData, columns: Sequence[str] | None, *, numbers: bool) -> int:
    """Bytes that the columns to be read take, their numbers expanded if these are to count, texts not."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(metadata.num_columns)]
    wanted = [chunk for chunk in chunks if columns is None or chunk.path_in_schema.partition(".")[0] in columns]
    return sum(
        max(
            chunk.total_uncompressed_size,
            NUMBER_BYTES * chunk.num_values * (numbers and chunk.physical_type in NUMBERS),
        )
        for chunk in wanted
    )


def _expanded_bytes(table: pa.Table) -> int:
    """Bytes of text in columns of dictionaries, each word counted as often as it stands there."""
    total = 0
    for column in table.columns:
        for chunk in column.chunks if pa.types.is_dictionary(column.type) else ():
            total += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
    return total


def _most_values(metadata: pq.FileMetaData) -> int:
    """Values of the longest column; an empty list counts as one."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return max((sum(group.column(i).num_values for group in groups) for i in range(metadata.num_columns)), default=0)
