"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder."""

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Buffer, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coldtap.errors import MachineError, OptionError
from coldtap.stores.storage.contract import ABSENT
from coldtap.stores.storage.contract import TEMPORARY_SUFFIX as TEMPORARY_SUFFIX

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file-size limit of this process is reached: raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose another path",
    errno.EACCES: "no permission to write there: choose another path or change its mode",
    errno.EPERM: "no permission to write there: choose another path or change its mode",
    errno.ENAMETOOLONG: "a name in this path is too long: choose a shorter one",
    errno.EISDIR: "a folder is there: choose another path",
    errno.EIO: "the disk, or the network drive, fails: look at the system's log, or choose another path",
    errno.ESTALE: "the network drive was mounted anew or moved: mount it again",
    errno.ENOLCK: "the network drive gives no locks: start its lock service, or choose another path",
}
# A Path has one slash where a URL has two; one letter is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def require_no_url(place: str | Path) -> None:
    """Refuse the address of another machine, which would become folders named `s3:` and so on.

    Raises:
        OptionError: it is one.
    """
    if found := _URL.match(str(place)):
        raise OptionError(
            f"{place} is an address, and coldtap cannot read or write at {found[1]!r} addresses: give a path of this "
            "machine, such as a mounted folder"
        )


def write_file(path: Path, pieces: Iterable[Buffer]) -> None:
    """Write a file so that it is there whole or not at all, whatever happens.

    Raises:
        OptionError: `path` is a URL.
        MachineError: the disk is full, read-only or refuses, or the path is none for a file; nothing under `path` has
            changed.
    """
    require_no_url(path)
    with machine_errors(path):
        _make_folder(path)
        file = AtomicFile(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY), path.name)
        try:
            for piece in pieces:
                file.write(piece)
            file.commit()
        except BaseException:
            file.abort()
            raise


class AtomicFile:
    """A file in the making, under its temporary name in the same folder.

    All is done relative to the folder's descriptor, and only into a file that is new: what a killed process left under
    the temporary name, a link or a pipe there, is removed and never written to. The temporary file is locked (flock)
    until the end, so that two writers of one name take turns, in threads or processes.
    """

    def __init__(self, folder: int, name: str) -> None:
        """Begin a file; `folder` is an open descriptor, closed with the file.

        Raises:
            OSError: the folder refuses.
        """
        self._folder, self._name, self._temporary = folder, name, name + TEMPORARY_SUFFIX
        self._file, self._has_turn = -1, True
        try:
            self._file = self._new_file()
        except BaseException:
            os.close(folder)
            raise

    def write(self, data: Buffer) -> None:
        """Append bytes."""
        left = memoryview(data).cast("B")
        while left:
            left = left[os.write(self._file, left) :]

    def commit(self, condition: str | None = None) -> str | None:
        """Put the file in place, durably.

        Args:
            condition: None, `ABSENT`, or the etag of the file that is to be replaced.

        Returns:
            The new file's etag; None where the condition does not hold.
        """
        now = time.time_ns()
        # The kernel's own stamp is milliseconds coarse: two files of equal length would look the same.
        os.utime(self._file, ns=(now, now))
        os.fsync(self._file)
        etag = etag_of(os.fstat(self._file))
        if not self._place(condition):
            self.abort()
            return None
        sync_folder(self._folder)
        self._close()
        return etag

    def abort(self) -> None:
        """Leave everything as it was; a second call, or one after `commit`, does nothing."""
        if self._file >= 0:
            with suppress(OSError):
                if self._is_still(self._temporary):
                    os.unlink(self._temporary, dir_fd=self._folder)
            self._close()

    def _place(self, condition: str | None) -> bool:
        if condition == ABSENT:
            try:
                os.link(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            except FileExistsError:
                return False
            os.unlink(self._temporary, dir_fd=self._folder)
            return True
        if condition is not None:
            if not self._has_turn:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), self._name)
            if condition != self._etag_there():
                return False
        os.rename(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        return True

    def _etag_there(self) -> str | None:
        try:
            return etag_of(os.stat(self._name, dir_fd=self._folder))
        except FileNotFoundError:
            return None

    def _new_file(self) -> int:
        """Return the descriptor of a new, empty, locked file under the temporary name."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            try:
                self._file = os.open(self._temporary, flags, 0o666, dir_fd=self._folder)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                os.unlink(self._temporary, dir_fd=self._folder)  # a link
                continue
            self._take_turn()
            if self._is_still(self._temporary):
                about = os.fstat(self._file)
                if stat.S_ISREG(about.st_mode) and about.st_nlink == 1 and about.st_size == 0:
                    return self._file
                os.unlink(self._temporary, dir_fd=self._folder)
            os.close(self._file)

    def _take_turn(self) -> None:
        """Wait for other writers of the name; without locks, as on some network drives, there are no conditions."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._has_turn = False

    def _is_still(self, name: str) -> bool:
        """Whether the open file has this name; another writer may have renamed or removed it."""
        try:
            found = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._file))

    def _close(self) -> None:
        if self._has_turn:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a forked process may have the descriptor too
        os.close(self._file)
        os.close(self._folder)
        self._file = -1


def sync_folder(folder: int) -> None:
    """Make the names in an open folder durable, where the file system can.

    Samba refuses (EINVAL), and so do some file systems in user space: a new name is then as durable as they make it.
    """
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def etag_of(about: os.stat_result) -> str:
    """Return what tells one state of a file from another: device, inode, bytes and time of the last change.

    A change in place that keeps the length, within one tick of the file system's clock, is not seen; coldtap makes
    none.
    """
    return f"{about.st_dev:x}-{about.st_ino:x}-{about.st_size:x}-{about.st_mtime_ns:x}"


def temporary_of(path: Path) -> Path:
    """Return where a file is until it is whole; what a killed process leaves there, the next one replaces."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals while writing `path` into one clear MachineError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, MachineError) or error.errno not in _REASONS:
            raise
        raise MachineError(f"cannot write {path}: {_REASONS[error.errno]}, then run the same command again") from error


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise MachineError(
            f"cannot write {path}: a file is where a folder would have to be: choose another path"
        ) from error
