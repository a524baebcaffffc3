"""One life of every job that writes a store, from its first rows to its manifest; what died anywhere goes on.

A kind of job (extraction, conversion) is a `Making`: it says how rows are made, and `write_store` when.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Self

from coldtap.errors import InterruptedRunError, StoreError, StoreLockedError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.reading.journal_lines import finished_blocks
from coldtap.stores.reading.manifest_files import is_complete
from coldtap.stores.reading.recipe_file import read_recipe, require_same_recipe
from coldtap.stores.reading.store import Store
from coldtap.stores.storage.contract import Storage
from coldtap.stores.writing.calibration import Calibration
from coldtap.stores.writing.forecast import Forecast, forecast, require_space
from coldtap.stores.writing.reporting import Reporter
from coldtap.stores.writing.resume import intact_blocks
from coldtap.stores.writing.stopping import stop_on_signals
from coldtap.stores.writing.writer import StoreWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an earlier call left in a storage: recipe, and what it recorded; None and empty where it left nothing."""

    storage: Storage
    recipe: Recipe | None
    recorded: dict[str, Any]

    @classmethod
    def look(cls, storage: Storage) -> Self:
        """Look at what is there; raises as `read_recipe`."""
        recipe, recorded = read_recipe(storage) or (None, {})
        return cls(storage=storage, recipe=recipe, recorded=recorded)

    def is_complete_for(self, recipe: Recipe, origin: Store | None = None) -> bool:
        """Return whether all that a recipe asks for is there; False where a job has to begin or may go on.

        Raises:
            RecipeMismatchError: what is there was asked otherwise.
            StoreError: it is unfinished and was begun in another format, or from another origin (the store that is
                converted, None for images): the recipe may be the same, the last bits are not.
        """
        if self.recipe is None:
            return False
        require_same_recipe(self.storage, self.recipe, recipe)
        if is_complete(self.storage):
            return True
        self._require_same_origin(origin)
        self._require_same_format(recipe)
        return False

    def _require_same_format(self, new: Recipe) -> None:
        old = self.recipe
        if old is not None and (old.format, old.requires) != (new.format, new.requires):
            raise StoreError(
                f"{self.storage} was begun in store format {old.format} ({', '.join(old.requires) or 'no features'}); "
                f"this coldtap writes format {new.format} ({', '.join(new.requires)}): finish it with the coldtap that "
                "began it, or choose a new path; nothing was changed"
            )

    def _require_same_origin(self, origin: Store | None) -> None:
        storage, began = self.storage, self.recorded.get("converted_from")
        if (began is None) != (origin is None):
            by = "cache-features" if began is None else "coldtap convert"
            raise StoreError(f"{storage} was begun by `{by}`: finish it with the same command, or choose a new path")
        if began is not None and origin is not None and began["digest"] != origin.digest:
            raise StoreError(
                f"{storage} was begun from another store (digest {began['digest'][:12]}, {origin.storage} has "
                f"{origin.digest[:12]}): go on from that one, or choose a new path"
            )

    def require_alone(self) -> None:
        """With the lock in hand, require that the store is still what it was when the job was planned."""
        if is_complete(self.storage) or (self.recipe is None and read_recipe(self.storage) is not None):
            raise StoreLockedError(f"another job wrote to {self.storage} meanwhile: run the same command again")


@dataclass(frozen=True, kw_only=True)
class Making(ABC):
    """One kind of job, planned: what it does for itself. The rest of its life is that of all.

    Attributes:
        recipe: what is asked.
        specs: the arrays.
        rows: the rows, in blocks.
        norm: the backbone's final norm.
        recorded: what goes beside the recipe of a store that is begun, but for the calibration's errors.
    """

    recipe: Recipe
    specs: tuple[ArraySpec, ...]
    rows: RowPlan
    norm: FinalNorm | None
    recorded: Mapping[str, Any]

    @abstractmethod
    def calibrate(self, storage: Storage) -> Calibration:
        """Make the first rows without writing them; numbers that an earlier call fixed in the storage stay anyway."""

    @abstractmethod
    def make(self, writer: StoreWriter, todo: Sequence[int], reporter: Reporter, stop: threading.Event) -> None:
        """Write the blocks `todo`; raise InterruptedRunError when `stop` is set."""

    @abstractmethod
    def finish(self, writer: StoreWriter) -> str:
        """Have the writer finish with ids, origins, targets and other small files; return its digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a job ended; a dry run has no digest."""

    calibration: Calibration
    ahead: Forecast
    digest: str | None = None


def write_store(found: Found, making: Making, reporter: Reporter, *, dry_run: bool) -> Ended:
    """Do what is left of a store that is not complete, or forecast it.

    Raises:
        MachineError: there is no room for it, or the disk refuses.
        StoreLockedError: another job writes there, or has written since `found`.
        InterruptedRunError: a signal came; finished blocks stay.
    """
    storage = found.storage
    calibration = making.calibrate(storage)
    done = _done_before(found, making, reporter, by_digest=not dry_run)
    todo, ahead = _look_ahead(found, making, calibration, done, reporter)
    if dry_run:
        return Ended(calibration=calibration, ahead=ahead)
    require_space(storage, ahead)
    with storage.lock(), stop_on_signals() as request:
        found.require_alone()
        writer = StoreWriter.begin(
            storage,
            making.recipe,
            making.specs,
            making.rows,
            recorded=found.recorded or {**making.recorded, "errors": calibration.errors},
            numbers=calibration.numbers,
            norm=making.norm,
        )
        try:
            making.make(writer, todo, reporter, request.event)
        except InterruptedRunError:
            raise request.error(f"stopped: {blocks_there(writer)}; run the same command to go on") from None
        return Ended(calibration=calibration, ahead=ahead, digest=making.finish(writer))


def _done_before(found: Found, making: Making, reporter: Reporter, *, by_digest: bool) -> set[int]:
    """The blocks that an earlier call has finished; a forecast takes them by their size."""
    if not found.recipe:
        return set()
    if by_digest:
        return set(intact_blocks(found.storage, making.specs, making.rows, reporter))
    return set(finished_blocks(found.storage, making.rows.n_blocks))


def _look_ahead(
    found: Found, making: Making, calibration: Calibration, done: Set[int], reporter: Reporter
) -> tuple[list[int], Forecast]:
    """The blocks that are not there yet, and what they will take."""
    n_blocks = making.rows.n_blocks
    todo = [block for block in range(n_blocks) if block not in done]
    rate = calibration.rows_per_second * min(calibration.blocks_at_once, max(len(todo), 1))
    ahead = forecast(found.storage, making.specs, making.rows, todo, rate, calibration.compressed)
    if found.recipe:
        reporter.note(f"going on with {found.storage}: {len(done)} of {n_blocks} blocks are there")
    reporter.forecast(ahead)
    return todo, ahead


def blocks_there(writer: StoreWriter) -> str:
    """Say how many blocks a job that ends before its time leaves."""
    there = finished_blocks(writer.storage, writer.plan.n_blocks)
    return f"{len(there)} of {writer.plan.n_blocks} blocks of {writer.storage} are there and stay"
