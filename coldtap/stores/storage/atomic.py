"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from coldtap.errors import MachineError

TEMPORARY_SUFFIX = ".partial"
_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file-size limit of this process is reached: raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose another path",
    errno.EACCES: "no permission to write there: choose another path or change its mode",
    errno.EPERM: "no permission to write there: choose another path or change its mode",
    errno.ENAMETOOLONG: "a name in this path is too long: choose a shorter one",
    errno.EISDIR: "a folder is there: choose another path",
}


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is there whole or not at all, whatever happens.

    Raises:
        MachineError: the disk is full, read-only or refuses, or the path is none for a file; nothing under `path` has
            changed.
    """
    temporary = temporary_of(path)
    with machine_errors(path):
        _make_folder(path)
        try:
            with temporary.open("wb", buffering=0) as file:
                for piece in pieces:
                    _write_all(file.fileno(), memoryview(piece))
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """Where a file is until it is whole; what a killed process leaves there, the next one replaces."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, as far as the platform can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _write_all(descriptor: int, data: memoryview) -> None:
    data = data.cast("B")
    while data:
        data = data[os.write(descriptor, data) :]
