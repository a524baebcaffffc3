"""Opening what may have been replaced: regular files and real folders alone, never what a link leads to unasked."""

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress

from coldtap.errors import CorruptStoreError

MAX_SMALL_BYTES = 1 << 26  # a recipe, metadata, a chunk of scales or escapes; the largest are some 100 kB
READ_AT_ONCE = 1 << 22
FOLDER = os.O_RDONLY | os.O_DIRECTORY
_WAS_A_LINK = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)  # what systems say of a link that they were not to follow


def open_regular(name: str, folder: int, *, where: str, follow_links: bool = False) -> int:
    """Return a descriptor of a regular file for reading.

    Args:
        name: of the file, one part.
        folder: descriptor of its folder.
        where: what messages call the file.
        follow_links: whether a link to a regular file is one.

    Raises:
        OSError: the file is not there, or may not be opened.
        CorruptStoreError: a link, folder, pipe or device stands in its place.
    """
    # Opening a pipe would else wait for its writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if not follow_links and error.errno in _WAS_A_LINK and (link := link_at(name, folder)) is not None:
            raise is_link(where, link) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_regular(where)
    return descriptor


def descend(folder: int, parts: Sequence[str], *, where: str, make: bool = False) -> int:
    """Return a descriptor of a folder below another, no link being followed; that of the other is closed.

    Args:
        folder: an open descriptor.
        parts: the names of the folders on the way.
        where: what messages call `folder`.
        make: whether a folder that is not there is made.

    Raises:
        OSError: a folder is not there, or is a file.
        CorruptStoreError: a link stands in the place of one.
    """
    for n_done, part in enumerate(parts, 1):
        above = folder
        try:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=above)
            folder = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=above)
        except OSError as error:
            if error.errno in _WAS_A_LINK and (link := link_at(part, above)) is not None:
                raise is_link("/".join((where, *parts[:n_done])), link, folder=True) from None
            raise
        finally:
            os.close(above)
    return folder


def link_at(name: str, folder: int) -> str | None:
    """Return where the link of a name in a folder leads; None where it is none."""
    with suppress(OSError):
        return os.readlink(name, dir_fd=folder)
    return None


def is_link(where: str, target: str, *, folder: bool = False) -> CorruptStoreError:
    """Return the error of a link in the place of a file or a folder."""
    mend = (
        "put the folder itself there, or give the path behind it"
        if folder
        else "with `follow_links=True` a link to a file is read"
    )
    return CorruptStoreError(f"{where} is a link, to {target}, which is not followed: {mend}")


def not_regular(where: object) -> CorruptStoreError:
    """Return the error of what is no file, and yet lies where one should."""
    return CorruptStoreError(f"{where} is not a regular file")
