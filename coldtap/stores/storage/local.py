"""A folder on this machine as a storage, all of it opened relative to the folder's own descriptor."""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import weakref
from collections.abc import Buffer, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from coldtap.errors import CorruptStoreError, MachineError, StoreLockedError
from coldtap.stores.storage.atomic import AtomicFile, etag_of, machine_errors
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
from coldtap.stores.storage.files import not_regular, open_regular
from coldtap.stores.storage.lock import StoreLock

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK)


class LocalStorage(Storage):
    """A folder, which need not be there before the first put.

    The folder is opened once and stays the one that is meant, even if it is renamed; another process opens it by its
    path. An object is a regular file. Links are followed, in folders and files, but for two: what is replaced is the
    link itself, and `list` enters no linked folder.
    """

    capabilities = Capabilities(map=True, condition=True, rename=True, link=True)

    def __init__(self, root: str | Path) -> None:
        """Open nothing yet."""
        self.root = Path(root)

    def __reduce__(self) -> tuple[object, ...]:
        return LocalStorage, (self.root,)

    def describe(self, key: str = "") -> str:
        """Return the path."""
        return str(self.root / key)

    def below(self, folder: str) -> "LocalStorage":
        """Return the storage of a folder."""
        return LocalStorage(self.root / require_key(folder))

    def open(self, key: str) -> Reader:
        """Open a file for reading."""
        where = self.describe(require_key(key))
        with _named(where):
            return LocalReader(open_regular(key, folder=self._root(), where=where), where)

    def begin(self, key: str, condition: str | None = None) -> Upload:
        """Begin a put."""
        return _LocalUpload(Path(self.describe(require_key(key))), lambda: self._open_folder(key), condition)

    def stat(self, key: str) -> Stat | None:
        """Return what is known of a file; None where there is none, or a link to nothing."""
        where = self.describe(require_key(key))
        try:
            with _named(where):
                about = os.stat(key, dir_fd=self._root())
        except OSError as error:
            if error.errno in _NOTHING_THERE:
                return None
            raise
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
            with suppress(OSError):
                os.stat(place + TEMPORARY_SUFFIX, dir_fd=self._root(), follow_symlinks=False)
                yield place + TEMPORARY_SUFFIX
        yield from (key for key in self._walk(place) if key.endswith(TEMPORARY_SUFFIX))

    def sweep(self, place: str = "") -> None:
        """Remove the leftovers below a folder, or of one key."""
        for name in self.leftovers(place):
            self._remove(name)

    def delete(self, key: str) -> None:
        """Delete a file; its folder stays, for others may be writing into it."""
        self._remove(require_key(key))

    def link(self, source: str, target: str) -> str | None:
        """Give a file a second name where there is none, or copy it where the file system has no such links."""
        where = Path(self.describe(require_key(target)))
        with self.open(source) as reader, machine_errors(where), self._folder_of(target) as folder:
            try:
                os.link(source, where.name, src_dir_fd=self._root(), dst_dir_fd=folder)
            except FileExistsError:
                return None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return super().link(source, target)
            os.fsync(folder)
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
        folder = _Descriptor(os.open(".", _FOLDER, dir_fd=root))
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
                descriptor = os.open(self.root, _FOLDER)
            except NotADirectoryError as error:
                what = "is a file" if self.root.exists() else "lies below a file, not a folder"
                raise NotADirectoryError(error.errno, what, str(self.root)) from None
            opened = self.__dict__.setdefault("_opened", _Descriptor(descriptor))
        return int(opened.number)

    def _made_root(self) -> int:
        try:
            return self._root()
        except FileNotFoundError:
            pass
        except NotADirectoryError as error:
            raise _no_folder(self.describe()) from error
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise _no_folder(self.describe()) from error
        return self._root()

    @contextmanager
    def _folder_of(self, key: str) -> Iterator[int]:
        """Open the folder of a key, made where it is not there; the descriptor is closed in the end."""
        folder = self._open_folder(key)
        try:
            yield folder
        finally:
            os.close(folder)

    def _open_folder(self, key: str) -> int:
        """Return a descriptor of the folder of a key, made where it is not there; the caller closes it.

        Raises:
            MachineError: a file is where the folder would have to be.
        """
        folder = os.dup(self._made_root())
        for part in key.split("/")[:-1]:
            above = folder
            try:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=above)
                folder = os.open(part, _FOLDER, dir_fd=above)
            except NotADirectoryError as error:
                raise _no_folder(self.describe(key)) from error
            finally:
                os.close(above)
        return folder

    def _remove(self, name: str) -> None:
        with machine_errors(Path(self.describe(name))), suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(name, dir_fd=self._root())

    def _walk(self, folder: str) -> Iterator[str]:
        """Yield the names of all files below a folder, in the order of their text.

        Raises:
            MachineError: a folder may not be looked into.
        """
        try:
            descriptor = os.open(folder or ".", _FOLDER, dir_fd=self._root())
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            where = self.describe(folder)
            reason = f"({error.strerror}): change its mode or ask its owner"
            raise MachineError(f"{where} cannot be listed {reason}") from error
        prefix = f"{folder}/" if folder else ""
        with closing(_Descriptor(descriptor)), os.scandir(descriptor) as entries:
            # A folder stands where the names in it do.
            found = sorted(
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in entries
                if not _is_linked_folder(entry)
            )
        for name in found:
            if name.endswith("/"):
                yield from self._walk(f"{prefix}{name[:-1]}")
            else:
                yield f"{prefix}{name}"


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


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link to itself
        return False


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Have errors name the whole path, not that from the root on."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, where) from None


def _no_folder(where: str) -> MachineError:
    return MachineError(f"cannot write {where}: a file is where a folder would have to be: choose another path")
