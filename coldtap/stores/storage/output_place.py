"""The place of an output file, looked at before the work whose result it is to hold."""

from pathlib import Path

from coldtap.errors import OptionError
from coldtap.stores.storage.atomic import machine_errors, temporary_of


def require_place(path: Path, example: str) -> None:
    """Refuse a path where no file can be written.

    Args:
        path: of the file, which may be there already.
        example: a file's name, for the message where the path is a folder.

    Raises:
        OptionError: there is a folder, or a file where a folder would have to be.
        MachineError: a name is too long, or the place may not be looked at.
    """
    with machine_errors(path):
        if path.is_dir():
            raise OptionError(f"`out={str(path)!r}` is a folder: give the path of a file, such as {path / example}")
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir():
            raise OptionError(
                f"`out={str(path)!r}`: {nearest} is a file, and no folder can be there: choose another path"
            )
        # Each name of its own: a system that finds no folder for a name does not look how long the name is.
        for name in temporary_of(path).relative_to(nearest).parts:
            (nearest / name).exists()
