"""One writing job a store: an advisory lock that the kernel drops when its holder dies."""

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from coldtap.errors import StoreLockedError
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
            self._descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644, dir_fd=self._folder)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
