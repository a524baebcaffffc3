"""The manifest of a store, and the files beside the features, held against it."""

import hashlib

import pyarrow as pa

from coldtap.errors import CorruptStoreError, IncompleteStoreError, MachineError
from coldtap.stores.format.canonical import sha256
from coldtap.stores.format.manifest import FEATURES, MANIFEST, Entry, Manifest, ManifestLines
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.files import MAX_SMALL_BYTES

MAX_TABLE_BYTES = 1 << 32  # samples.parquet takes some 60 bytes per row


class ManifestFiles:
    """The small files of a complete store, none of which is believed unless it is what the manifest says.

    Attributes:
        storage: where the store lies.
        manifest: its lines.
    """

    def __init__(self, storage: Storage) -> None:
        """Read the manifest; raises as `read_manifest` does."""
        self.storage, self.manifest = storage, read_manifest(storage)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            CorruptStoreError: it is missing, or not what the manifest says.
        """
        data = self.find(name)
        if data is None:
            raise self._unlisted(name)
        return data

    def find(self, name: str) -> bytes | None:
        """Return the bytes of a file; None where there is no such file, and none is listed.

        Raises:
            CorruptStoreError: it is missing, or not what the manifest says.
        """
        entry = self.manifest.find(name)
        if entry is None:
            self._require_absent(name)
            return None
        return self._intact(entry, limit=MAX_SMALL_BYTES)

    def _intact(self, entry: Entry, *, limit: int) -> bytes:
        try:
            data = self.storage.get(entry.name, limit=limit)
        except OSError:
            raise self._missing(entry.name) from None
        if len(data) != entry.n_bytes or sha256(data) != entry.sha256:
            raise self._changed(entry.name)
        return data

    def find_feature(self, name: str) -> bytes | None:
        """Return the bytes of a file below `features.zarr`, as `find` does."""
        return self.find(f"{FEATURES}/{name}")

    def has(self, name: str) -> bool:
        """Return whether the manifest lists a file.

        Raises:
            CorruptStoreError: it does not, and yet the file is there.
        """
        if self.manifest.find(name) is not None:
            return True
        self._require_absent(name)
        return False

    def table(self, name: str) -> pa.BufferReader:
        """Return a table for the parsers of `format`: the very bytes that were held against the manifest.

        Raises:
            CorruptStoreError: it is missing, or not what the manifest says.
        """
        entry = self.manifest.find(name)
        if entry is None:
            self._require_absent(name)
            raise self._missing(name)
        data = self._intact(entry, limit=MAX_TABLE_BYTES)
        return pa.BufferReader(data)

    def names_below(self, folder: str) -> list[str]:
        """Return the names of the files that the manifest lists below a folder, sorted."""
        return [name for name in self.manifest.entries() if name.startswith(f"{folder}/")]

    def _require_absent(self, name: str) -> None:
        """A file that is there and not in the manifest is no file of another: its line is damaged."""
        if self.storage.stat(name) is not None:
            raise self._unlisted(name)

    def _unlisted(self, name: str) -> CorruptStoreError:
        where = self.storage.describe(name)
        return CorruptStoreError(f"{where}: the manifest does not list it: run `coldtap verify`")

    def _missing(self, name: str) -> CorruptStoreError:
        where = self.storage.describe(name)
        return CorruptStoreError(f"{where} is missing: fetch it again, or run `coldtap verify`")

    def _changed(self, name: str) -> CorruptStoreError:
        return CorruptStoreError(f"{self.storage.describe(name)} is not what the manifest says: run `coldtap verify`")


def read_manifest(place: Place) -> Manifest:
    """Return a store's manifest.

    Raises:
        IncompleteStoreError: there is no manifest: the job that writes the store has not finished.
        CorruptStoreError: it, or one of its parts, is damaged or cannot be read.
        MachineError: this user may not read it.
    """
    storage = storage_at(place)
    where = storage.describe(MANIFEST)
    try:
        root = ManifestLines(_text_bytes(storage, MANIFEST), where=where)
    except FileNotFoundError:
        raise IncompleteStoreError(
            f"{storage} is incomplete (it has no manifest): run the same `cache-features` command again to finish it"
        ) from None
    except PermissionError as error:
        raise MachineError(f"{where} may not be read ({error.strerror}): change its mode or ask its owner") from error
    except OSError as error:
        raise CorruptStoreError(f"{where} cannot be read ({error.strerror})") from error

    return Manifest(root, [_read_part(storage, part) for part in root.parts()])


def _read_part(storage: Storage, entry: Entry) -> ManifestLines:
    where = storage.describe(entry.name)
    try:
        data = _text_bytes(storage, entry.name)
    except OSError as error:
        raise CorruptStoreError(
            f"{where}, a part of the manifest, cannot be read ({error.strerror}): fetch it again"
        ) from error
    part = ManifestLines(data, where=where)
    if part.sha256 != entry.sha256 or len(data) != entry.n_bytes:
        raise CorruptStoreError(f"{where}, a part of the manifest, is not what the manifest says: fetch it again")
    return part


def _text_bytes(storage: Storage, name: str) -> bytearray:
    """Return the bytes of a text of any length; one that a hole makes long is not read to its end."""
    data = bytearray()
    with storage.open(name) as reader:
        for piece in reader.pieces():
            if b"\0" in piece:
                raise CorruptStoreError(f"{reader.where} is damaged: it holds zero bytes")
            data += piece
    return data


def is_complete(storage: Storage) -> bool:
    """Return whether a store has its manifest."""
    return storage.stat(MANIFEST) is not None


def file_entry(place: Place, name: str) -> Entry:
    """Return the manifest's entry of a file that is there, read piece by piece.

    Raises:
        OSError: it is not there, or cannot be read.
        CorruptStoreError: it is no regular file.
    """
    digest = hashlib.sha256()
    with storage_at(place).open(name) as reader:
        for data in reader.pieces():
            digest.update(data)
        return Entry(sha256=digest.hexdigest(), n_bytes=reader.n_bytes, name=name)


def files_of(place: Place) -> set[str]:
    """Return the names of all files of a store, unfinished ones included."""
    storage = storage_at(place)
    return {*storage.list(), *storage.leftovers()}
