"""The folder that a training writes into: made where it is missing, and held by one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coldtap.errors import RunError
from coldtap.stores.reading.recipe_file import RECIPE
from coldtap.stores.storage.atomic import machine_errors


def make_folder(out: Path) -> None:
    """Make the folder of a run, or of trials.

    Raises:
        RunError: It is a store, or a file.
        MachineError: It cannot be made.
    """
    if (out / RECIPE).exists():
        raise RunError(f"`out={str(out)!r}` is a store: choose a folder of its own for the run")
    try:
        with machine_errors(out):
            out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"`out={str(out)!r}` is a file, or lies in one: choose a folder") from error


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold a folder by flock(2), so that two trainings do not write into it at a time.

    Raises:
        RunError: Another process holds it.
    """
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise RunError(f"another training writes into {out}: wait for it, stop it, or choose another `out`") from None
    try:
        yield
    finally:
        os.close(folder)
