"""A source whose samples are image files: class folders, VTAB-1K folders and lists of paths end here."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from coldtap.errors import MachineError, SourceError
from coldtap.pipeline.images.decode import BadImageError
from coldtap.pipeline.images.sources.listing import Listing

MISSING = -1
"""Stands for the size of a file that is not there."""

# What a file is, and stays when read again. Any other error is the machine's, and may pass.
_FILE_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """Images in files of their own; paths, one per sample, are relative to the root or absolute."""

    name: str
    listing: Listing
    root: str
    paths: Sequence[str]

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file; see `read_file`."""
        return read_file(self.where(index))

    def where(self, index: int) -> str:
        """Return the path of an image file."""
        return os.path.join(self.root, self.paths[index])


def read_file(path: str) -> bytes:
    """Return the bytes of a file.

    Raises:
        BadImageError: the file is not there or may not be read.
        MachineError: reading failed for another reason, which may pass: a stale mount, a broken disk.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except _FILE_ERRORS as error:
        raise BadImageError(f"cannot be opened: {str(error.strerror).lower()}") from error
    except OSError as error:
        raise MachineError(f"{path}: reading failed: {error.strerror}") from error


def file_sizes(root: str, paths: Sequence[str], *, name: str) -> tuple[list[int], str | None]:
    """Return the size in bytes of each file, MISSING where it is not there, and a note if some are not.

    Raises:
        SourceError: none of the files is there.
    """
    sizes = [_file_size(os.path.join(root, path)) for path in paths]
    n_missing = sizes.count(MISSING)
    if not n_missing:
        return sizes, None
    first = os.path.join(root, paths[sizes.index(MISSING)])
    if n_missing == len(sizes):
        raise SourceError(
            f"{name}: none of its {n_missing} files is there, first {first}; relative paths start from {root}"
        )
    return sizes, f"{n_missing} of {len(sizes)} files are not there and will be rejected, first {first}"


def _file_size(path: str) -> int:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return MISSING
    return found.st_size if stat.S_ISREG(found.st_mode) else MISSING
