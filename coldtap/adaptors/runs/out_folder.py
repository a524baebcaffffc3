"""The folder that a training writes into: no store, and held by one process at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from coldtap.errors import MachineError, RunError, StoreLockedError
from coldtap.stores.reading.recipe_file import RECIPE
from coldtap.stores.storage.contract import Storage


@contextmanager
def sole_writer(out: Storage) -> Iterator[None]:
    """Hold the folder of a run, or of trials, so that two trainings do not write into it at a time.

    Raises:
        RunError: It is a store or a file, or another process holds it.
        MachineError: It cannot be made.
    """
    if out.stat(RECIPE) is not None:
        raise RunError(f"`out={str(out)!r}` is a store: choose a folder of its own for the run")
    with ExitStack() as stack:
        try:
            stack.enter_context(out.lock(named=False))
        except StoreLockedError:
            raise RunError(
                f"another training writes into {out}: wait for it, stop it, or choose another `out`"
            ) from None
        except MachineError as error:
            if not isinstance(error.__cause__, (FileExistsError, NotADirectoryError)):
                raise
            raise RunError(f"`out={str(out)!r}` is a file, or lies in one: choose a folder") from error
        yield
