"""Converting a store to another tier or layout, without the backbone.

A store of an older format becomes one of this format in the same way, in its own tier if that is asked for.
Extractor and rows of the recipe stay, so an adaptor cannot tell a converted store from one that was extracted into
that tier. From float32 the two have the same address; of what was less exact before, the recipe says so (`from`).
Blocks are written as extraction writes them: a conversion that died anywhere goes on and ends in the same bytes.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coldtap.errors import CorruptStoreError, OptionError
from coldtap.stores.convert.block import Conversion, blocks_at_once, convert_block
from coldtap.stores.convert.rows import row_plan, sample_columns
from coldtap.stores.convert.scales import try_first_rows
from coldtap.stores.format.arrays import ArraySpec, plan_arrays
from coldtap.stores.format.codes import ErrorBound, describe_bound
from coldtap.stores.format.compensation import compensation_file
from coldtap.stores.format.encoding import Encoding
from coldtap.stores.format.encoding_part import EncodingPart
from coldtap.stores.format.features import FORMAT, WRITTEN
from coldtap.stores.format.targets import targets_name
from coldtap.stores.format.tiers import TIERS, Layout, TierName
from coldtap.stores.reading.store import Store, open_store
from coldtap.stores.reading.stored_numbers import stored_numbers
from coldtap.stores.storage.address import Place, overlap, place_of, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.threads import few_at_once
from coldtap.stores.writing.block import SpareBuffers
from coldtap.stores.writing.calibration import Calibration
from coldtap.stores.writing.forecast import Forecast
from coldtap.stores.writing.job import Ended, Found, Making, blocks_there, write_store
from coldtap.stores.writing.reporting import Reporter, Silence
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
    found = Found.look(storage)
    if found.is_complete_for(plan.recipe, plan.source):
        return plan.report(storage)
    old = plan.source.recipe
    if _how_kept(plan.recipe.encoding) == _how_kept(old.encoding) and plan.recipe.requires == old.requires:
        raise OptionError(f"{store} is of tier {tier} in layout {plan.encoding.layout} already: copy the folder")
    return plan.report(storage, write_store(found, plan, reporter or Silence(), dry_run=dry_run))


@dataclass(frozen=True, kw_only=True)
class _ToOtherTier(Making):
    """A planned conversion; with `same_numbers`, stored numbers are copied, and scales and exponents with them."""

    source: Store
    encoding: Encoding
    same_numbers: bool

    def calibrate(self, storage: Storage) -> Calibration:
        """Convert the first rows; copied numbers have the errors that they had."""
        kept = stored_numbers(storage, self.specs)
        if kept is None and self.same_numbers:
            kept = {name: array.numbers for name, array in self.source.arrays.items()}
        found = try_first_rows(self.source, self.specs, self.encoding.bound, kept, same_numbers=self.same_numbers)
        return replace(found, errors=self.source.recorded.get("errors", {})) if self.same_numbers else found

    def make(self, writer: StoreWriter, todo: Sequence[int], reporter: Reporter, stop: threading.Event) -> None:
        job = Conversion(
            source=self.source,
            writer=writer,
            buffers=SpareBuffers(writer.new_buffers),
            same_numbers=self.same_numbers,
            environment={"converted_from": self.source.digest, "coldtap": __version__, "numpy": np.__version__},
            advance=reporter.advance,
            stop=stop,
        )
        try:
            for _ in few_at_once(lambda block: convert_block(job, block), todo, blocks_at_once(), stop):
                pass
        except CorruptStoreError as error:
            raise CorruptStoreError(
                f"{error}. {blocks_there(writer)}; `coldtap verify {self.source.storage}` lists all that is wrong: "
                "mend it, and run the same command to go on"
            ) from error

    def finish(self, writer: StoreWriter) -> str:
        """Take over samples, targets and compensations (they say on which tier they were fitted) as they are."""
        source = self.source
        ids, sources = sample_columns(source)
        names = {name: targets_name(name) for name in source.target_names}
        targets = {name: source.files.table(file).read() for name, file in names.items()}
        compensations = {file: source.read_file(file) for file in map(compensation_file, source.compensations)}
        return writer.finish(ids, sources.__getitem__, targets, compensations)

    def report(self, storage: Storage, ended: Ended | None = None) -> ConvertReport:
        """Return the report; of a store that is there, with what it has recorded."""
        there = open_store(storage) if ended is None or ended.digest else None
        errors = there.recorded.get("errors", {}) if there else ended.calibration.errors if ended else {}
        before, after = self.source.recipe.encoding.scales, self.recipe.encoding.scales
        n_rows = there.n_rows if there else self.source.n_rows
        coded = TIERS[self.source.recipe.encoding.tier].is_coded
        return ConvertReport(
            store=place_of(storage),
            status="unchanged" if ended is None else "written" if ended.digest else "forecast",
            digest=there.digest if there else None,
            n_rows=n_rows,
            n_rejected=self.rows.n_planned - n_rows,
            n_overflown=self.source.n_rows - n_rows,
            exact=self.same_numbers,
            added_errors={} if self.same_numbers else {spec.name: _by_tap(spec, errors) for spec in self.specs},
            bound=describe_bound(after) if TIERS[self.encoding.tier].is_coded else None,
            source_bound=describe_bound(before) if coded else None,
            together=_together(before, after) if coded and not self.same_numbers else None,
            forecast=ended.ahead if ended else None,
        )


def _how_kept(encoding: EncodingPart) -> dict[str, Any]:
    return {"tier": encoding.tier, "layout": encoding.layout, "scales": encoding.scales}


def _plan(source: Store, tier: TierName, layout: Layout | None, bound: ErrorBound | None) -> _ToOtherTier:
    encoding, old = Encoding.choose(tier, layout, bound), source.recipe.encoding
    specs = plan_arrays(source.recipe.extractor.geometries, old.gathers, tier, encoding.layout)
    asked = encoding.to_recipe(old.gathers, specs)
    # Numbers of the same tier go into a newer format as they are; codes without a new bound keep their own, with
    # whatever rule set their scales.
    same_numbers = old.tier == tier and (bound is None or old.scales == asked.scales)
    scales = old.scales if same_numbers else asked.scales
    asked = replace(asked, scales=scales, origin=_lineage(old, same_numbers=same_numbers))
    return _ToOtherTier(
        recipe=replace(source.recipe, encoding=asked, format=FORMAT, requires=WRITTEN),
        specs=specs,
        rows=row_plan(source, specs[0].block_rows),
        norm=source.norm,
        recorded=_recorded(source),
        source=source,
        encoding=encoding,
        same_numbers=same_numbers,
    )


def _recorded(source: Store) -> dict[str, Any]:
    """What the old store recorded, and that it was the origin."""
    old, recipe = source.recorded, source.recipe
    kept = {key: old[key] for key in ("environment", "model", "source")}
    origin = {"address": recipe.address, "digest": source.digest, "errors": old.get("errors", {})}
    earlier = {key: old[key] for key in ("converted_from",) if key in old}
    return {**kept, "converted_from": {**origin, **_how_kept(recipe.encoding), **earlier}}


def _lineage(old: EncodingPart, *, same_numbers: bool) -> Mapping[str, Any] | None:
    """What a new recipe says of the old store, where that had lost something already.

    Features that were codes once must never pass for features that were kept exactly: they get an address of their own.
    """
    if same_numbers:
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
