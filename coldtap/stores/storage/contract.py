"""Where bytes lie: what a storage owes to the rooms that keep stores, runs and artefacts on it.

A storage holds objects, each some bytes under a key, below one root. To add one, subclass `Storage`, write what is
abstract in it (`describe`, `below`, `open`, `begin`, `list`, `stat`, `delete`, `lock`, `free_bytes`), say in
`capabilities` what it can, and pass `StorageTests` (`coldtap.stores.storage.testing`). `memory.py` is the shortest.

What an implementer owes:

- A key is a relative name, `a/b/c`; `require_key` refuses any other before anything is touched. There are no folders:
  `a` and `a/b` are never both objects, and nothing that is empty is seen.
- An object is there whole or not at all. It is durable when `put` returns: a job that dies, or a machine that loses
  power, right after finds it. Whoever reads while it is replaced reads the old bytes or the new ones.
- Two puts of one key take turns; the last one stays, unless it has a condition that no longer holds.
- An etag names one state of one object: equal etags, equal bytes. Nothing else can be read from it.
- Ranges are absolute, (start, end) with the end left out. All methods may be called from many threads at once.
- A storage can be pickled, and used on after a fork.

What is raised: `FileNotFoundError` where an object is not there, another `OSError` where it cannot be read, with the
text of `describe` as its file name; `CorruptStoreError` for a bad key, for what is no object (a folder, a pipe), is
larger than the limit or ends before the range; `MachineError` where it cannot be written; `StoreLockedError` for a
lock that is held.
"""

import io
import mmap
from abc import ABC, abstractmethod
from collections.abc import Buffer, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Final, Self

from coldtap.errors import CorruptStoreError
from coldtap.stores.storage.files import MAX_SMALL_BYTES, READ_AT_ONCE

TEMPORARY_SUFFIX: Final = ".partial"
LOCK_NAME: Final = ".lock"
ABSENT: Final = ""  # the condition that there is no such object; no etag is empty

type Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a storage can.

    Attributes:
        map: an open object can be mapped into memory.
        condition: puts may have conditions; without them there must be one writer.
        rename: a put has a temporary name until it is whole, and may leave it behind (`leftovers`).
        link: a second name for the same bytes costs none.
    """

    map: bool
    condition: bool
    rename: bool
    link: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """What is known of an object without reading it; `mtime` in seconds since 1970."""

    n_bytes: int
    etag: str
    mtime: float


class Reader(ABC):
    """An object held open for random access: what was opened is what is read, even where it is replaced meanwhile.

    Attributes:
        where: it lies, for messages.
        n_bytes: that it had when it was opened.
        etag: likewise.
    """

    where: str
    n_bytes: int
    etag: str

    @abstractmethod
    def read(self, start: int, end: int) -> bytes:
        """Return the bytes of a range.

        Raises:
            OSError: they cannot be read.
            CorruptStoreError: the object ends before.
        """

    def read_ranges(self, ranges: Sequence[Range]) -> Sequence[bytes]:
        """Return the bytes of each range, in the order given; a storage far away draws them concurrently."""
        return [self.read(start, end) for start, end in ranges]

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill a buffer of bytes with those from `start` on; raises as `read` does."""
        out[:] = self.read(start, start + len(out))

    def pieces(self, at_once: int = READ_AT_ONCE) -> Iterator[bytes]:
        """Yield all bytes, so many at a time."""
        for start in range(0, self.n_bytes, at_once):
            yield self.read(start, min(start + at_once, self.n_bytes))

    def size_now(self) -> int:
        """Return the bytes that the object has now; a file can be cut while it is open."""
        return self.n_bytes

    def map(self) -> mmap.mmap:
        """Return the object mapped for reading; the map stays when the reader is closed.

        Raises:
            CorruptStoreError: the object was cut since it was opened.
            MachineError: the system refuses.
            io.UnsupportedOperation: the storage has no maps.
        """
        raise io.UnsupportedOperation(f"{self.where} cannot be mapped")

    def will_need(self, start: int, end: int) -> None:  # noqa: B027 - a hint, which a storage may pass over
        """Say which bytes are read next."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the object; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Upload(ABC):
    """An object in the making; nothing is seen of it before `commit`. One of `commit` and `abort` ends it."""

    @abstractmethod
    def write(self, data: Buffer) -> None:
        """Append bytes."""

    @abstractmethod
    def commit(self) -> str | None:
        """Put the object in place, durably; returns its etag, or None where the condition does not hold."""

    @abstractmethod
    def abort(self) -> None:
        """Forget what was written."""


class Sink(io.RawIOBase):
    """A streamed put as the file that writers of Parquet want."""

    def __init__(self, upload: Upload) -> None:
        self._upload, self._n_bytes, self.aborted = upload, 0, False

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self._n_bytes

    def write(self, data: Buffer) -> int:
        """Append bytes; returns how many."""
        self._upload.write(data)
        n_bytes = memoryview(data).nbytes
        self._n_bytes += n_bytes
        return n_bytes

    def abort(self) -> None:
        """Leave the object as it was, whatever was written."""
        self.aborted = True


class Storage(ABC):
    """Objects below one root; the module says what each must do."""

    capabilities: ClassVar[Capabilities]

    def __str__(self) -> str:
        return self.describe()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @abstractmethod
    def describe(self, key: str = "") -> str:
        """Return what a message calls an object, or the root: a path, or a URL without its query."""

    @abstractmethod
    def below(self, folder: str) -> "Storage":
        """Return the storage whose root is a folder of this one."""

    @abstractmethod
    def open(self, key: str) -> Reader:
        """Open an object for reading."""

    @abstractmethod
    def begin(self, key: str, condition: str | None = None) -> Upload:
        """Begin a put: unconditional, or with `ABSENT`, or with the etag that the object must have at the end."""

    @abstractmethod
    def stat(self, key: str) -> Stat | None:
        """Return what is known of an object; None where there is none."""

    @abstractmethod
    def list(self, folder: str = "") -> Iterator[str]:
        """Yield the keys of all objects below a folder, at any depth, in the order of their text; "" is the root.

        What lies in place of an object, such as a link to nothing, is named too. What unfinished puts left is not,
        nor the lock's file.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""

    @abstractmethod
    def lock(self, *, named: bool = True) -> AbstractContextManager[None]:
        """Hold the root as its only writer: nobody else can while this is open, and a dead holder does not count.

        Args:
            named: the holder is written down where that leaves a file, so that others can be told who it is.

        Raises:
            StoreLockedError: somebody holds it.
            MachineError: no lock can be had there.
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Return the bytes that can be put there; None where nobody says."""

    def occupied_bytes(self, folder: str = "") -> int:
        """Return the bytes that lie below a folder, those of leftovers and of the lock's file included."""
        found = (self.stat(key) for key in self.list(folder))
        return sum(there.n_bytes for there in found if there is not None)

    def leftovers(self, place: str = "") -> Iterator[str]:
        """Yield the names of unfinished puts, below a folder or of one key; live writers have them too."""
        yield from ()

    def sweep(self, place: str = "") -> None:  # noqa: B027 - most storages leave nothing
        """Remove the leftovers below a folder, or of one key; the caller holds the lock."""

    def get(self, key: str, *, limit: int | None = MAX_SMALL_BYTES) -> bytes:
        """Return an object's bytes; one of more bytes than the limit is refused unread."""
        with self.open(key) as reader:
            if limit is not None and reader.n_bytes > limit:
                raise CorruptStoreError(f"{reader.where} is larger than any such file: more than {limit} bytes")
            return reader.read(0, reader.n_bytes)

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> Sequence[bytes]:
        """Return the bytes of many ranges of one object, in the order given."""
        with self.open(key) as reader:
            return reader.read_ranges(ranges)

    def put(self, key: str, pieces: Iterable[Buffer]) -> str:
        """Put an object, whatever was there; returns its etag. If `pieces` raise, nothing has changed."""
        etag = self._put(key, pieces, None)
        assert etag is not None
        return etag

    def put_if_absent(self, key: str, pieces: Iterable[Buffer]) -> str | None:
        """Put an object where there is none; returns its etag, or None where one was there."""
        return self._put(key, pieces, ABSENT)

    def put_if_match(self, key: str, pieces: Iterable[Buffer], etag: str) -> str | None:
        """Replace the object that has this etag; returns the new one, or None where it has another or is gone."""
        return self._put(key, pieces, etag)

    def _put(self, key: str, pieces: Iterable[Buffer], condition: str | None) -> str | None:
        upload = self.begin(key, condition)
        try:
            for piece in pieces:
                upload.write(piece)
            return upload.commit()
        except BaseException:
            upload.abort()
            raise

    @contextmanager
    def writer(self, key: str) -> Iterator[Sink]:
        """Put an object as a stream: it is there when the block ends, and not if that raises or `Sink.abort` is called.

        A second put of the key inside the block would wait for it for ever.
        """
        upload = self.begin(key)
        try:
            sink = Sink(upload)
            yield sink
            if not sink.aborted:
                upload.commit()
                return
        except BaseException:
            upload.abort()
            raise
        upload.abort()

    def copy(self, source: str, target: str) -> str:
        """Copy an object, whatever was at the target; returns the copy's etag."""
        with self.open(source) as reader:
            return self.put(target, reader.pieces())

    def link(self, source: str, target: str) -> str | None:
        """Give an object a second key where there is none, or copy it; returns the etag, None where one was there."""
        with self.open(source) as reader:
            return self.put_if_absent(target, reader.pieces())


def require_key(key: str) -> str:
    """Return a key as it is.

    Raises:
        CorruptStoreError: it is none: absolute, empty, with an empty, `.` or `..` part, with a NUL, or a name that
            storages keep for themselves.
    """
    parts = key.split("/")
    reserved = parts[-1].endswith(TEMPORARY_SUFFIX) or key == LOCK_NAME
    if reserved or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise CorruptStoreError(f"{key!r} is no name of an object: such as a/b/c, and not *{TEMPORARY_SUFFIX}")
    return key


def require_folder(folder: str) -> str:
    """Return a folder's name as it is, "" for the root; raises as `require_key` does."""
    return require_key(folder) if folder else folder
