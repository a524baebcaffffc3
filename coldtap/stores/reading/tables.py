"""Parquet tables of a store that is looked at as it is: their digests are told of elsewhere."""

from collections.abc import Sequence

import pyarrow as pa

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.tables import parse_table
from coldtap.stores.reading.manifest_files import MAX_TABLE_BYTES
from coldtap.stores.storage.contract import Storage


def open_table(storage: Storage, name: str) -> pa.BufferReader:
    """Return a table for the parsers of `format`.

    Raises:
        CorruptStoreError: it is missing, or cannot be read.
    """
    try:
        return pa.BufferReader(storage.get(name, limit=MAX_TABLE_BYTES))
    except OSError as error:
        raise CorruptStoreError(f"{storage.describe(name)} cannot be read: {error}") from error


def read_table(storage: Storage, name: str, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a table of the given columns, or some of them; raises as `parse_table` does, or `open_table`."""
    return parse_table(open_table(storage, name), schema, columns, where=storage.describe(name))
