"""Writing what says that something is there: a block's journal line, the tables, and the manifest last of all."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from coldtap.stores.format.canonical import sha256
from coldtap.stores.format.journal import JournalLine, journal_name, line_bytes
from coldtap.stores.format.manifest import MANIFEST, Entry, manifest_bytes, part_name
from coldtap.stores.format.tables import table_pieces
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.faults import fault_point


def write_line(place: Place, line: JournalLine) -> None:
    """Write a block's line, durably; from now on the block is there."""
    storage_at(place).put(journal_name(line.block), [line_bytes(line)])


def write_rows(storage: Storage, name: str, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table from rows of values in the schema's order; a group of rows is in memory at a time."""
    storage.put(name, table_pieces(schema, rows))


def write_part(storage: Storage, entries: Iterable[Entry]) -> Entry:
    """Write a part of the manifest and return its own entry."""
    data = manifest_bytes(entries)
    part = Entry(sha256=sha256(data), n_bytes=len(data), name=part_name(sha256(data)))
    storage.put(part.name, [data])
    return part


def write_manifest(place: Place, entries: Iterable[Entry]) -> str:
    """Write the manifest's root and return the store's digest."""
    data = manifest_bytes(entries)

    def pieces() -> Iterable[bytes]:
        yield data
        fault_point("manifest-temporary")

    storage_at(place).put(MANIFEST, pieces())
    return sha256(data)
