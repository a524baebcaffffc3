"""A storage in this process's memory: a place for a whole job or a training that needs no disk, as in tests."""

import itertools
import os
import threading
import time
from collections.abc import Buffer, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from coldtap.errors import CorruptStoreError, StoreError, StoreLockedError
from coldtap.stores.storage.contract import (
    ABSENT,
    Capabilities,
    Reader,
    Stat,
    Storage,
    Upload,
    require_folder,
    require_key,
)
from coldtap.stores.storage.threads import renew_after_fork

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    stat: Stat


class _Space:
    """The objects of a name, and who writes to which folder."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.objects: dict[str, _Object] = {}
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew with a free lock and without writers; a forked process has a copy of the objects."""
        self.turn = threading.Lock()
        self.held: set[str] = set()

    def place(self, key: str, data: bytes, condition: str | None) -> str | None:
        """Put an object if its condition holds; returns its etag."""
        with self.turn:
            found = self.objects.get(key)
            if condition is not None and condition != (found.stat.etag if found else ABSENT):
                return None
            etag = f"{next(_numbers):x}"
            self.objects[key] = _Object(data, Stat(n_bytes=len(data), etag=etag, mtime=time.time()))
            return etag


_spaces: WeakValueDictionary[str, _Space] = WeakValueDictionary()


class MemoryStorage(Storage):
    """Objects in memory. Those of one name share them within a process, as long as one of them is in use."""

    capabilities = Capabilities(map=False, condition=True, rename=False, link=True)

    def __init__(self, name: str | None = None) -> None:
        """Make a storage, of a name of its own unless one is given."""
        name = name or f"{os.getpid()}-{next(_numbers)}"
        self._space = _spaces.setdefault(name, _Space(name))
        self._folder = ""

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self._space.name, self._folder)

    def describe(self, key: str = "") -> str:
        """Return an address that no other storage has."""
        return f"memory://{self._space.name}/{self._at(key)}".rstrip("/")

    def below(self, folder: str) -> "MemoryStorage":
        """Return the storage of a folder; it shares the objects."""
        below = MemoryStorage(self._space.name)
        below._folder = f"{self._at(require_key(folder))}/"
        return below

    def open(self, key: str) -> Reader:
        """Open an object for reading."""
        found = self._space.objects.get(self._at(require_key(key)))
        if found is None:
            raise FileNotFoundError(2, "No such object", self.describe(key))
        return _MemoryReader(self.describe(key), found)

    def begin(self, key: str, condition: str | None = None) -> Upload:
        """Begin a put."""
        return _MemoryUpload(self._space, self._at(require_key(key)), condition)

    def stat(self, key: str) -> Stat | None:
        """Return what is known of an object."""
        found = self._space.objects.get(self._at(require_key(key)))
        return found.stat if found else None

    def list(self, folder: str = "") -> Iterator[str]:
        """Yield the keys below a folder, sorted."""
        prefix = self._at(f"{require_folder(folder)}/" if folder else "")
        with self._space.turn:
            found = sorted(key for key in self._space.objects if key.startswith(prefix))
        return (key.removeprefix(self._folder) for key in found)

    def delete(self, key: str) -> None:
        """Delete an object."""
        with self._space.turn:
            self._space.objects.pop(self._at(require_key(key)), None)

    def link(self, source: str, target: str) -> str | None:
        """Give an object a second key where there is none; returns the etag."""
        with self.open(source) as reader:
            return self._space.place(self._at(require_key(target)), reader.read(0, reader.n_bytes), ABSENT)

    @contextmanager
    def lock(self, *, named: bool = True) -> Iterator[None]:
        """Hold the root as its only writer, thread by thread."""
        with self._space.turn:
            if self._folder in self._space.held:
                raise StoreLockedError(
                    f"{self} is being written by process {os.getpid()}: wait for it, or stop it and run again"
                )
            self._space.held.add(self._folder)
        try:
            yield
        finally:
            self._space.held.discard(self._folder)

    def free_bytes(self) -> int | None:
        """Return None: the memory is everybody's."""
        return None

    def _at(self, key: str) -> str:
        return f"{self._folder}{key}"


def _reopened(name: str, folder: str) -> MemoryStorage:
    if name not in _spaces:
        raise StoreError(f"memory://{name} lies in the memory of another process: use a folder that both can see")
    storage = MemoryStorage(name)
    storage._folder = folder
    return storage


class _MemoryReader(Reader):
    def __init__(self, where: str, found: _Object) -> None:
        self.where, self.n_bytes, self.etag, self._data = where, found.stat.n_bytes, found.stat.etag, found.data

    def read(self, start: int, end: int) -> bytes:
        if not 0 <= start <= end <= self.n_bytes:
            raise CorruptStoreError(f"{self.where} has {self.n_bytes} bytes; wanted are those from {start} to {end}")
        return self._data[start:end]

    def close(self) -> None:
        pass


class _MemoryUpload(Upload):
    def __init__(self, space: _Space, key: str, condition: str | None) -> None:
        self._space, self._key, self._condition = space, key, condition
        self._data = bytearray()

    def write(self, data: Buffer) -> None:
        self._data += memoryview(data).cast("B")

    def commit(self) -> str | None:
        return self._space.place(self._key, bytes(self._data), self._condition)

    def abort(self) -> None:
        self._data.clear()
