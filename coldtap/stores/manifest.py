"""The manifest: `sha256 bytes name` for every file, sorted by name, written last.

A name with `#tap` after it is one tap's chunks inside a `layers` shard, so that a part of a store can be
checked alone. The store's digest is the SHA-256 of the manifest's bytes.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from coldtap.stores.durable import write_file
from coldtap.stores.errors import CorruptStoreError, IncompleteStoreError
from coldtap.stores.faults import fault_point

MANIFEST = "manifest"
FEATURES = "features.zarr"
_LINE = re.compile(r"([0-9a-f]{64}) (\d+) (\S.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the manifest; `name` is relative to the store, with `/` between parts."""

    sha256: str
    n_bytes: int
    name: str


def write_manifest(store: Path, entries: Iterable[Entry]) -> str:
    """Write the manifest and return the store's digest."""
    lines = sorted((entry.name, f"{entry.sha256} {entry.n_bytes} {entry.name}\n") for entry in entries)
    data = "".join(line for _, line in lines).encode()

    def pieces() -> Iterable[bytes]:
        yield data
        fault_point("manifest-temporary")

    write_file(store / MANIFEST, pieces())
    return hashlib.sha256(data).hexdigest()


def read_manifest(store: Path) -> tuple[dict[str, Entry], str]:
    """The manifest's entries by name, and the store's digest.

    Raises:
        IncompleteStoreError: there is no manifest: the job that writes the store has not finished.
        CorruptStoreError: a line is not of its form, or a name leaves the store.
    """
    path = store / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IncompleteStoreError(
            f"{store} is incomplete (it has no manifest): run the same `cache-features` command again to finish it"
        ) from None
    entries: dict[str, Entry] = {}
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or ".." in match[3].split("/") or match[3].startswith("/") or match[3] in entries:
            raise CorruptStoreError(f"{path}, line {number}: not `sha256 bytes name` of a file in the store")
        entries[match[3]] = Entry(sha256=match[1], n_bytes=int(match[2]), name=match[3])
    return entries, hashlib.sha256(data).hexdigest()


def file_entry(store: Path, name: str) -> Entry:
    """The manifest's entry of a small file that is there."""
    data = (store / name).read_bytes()
    return Entry(sha256=hashlib.sha256(data).hexdigest(), n_bytes=len(data), name=name)


def files_of(store: Path) -> set[str]:
    """Names of all files under a store, relative to it."""
    return {
        os.path.relpath(os.path.join(folder, file), store).replace(os.sep, "/")
        for folder, _, files in os.walk(store)
        for file in files
    }
