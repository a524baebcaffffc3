"""One writing job a store: an advisory lock that the kernel drops when its holder dies."""

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from types import TracebackType

from coldtap.errors import CorruptStoreError, StoreLockedError
from coldtap.stores.storage.atomic import machine_errors
from coldtap.stores.storage.contract import LOCK_NAME as LOCK_NAME


class StoreLock:
    """Holds `STORE/.lock` by flock(2) while in use.

    The file names its holder for the other job's message; the lock is the kernel's, so that a dead job
    cannot hold it and the file's presence alone means nothing.
    """

    def __init__(self, store: Path, *, folder: int | None = None) -> None:
        """Take nothing yet; `folder` is an open descriptor of the store, which else is found by its path."""
        self._path, self._folder = store / LOCK_NAME, folder
        self._descriptor = -1

    def __enter__(self) -> "StoreLock":
        with machine_errors(self._path):
            place = self._path if self._folder is None else LOCK_NAME
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            try:
                self._descriptor = os.open(place, flags, 0o666, dir_fd=self._folder)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a pipe without a reader
                    raise
                raise self._no_lock_file() from None
            about = os.fstat(self._descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
                os.close(self._descriptor)
                raise self._no_lock_file()
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(self._descriptor)
            raise StoreLockedError(
                f"{self._path.parent} is being written by {holder}: wait for it, or stop it and run again"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return self

    def _no_lock_file(self) -> CorruptStoreError:
        return CorruptStoreError(f"{self._path} is a link, or no regular file, and nothing is written to it: remove it")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
