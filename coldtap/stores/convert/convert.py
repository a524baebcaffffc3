"""Converting a store to another tier or layout, without the backbone.

Extractor and rows of the recipe stay, so an adaptor cannot tell a converted store from one that was extracted into
that tier. From float32 the two have the same address; of what was less exact before, the recipe says so (`from`).
Blocks are written as extraction writes them: a conversion that died anywhere goes on and ends in the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coldtap.errors import CorruptStoreError, InterruptedRunError, OptionError, StoreError, StoreLockedError
from coldtap.stores.convert.block import Conversion, blocks_at_once, convert_block
from coldtap.stores.convert.rows import row_plan, sample_columns
from coldtap.stores.convert.scales import try_first_rows
from coldtap.stores.format.arrays import ArraySpec, plan_arrays
from coldtap.stores.format.codes import ErrorBound, describe_bound
from coldtap.stores.format.compensation import compensation_file
from coldtap.stores.format.encoding import Encoding
from coldtap.stores.format.encoding_part import EncodingPart
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.targets import targets_name
from coldtap.stores.format.tiers import TIERS, Layout, TierName
from coldtap.stores.reading.journal_lines import finished_blocks
from coldtap.stores.reading.manifest_files import is_complete
from coldtap.stores.reading.recipe_file import read_recipe, require_same_recipe
from coldtap.stores.reading.store import Store, open_store
from coldtap.stores.reading.stored_numbers import stored_numbers
from coldtap.stores.storage.address import Place, overlap, place_of, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.threads import few_at_once
from coldtap.stores.writing.block import SpareBuffers
from coldtap.stores.writing.calibration import Calibration
from coldtap.stores.writing.forecast import Forecast, forecast, require_space
from coldtap.stores.writing.reporting import Reporter, Silence
from coldtap.stores.writing.stopping import StopRequest, stop_on_signals
from coldtap.stores.writing.writer import StoreWriter
from coldtap.version import __version__

type Errors = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """How a conversion ended.

    Attributes:
        store: where the new store is: its path, or its storage.
        status: `written`; `unchanged` where it was complete already; `forecast` after a dry run.
        digest: SHA-256 of the new store's manifest; None after a dry run.
        n_rows: rows that are there; after a dry run, rows that would be.
        n_rejected: rows that are not.
        n_overflown: of these, rows that the old store has and float16 cannot keep.
        exact: codes were copied as they are.
        added_errors: of each array, the worst channel of every tap against the old store's values (`codes.py`); an
            empty list where nothing is lost, or where there were too few rows to measure.
        bound: that of the new codes, in words; None outside int8.
        source_bound: that of the old codes; their errors stay, whatever is added.
        together: of both, where both are stated in the same unit.
        forecast: what was left to do when the work began; None where there was nothing.
    """

    store: Path | Storage
    status: Literal["written", "unchanged", "forecast"]
    digest: str | None
    n_rows: int
    n_rejected: int
    n_overflown: int
    exact: bool
    added_errors: Errors
    bound: str | None
    source_bound: str | None
    together: str | None
    forecast: Forecast | None


def convert_store(
    store: Place,
    new: Place,
    *,
    tier: TierName,
    layout: Layout | None = None,
    snr: float | None = None,
    max_error: float | None = None,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> ConvertReport:
    """Write the features of a store into a new one, in another tier or layout.

    Args:
        store: a complete store.
        new: where the new one is, or will be. The same call goes on, or has nothing to do.
        tier: how numbers are kept there.
        layout: `compact` (the default of int8) or `fast` (of all others).
        snr: of int8, in dB in every channel. Where neither bound is given, codes keep theirs, and others get 30.
        max_error: of int8, the largest error of any value, in standard deviations of its channel.
        dry_run: forecast, and write nothing.
        reporter: told what happens.

    Raises:
        ColdtapError: one of its kinds (`coldtap.errors`), always with what to do.
    """
    storage = storage_at(new)
    if overlap(storage_at(store), storage):
        raise OptionError(f"{new} is, lies in or holds {store}: give a path outside it for the new store")
    bound = None if snr is None and max_error is None else ErrorBound(snr_db=snr, max_error=max_error)
    plan = _plan(open_store(store, threads=1), tier, layout, bound)
    found = read_recipe(storage)
    if found is not None:
        require_same_recipe(storage, found[0], plan.recipe)
        if is_complete(storage):
            return plan.report(storage, "unchanged", digest=open_store(storage).digest)
        _require_same_origin(storage, found[1], plan.source)
    if _how_kept(plan.recipe.encoding) == _how_kept(plan.source.recipe.encoding):
        raise OptionError(f"{store} is of tier {tier} in layout {plan.encoding.layout} already: copy the folder")
    work = _Work(storage=storage, plan=plan, recorded=found[1] if found else None, told=reporter or Silence())
    return work.run(dry_run=dry_run)


def _require_same_origin(storage: Storage, recorded: Mapping[str, Any], source: Store) -> None:
    """An unfinished store can only be gone on with from the store that it was begun from."""
    began = recorded.get("converted_from")
    if began is None:
        raise StoreError(
            f"{storage} was begun by `cache-features`: finish it with the same command, or choose a new path"
        )
    if began["digest"] != source.digest:
        raise StoreError(
            f"{storage} was begun from another store (digest {began['digest'][:12]}, {source.storage} has "
            f"{source.digest[:12]}): go on from that one, or choose a new path"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is decided before a feature is read; with `same_codes`, codes and scales are copied."""

    source: Store
    encoding: Encoding
    same_codes: bool
    specs: tuple[ArraySpec, ...]
    rows: RowPlan
    recipe: Recipe

    def report(
        self,
        storage: Storage,
        status: Literal["written", "unchanged", "forecast"],
        *,
        digest: str | None = None,
        errors: Errors | None = None,
        ahead: Forecast | None = None,
    ) -> ConvertReport:
        """The report; of a store that is there, with what it has recorded."""
        there = None if digest is None else open_store(storage)
        recorded = there.recorded.get("errors", {}) if there else errors or {}
        before, after = self.source.recipe.encoding.scales, self.recipe.encoding.scales
        n_rows = there.n_rows if there else self.source.n_rows
        coded = TIERS[self.source.recipe.encoding.tier].is_coded
        return ConvertReport(
            store=place_of(storage),
            status=status,
            digest=digest,
            n_rows=n_rows,
            n_rejected=self.rows.n_planned - n_rows,
            n_overflown=self.source.n_rows - n_rows,
            exact=self.same_codes,
            added_errors={} if self.same_codes else {spec.name: _by_tap(spec, recorded) for spec in self.specs},
            bound=describe_bound(after) if TIERS[self.encoding.tier].is_coded else None,
            source_bound=describe_bound(before) if coded else None,
            together=_together(before, after) if coded and not self.same_codes else None,
            forecast=ahead,
        )

    def recorded(self, errors: Errors) -> dict[str, Any]:
        """What goes beside the new recipe: what the old store recorded, and that it was the origin."""
        old = self.source.recorded
        origin = {
            "address": self.source.recipe.address,
            "digest": self.source.digest,
            **_how_kept(self.source.recipe.encoding),
            "errors": old.get("errors", {}),
        }
        if "converted_from" in old:
            origin["converted_from"] = old["converted_from"]
        kept = {key: old[key] for key in ("environment", "model", "source")}
        return {**kept, "errors": old.get("errors", {}) if self.same_codes else errors, "converted_from": origin}


def _how_kept(encoding: EncodingPart) -> dict[str, Any]:
    return {"tier": encoding.tier, "layout": encoding.layout, "scales": encoding.scales}


def _plan(source: Store, tier: TierName, layout: Layout | None, bound: ErrorBound | None) -> _Plan:
    encoding, old = Encoding.choose(tier, layout, bound), source.recipe.encoding
    specs = plan_arrays(source.recipe.extractor.geometries, old.gathers, tier, encoding.layout)
    asked = encoding.to_recipe(old.gathers, specs)
    # Codes without a new bound keep their own, with whatever rule set their scales.
    same_codes = old.tier == tier and TIERS[tier].is_coded and (bound is None or old.scales == asked.scales)
    scales = old.scales if same_codes else asked.scales
    asked = replace(asked, scales=scales, origin=_lineage(old, same_codes=same_codes))
    recipe = Recipe(extractor=source.recipe.extractor, rows=source.recipe.rows, encoding=asked)
    rows = row_plan(source, specs[0].block_rows)
    return _Plan(source=source, encoding=encoding, same_codes=same_codes, specs=specs, rows=rows, recipe=recipe)


def _lineage(old: EncodingPart, *, same_codes: bool) -> Mapping[str, Any] | None:
    """What a new recipe says of the old store, where that had lost something already.

    Features that were codes once must never pass for features that were kept exactly: they get an address of their own.
    """
    if same_codes:
        return old.origin
    if TIERS[old.tier].is_exact and old.origin is None:
        return None
    before = {} if old.origin is None else {"from": old.origin}
    return {"tier": old.tier, "scales": old.scales, **before}


def _by_tap(spec: ArraySpec, errors: Errors) -> list[dict[str, Any]]:
    return [{"tap": tap, **about} for tap, about in zip(spec.taps, errors.get(spec.name, ()), strict=False)]


def _together(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Two bounds that add up: the powers of independent errors, or the largest errors themselves."""
    if "snr_db" in before and "snr_db" in after:
        power = 10 ** (-before["snr_db"] / 10) + 10 ** (-after["snr_db"] / 10)
        return f"about {-10 * log10(power):.1f} dB in every channel"
    if "max_error" in before and "max_error" in after:
        return f"every error at most {before['max_error'] + after['max_error']:g} standard deviations"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A planned conversion into a store that is not complete; `recorded` is what an earlier call wrote there."""

    storage: Storage
    plan: _Plan
    recorded: Mapping[str, Any] | None
    told: Reporter

    def run(self, *, dry_run: bool) -> ConvertReport:
        plan = self.plan
        trial = self._try()
        todo, ahead = self._look_ahead(trial)
        if dry_run:
            return plan.report(self.storage, "forecast", errors=trial.errors, ahead=ahead)
        require_space(self.storage, ahead)
        with self.storage.lock(), stop_on_signals() as request:
            self._require_alone()
            writer = StoreWriter.begin(
                self.storage,
                plan.recipe,
                plan.specs,
                plan.rows,
                recorded=self.recorded or plan.recorded(trial.errors),
                numbers=trial.numbers,
                norm=plan.source.norm,
            )
            self._convert(writer, todo, request)
            ids, sources = sample_columns(plan.source)
            digest = writer.finish(ids, sources.__getitem__, self._targets(), self._compensations())
        return plan.report(self.storage, "written", digest=digest, ahead=ahead)

    def _try(self) -> Calibration:
        plan = self.plan
        kept = stored_numbers(self.storage, plan.specs)
        if kept is None and plan.same_codes:
            kept = {name: array.numbers for name, array in plan.source.arrays.items()}
        return try_first_rows(plan.source, plan.specs, plan.encoding.bound, kept, same_codes=plan.same_codes)

    def _look_ahead(self, trial: Calibration) -> tuple[list[int], Forecast]:
        """The blocks that are not there yet, and what they will take."""
        rows = self.plan.rows
        done = set(finished_blocks(self.storage, rows.n_blocks)) if self.recorded else set()
        todo = [block for block in range(rows.n_blocks) if block not in done]
        rate = trial.rows_per_second * min(trial.blocks_at_once, max(len(todo), 1))
        ahead = forecast(self.storage, self.plan.specs, rows, todo, rate, trial.compressed)
        if self.recorded:
            self.told.note(f"going on with {self.storage}: {len(done)} of {rows.n_blocks} blocks are there")
        self.told.forecast(ahead)
        return todo, ahead

    def _require_alone(self) -> None:
        """With the lock in hand, the store must still be what it was when the work was planned."""
        if is_complete(self.storage) or (self.recorded is None and read_recipe(self.storage) is not None):
            raise StoreLockedError(f"another job wrote to {self.storage} meanwhile: run the same command again")

    def _convert(self, writer: StoreWriter, todo: Sequence[int], request: StopRequest) -> None:
        source = self.plan.source
        job = Conversion(
            source=source,
            writer=writer,
            buffers=SpareBuffers(writer.new_buffers),
            same_codes=self.plan.same_codes,
            environment={"converted_from": source.digest, "coldtap": __version__, "numpy": np.__version__},
            advance=self.told.advance,
            stop=request.event,
        )
        try:
            for _ in few_at_once(lambda block: convert_block(job, block), todo, blocks_at_once(), job.stop):
                pass
        except InterruptedRunError:
            raise request.error(f"stopped: {self._kept()}; run the same command to go on") from None
        except CorruptStoreError as error:
            raise CorruptStoreError(
                f"{error}. {self._kept()}; `coldtap verify {source.storage}` lists all that is wrong: mend it, and "
                "run the same command to go on"
            ) from error

    def _kept(self) -> str:
        n_blocks = self.plan.rows.n_blocks
        there = len(finished_blocks(self.storage, n_blocks))
        return f"{there} of {n_blocks} blocks of {self.storage} are there and stay"

    def _targets(self) -> dict[str, bytes]:
        """The targets' tables of the old store as they are."""
        source = self.plan.source
        names = {name: targets_name(name) for name in source.target_names}
        for file in names.values():
            source.files.require_intact(file)
        return {name: source.storage.get(file, limit=None) for name, file in names.items()}

    def _compensations(self) -> dict[str, bytes]:
        """The files of the old store's compensations as they are: they say on which tier they were fitted."""
        source = self.plan.source
        return {file: source.read_file(file) for file in map(compensation_file, source.compensations)}
