"""The tables beside the features: which sample a row is, what was rejected, and the targets."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import batched
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coldtap.stores.durable import write_file
from coldtap.stores.errors import CorruptStoreError

SAMPLES = "samples.parquet"
REJECTED = "rejected.parquet"
TARGETS = "targets"
ROWS_A_GROUP = 8192
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
TARGETS_SCHEMA = pa.schema([("sample_id", pa.string()), ("target", pa.int64())])


def targets_name(name: str) -> str:
    """Path of a named target's table under the store."""
    return f"{TARGETS}/{name}.parquet"


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table from rows of values in the schema's order; a group of rows is in memory at a time."""
    write_file(path, _parquet_pieces(schema, rows))


def _parquet_pieces(schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    sink = BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
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


def targets_bytes(ids: Sequence[str], targets: Sequence[int], class_names: Sequence[str] | None) -> bytes:
    """The Parquet bytes of a targets table; class names travel in the schema's metadata."""
    metadata = {b"class_names": json.dumps(list(class_names)).encode()} if class_names else None
    table = pa.Table.from_arrays(
        [pa.array(ids, pa.string()), pa.array(targets, pa.int64())],
        schema=TARGETS_SCHEMA.with_metadata(metadata),
    )
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_targets(path: Path) -> tuple[Mapping[str, int], tuple[str, ...] | None]:
    """Targets by sample id, and the class names where known.

    Raises:
        CorruptStoreError: the file is not such a table.
    """
    table = read_table(path, TARGETS_SCHEMA)
    names = (table.schema.metadata or {}).get(b"class_names")
    ids, targets = table["sample_id"].to_pylist(), table["target"].to_pylist()
    return dict(zip(ids, targets, strict=True)), tuple(json.loads(names)) if names else None


def same_targets(path: Path, data: bytes) -> bool:
    """Whether a stored table says what `data` says; its bytes may differ, as those of two pyarrow versions do.

    Raises:
        CorruptStoreError: the stored file is not such a table.
    """
    return bool(read_table(path, TARGETS_SCHEMA).equals(pq.read_table(BytesIO(data)), check_metadata=True))


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """A table of the given columns.

    Raises:
        CorruptStoreError: the file is missing, damaged or has other columns.
    """
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise CorruptStoreError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not table.schema.equals(schema, check_metadata=False):
        raise CorruptStoreError(f"{path} has columns {table.schema.names}; expected {schema.names} of their types")
    return table
