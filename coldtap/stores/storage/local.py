"""A folder on this machine as a storage, all of it opened relative to the folder's own descriptor."""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import weakref
from collections.abc import Buffer, Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from coldtap.errors import CorruptStoreError, MachineError, StoreLockedError
from coldtap.stores.storage.atomic import AtomicFile, etag_of, machine_errors, sync_folder
from coldtap.stores.storage.contract import (
    LOCK_NAME,
    TEMPORARY_SUFFIX,
    Capabilities,
    Reader,
    Stat,
    Storage,
    Upload,
    require_folder,
    require_key,
)
from coldtap.stores.storage.files import FOLDER, descend, is_link, link_at, not_regular, open_regular
from coldtap.stores.storage.lock import StoreLock

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK)


class LocalStorage(Storage):
    """A folder, which need not be there before the first put.

    The folder is opened once and stays the one that is meant, even if it is renamed; another process opens it by its
    path, which may be or hold a link. An object is a regular file. Below the folder no link is followed, neither to a
    folder nor to a file, so that nothing outside is read, written or removed; what is replaced or deleted is the link
    itself. With `follow_links` a link to a regular file is read, as hub caches, DVC and git-annex lay files out.
    """

    capabilities = Capabilities(map=True, condition=True, rename=True, link=True)

    def __init__(self, root: str | Path, *, follow_links: bool = False) -> None:
        """Open nothing yet."""
        self.root, self._follow_links = Path(root), follow_links
        self._given, self._below = self.root, ""

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self._given, self._below, self._follow_links)

    def describe(self, key: str = "") -> str:
        """Return the path."""
        return str(self.root / key)

    def below(self, folder: str) -> "LocalStorage":
        """Return the storage of a folder."""
        storage = LocalStorage(self.root / require_key(folder), follow_links=self._follow_links)
        storage._given, storage._below = self._given, f"{self._below}/{folder}".lstrip("/")
        return storage

    def open(self, key: str) -> Reader:
        """Open a file for reading."""
        where = self.describe(require_key(key))
        with _named(where), self._folder_of(key) as folder:
            name = key.rpartition("/")[2]
            return LocalReader(open_regular(name, folder, where=where, follow_links=self._follow_links), where)

    def begin(self, key: str, condition: str | None = None) -> Upload:
        """Begin a put."""
        return _LocalUpload(Path(self.describe(require_key(key))), lambda: self._made_folder_of(key), condition)

    def stat(self, key: str) -> Stat | None:
        """Return what is known of a file; None where there is none, or a link to nothing that is followed."""
        where = self.describe(require_key(key))
        name = key.rpartition("/")[2]
        try:
            with _named(where), self._folder_of(key) as folder:
                about = os.stat(name, dir_fd=folder, follow_symlinks=self._follow_links)
                link = link_at(name, folder) if stat.S_ISLNK(about.st_mode) else None
        except OSError as error:
            if error.errno in _NOTHING_THERE:
                return None
            raise
        if link is not None:
            raise is_link(where, link)
        if not stat.S_ISREG(about.st_mode):
            raise not_regular(where)
        return Stat(n_bytes=about.st_size, etag=etag_of(about), mtime=about.st_mtime)

    def list(self, folder: str = "") -> Iterator[str]:
        """Yield the keys below a folder, in the order of their text."""
        for key in self._walk(require_folder(folder)):
            if not key.endswith(TEMPORARY_SUFFIX) and key != LOCK_NAME:
                yield key

    def leftovers(self, place: str = "") -> Iterator[str]:
        """Yield the names of unfinished puts, below a folder or of one key."""
        if require_folder(place):
            temporary = place + TEMPORARY_SUFFIX
            with suppress(OSError), self._folder_of(temporary) as folder:
                os.stat(temporary.rpartition("/")[2], dir_fd=folder, follow_symlinks=False)
                yield temporary
        yield from (key for key in self._walk(place) if key.endswith(TEMPORARY_SUFFIX))

    def sweep(self, place: str = "") -> None:
        """Remove the leftovers below a folder, or of one key."""
        for name in [*self.leftovers(place)]:
            self._remove(name)

    def delete(self, key: str) -> None:
        """Delete a file; its folder stays, for others may be writing into it."""
        self._remove(require_key(key))

    def link(self, source: str, target: str) -> str | None:
        """Give a file a second name where there is none, or copy it where the file system has no such links."""
        where = Path(self.describe(require_key(target)))
        name = source.rpartition("/")[2]
        with self.open(source) as reader, self._folder_of(source) as old:
            if link_at(name, old) is not None:
                return super().link(source, target)
            with machine_errors(where), closing(_Descriptor(self._made_folder_of(target))) as new:
                try:
                    os.link(name, where.name, src_dir_fd=old, dst_dir_fd=new.number)
                except FileExistsError:
                    return None
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    return super().link(source, target)
                sync_folder(new.number)
                return reader.etag

    @contextmanager
    def lock(self, *, named: bool = True) -> Iterator[None]:
        """Hold the folder as its only writer, by flock(2): `.lock` in it, which names the holder, or itself."""
        with machine_errors(self.root):
            root = self._made_root()
        with StoreLock(self.root, folder=root) if named else self._held(root):
            yield

    @contextmanager
    def _held(self, root: int) -> Iterator[None]:
        folder = _Descriptor(os.open(".", FOLDER, dir_fd=root))
        with closing(folder):
            try:
                fcntl.flock(folder.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreLockedError(f"{self} is being written by another process: wait for it, or stop it") from None
            yield

    def free_bytes(self) -> int | None:
        """Return the free bytes of the file system that the folder is on, or would be."""
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def occupied_bytes(self, folder: str = "") -> int:
        """Return the bytes of all files below a folder; a link counts as itself."""
        return sum(
            os.stat(name, dir_fd=self._root(), follow_symlinks=False).st_size
            for name in self._walk(require_folder(folder))
        )

    def _root(self) -> int:
        """Return the root's descriptor, opened once."""
        if (opened := self.__dict__.get("_opened")) is None:
            try:
                given = os.open(self._given, FOLDER)
            except NotADirectoryError as error:
                what = "is a file" if self._given.exists() else "lies below a file, not a folder"
                raise NotADirectoryError(error.errno, what, str(self._given)) from None
            opened = self._keep(descend(given, self._parts, where=str(self._given)))
        return int(opened.number)

    def _made_root(self) -> int:
        """Return the root's descriptor, made where it is not there.

        Raises:
            MachineError: a file is where a folder would have to be.
        """
        try:
            return self._root()
        except FileNotFoundError:
            pass
        except NotADirectoryError as error:
            raise _no_folder(self.describe()) from error
        try:
            self._given.mkdir(parents=True, exist_ok=True)
            given = os.open(self._given, FOLDER)
            return int(self._keep(descend(given, self._parts, where=str(self._given), make=True)).number)
        except (FileExistsError, NotADirectoryError) as error:
            raise _no_folder(self.describe()) from error

    @property
    def _parts(self) -> Sequence[str]:
        return self._below.split("/") if self._below else ()

    def _keep(self, root: int) -> "_Descriptor":
        # Two threads may have opened it: one descriptor is kept, the other is closed with its last holder.
        kept: _Descriptor = self.__dict__.setdefault("_opened", _Descriptor(root))
        return kept

    @contextmanager
    def _folder_of(self, key: str) -> Iterator[int]:
        """Open the folder of a key that is there; the descriptor is closed in the end."""
        parts = key.split("/")[:-1]
        if not parts:
            yield self._root()
            return
        folder = descend(os.dup(self._root()), parts, where=self.describe())
        try:
            yield folder
        finally:
            os.close(folder)

    def _made_folder_of(self, key: str) -> int:
        """Return a descriptor of the folder of a key, made where it is not there; the caller closes it.

        Raises:
            MachineError: a file is where the folder would have to be.
        """
        try:
            return descend(os.dup(self._made_root()), key.split("/")[:-1], where=self.describe(), make=True)
        except NotADirectoryError as error:
            raise _no_folder(self.describe(key)) from error

    def _remove(self, name: str) -> None:
        absent = suppress(FileNotFoundError, NotADirectoryError)
        with machine_errors(Path(self.describe(name))), absent, self._folder_of(name) as folder:
            os.unlink(name.rpartition("/")[2], dir_fd=folder)

    def _walk(self, folder: str) -> Iterator[str]:
        """Yield the names of all that is no folder below a folder, in the order of their text; links among them.

        Raises:
            MachineError: a folder may not be looked into.
        """
        prefix = f"{folder}/" if folder else ""
        try:
            descriptor = descend(os.dup(self._root()), folder.split("/") if folder else (), where=self.describe())
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            where = self.describe(folder)
            reason = f"({error.strerror}): change its mode or ask its owner"
            raise MachineError(f"{where} cannot be listed {reason}") from error
        with closing(_Descriptor(descriptor)), os.scandir(descriptor) as entries:
            # A folder stands where the names in it do.
            found = sorted(f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries)
        for name in found:
            if name.endswith("/"):
                yield from self._walk(f"{prefix}{name[:-1]}")
            else:
                yield f"{prefix}{name}"


def _reopened(given: Path, below: str, follow_links: bool) -> LocalStorage:
    storage = LocalStorage(given, follow_links=follow_links)
    return storage.below(below) if below else storage


class LocalReader(Reader):
    """An open regular file."""

    def __init__(self, descriptor: int, where: str) -> None:
        about = os.fstat(descriptor)
        self.where, self.n_bytes, self.etag = where, about.st_size, etag_of(about)
        self._file = _Descriptor(descriptor)

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes of a range."""
        self._require(0 <= start <= end, start, end)
        data = os.pread(self._file.number, end - start, start)
        while len(data) < end - start:  # one call gives 2 GB at most
            more = os.pread(self._file.number, end - start - len(data), start + len(data))
            self._require(more != b"", start, end)
            data += more
        return data

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill a buffer of bytes with those from `start` on."""
        end = start + len(out)
        while out:
            n_bytes = os.preadv(self._file.number, [out], end - len(out))
            self._require(n_bytes > 0, start, end)
            out = out[n_bytes:]

    def size_now(self) -> int:
        """Return the bytes that the file has now."""
        return os.fstat(self._file.number).st_size

    def map(self) -> mmap.mmap:
        """Return the file mapped for reading, with a descriptor of its own."""
        try:
            return mmap.mmap(self._file.number, self.n_bytes, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise CorruptStoreError(f"{self.where}: it was cut while it was opened") from error
        except OSError as error:
            raise MachineError(f"{self.where}: the file cannot be mapped ({error.strerror})") from error

    def will_need(self, start: int, end: int) -> None:
        """Have the kernel read ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.number, start, end - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _require(self, there: bool, start: int, end: int) -> None:
        if not there:
            n_bytes = self.size_now()
            raise CorruptStoreError(f"{self.where} has {n_bytes} bytes; wanted are those from {start} to {end}")


class _LocalUpload(Upload):
    """A put; whatever the system refuses becomes a MachineError that names the object."""

    def __init__(self, where: Path, folder: Callable[[], int], condition: str | None) -> None:
        self._where, self._condition = where, condition
        with machine_errors(where):
            self._file = AtomicFile(folder(), where.name)

    def write(self, data: Buffer) -> None:
        with machine_errors(self._where):
            self._file.write(data)

    def commit(self) -> str | None:
        with machine_errors(self._where):
            return self._file.commit(self._condition)

    def abort(self) -> None:
        self._file.abort()


class _Descriptor:
    """A descriptor that is closed with its last holder, if not before."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.close = weakref.finalize(self, os.close, number)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Have errors name the whole path, not that from the root on."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, where) from None


def _no_folder(where: str) -> MachineError:
    return MachineError(f"cannot write {where}: a file is where a folder would have to be: choose another path")
