"""The tables beside the features: which sample a row is, what was rejected, and the targets."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldtap.stores.canonical import parse_json
from coldtap.stores.durable import write_file
from coldtap.stores.errors import CorruptStoreError
from coldtap.stores.files import open_regular

SAMPLES = "samples.parquet"
REJECTED = "rejected.parquet"
TARGETS = "targets"
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
TARGETS_SCHEMA = pa.schema([("sample_id", pa.string()), ("target", pa.int64())])


def targets_name(name: str) -> str:
    """Path of a named target's table under the store."""
    return f"{TARGETS}/{name}.parquet"


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


def targets_bytes(
    ids: Sequence[str], targets: Sequence[int], class_names: Sequence[str] | None, *, order: str | None = None
) -> bytes:
    """The Parquet bytes of a targets table.

    Args:
        ids: sample ids.
        targets: of each.
        class_names: of all classes, kept in the schema's metadata.
        order: the recipe's digest of the order of samples, where `ids` are all of them in that order: readers then
            find a target by its place, which for ten million samples takes no look-up by id.
    """
    metadata = {b"class_names": json.dumps(list(class_names)).encode()} if class_names else {}
    if order is not None:
        metadata[b"order"] = order.encode()
    table = pa.Table.from_arrays(
        [pa.array(ids, pa.string()), pa.array(targets, pa.int64())],
        schema=TARGETS_SCHEMA.with_metadata(metadata or None),
    )
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """A targets table.

    Attributes:
        values: (line,) int64.
        class_names: by class, where known.
        order: digest of the order of samples that the lines follow; None for any order.
    """

    values: np.ndarray[Any, np.dtype[np.int64]]
    class_names: tuple[str, ...] | None
    order: str | None


def read_targets(path: Path) -> Targets:
    """A targets table without its ids.

    Raises:
        CorruptStoreError: the file is not such a table.
    """
    table = read_table(path, TARGETS_SCHEMA, ["target"])
    metadata = table.schema.metadata or {}
    names, order = metadata.get(b"class_names"), metadata.get(b"order")
    return Targets(
        values=table["target"].to_numpy(),
        class_names=_class_names(path, names) if names else None,
        order=None if order is None else order.decode(errors="replace"),
    )


def _class_names(path: Path, data: bytes) -> tuple[str, ...]:
    try:
        names = parse_json(data)
    except ValueError as error:
        raise CorruptStoreError(f"{path}: its class names are not JSON ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptStoreError(f"{path}: its class names are not a list of names")
    return tuple(names)


def same_targets(path: Path, data: bytes) -> bool:
    """Whether a stored table says what `data` says; its bytes may differ, as those of two pyarrow versions do.

    Raises:
        CorruptStoreError: the stored file is not such a table.
    """
    return bool(read_table(path, TARGETS_SCHEMA).equals(pq.read_table(BytesIO(data)), check_metadata=True))


def read_table(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """A table of the given columns, or some of them; the checksums of their pages are verified.

    Raises:
        CorruptStoreError: the file is missing, damaged or has other columns.
    """
    try:
        os.close(open_regular(path))  # pyarrow would wait for the writer of a pipe
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            found = file.schema_arrow
            if not found.equals(schema, check_metadata=False):
                raise CorruptStoreError(f"{path} has columns {found.names}; expected {schema.names} of their types")
            if file.metadata.num_rows > MOST_LINES_A_BYTE * path.stat().st_size:
                raise CorruptStoreError(f"{path} claims {file.metadata.num_rows} lines, more than its bytes can hold")
            table = file.read(columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptStoreError(f"{path} cannot be read: {(str(error).splitlines() or [''])[0]}") from error
    for name in {*table.column_names} - NULLABLE:
        if table[name].null_count:
            raise CorruptStoreError(f"{path}: a line has no {name}")
    return table
