"""Opening and reading files that may have been damaged or replaced: regular files alone, never more than expected."""

import os
import stat
from pathlib import Path

from coldtap.errors import CorruptStoreError

MAX_SMALL_BYTES = 1 << 26  # a recipe, metadata, a chunk of scales or escapes; the largest are some 100 kB
READ_AT_ONCE = 1 << 22


def open_regular(path: Path | str, *, folder: int | None = None, where: object = None) -> int:
    """Return a descriptor for reading.

    Args:
        path: of the file.
        folder: descriptor of the folder that the path is relative to.
        where: what a message calls the file, if not by its path.

    Raises:
        OSError: the file is not there, or may not be opened.
        CorruptStoreError: a folder, pipe or device stands in its place.
    """
    # Opening a pipe would else wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0), dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_regular(where or path)
    return descriptor


def not_regular(where: object) -> CorruptStoreError:
    """Return the error of what is no file, and yet lies where one should."""
    return CorruptStoreError(f"{where} is not a regular file")


def read_small(path: Path) -> bytes:
    """The bytes of a small file.

    Raises:
        OSError: the file is not there, or cannot be read.
        CorruptStoreError: it is no small file.
    """
    with open(open_regular(path), "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes > MAX_SMALL_BYTES:
            raise CorruptStoreError(f"{path} is larger than any such file: more than {MAX_SMALL_BYTES} bytes")
        return file.read(n_bytes)


def read_text_bytes(path: Path) -> bytearray:
    """The bytes of a text of any length; one that a hole makes long is not read to its end.

    Raises:
        OSError: the file is not there, or cannot be read.
        CorruptStoreError: it holds bytes that no text has.
    """
    data = bytearray()
    with open(open_regular(path), "rb", buffering=0) as file:
        while piece := file.read(READ_AT_ONCE):
            if b"\0" in piece:
                raise CorruptStoreError(f"{path} is damaged: it holds zero bytes")
            data += piece
    return data
