"""Changing small files of a complete store, without touching a feature; the caller holds its lock."""

from coldtap.stores.format.canonical import sha256
from coldtap.stores.format.targets import same_targets, targets_name
from coldtap.stores.reading.manifest_files import file_entry, read_manifest
from coldtap.stores.reading.tables import open_table
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.writing.records import write_manifest


def has_other_targets(storage: Storage, name: str, data: bytes) -> bool:
    """Return whether a store's targets are not those of a table, or not those that its manifest says."""
    file = targets_name(name)
    if not _is_intact(storage, file):
        return True
    return not same_targets(open_table(storage, file), data, where=storage.describe(file))


def update_targets(place: Place, name: str, data: bytes) -> None:
    """Add or replace targets."""
    update_file(place, targets_name(name), data)


def holds_file(storage: Storage, file: str, data: bytes) -> bool:
    """Return whether a store has a file of these bytes, in its place and in its manifest."""
    known = read_manifest(storage).find(file)
    return known is not None and known.sha256 == sha256(data) and _is_intact(storage, file)


def _is_intact(storage: Storage, file: str) -> bool:
    known = read_manifest(storage).find(file)
    return known is not None and storage.stat(file) is not None and file_entry(storage, file) == known


def update_file(place: Place, file: str, data: bytes) -> None:
    """Add or replace a small file; the parts of the manifest stay.

    It is written before the manifest that names it; a death between the two is mended by the same call.
    """
    storage = storage_at(place)
    entries = read_manifest(storage).root_entries()
    storage.put(file, [data])
    write_manifest(storage, {**entries, file: file_entry(storage, file)}.values())
