"""Targets that changed after their store was complete."""

from dataclasses import replace

from coldtap.pipeline.cache_report import CacheReport
from coldtap.pipeline.plan.plan import JobPlan
from coldtap.stores.reading.store import open_store
from coldtap.stores.storage.address import place_of
from coldtap.stores.storage.contract import Storage
from coldtap.stores.writing.forecast import forecast
from coldtap.stores.writing.updates import has_other_targets, update_targets


def relabel(storage: Storage, plan: JobPlan, *, dry_run: bool) -> CacheReport:
    """Write those targets of a planned job that are others now; features stay as they are."""
    others = {name: data for name, data in plan.targets().items() if has_other_targets(storage, name, data)}
    if others and not dry_run:  # without them a store that may only be read is fine
        with storage.lock():
            for name, data in others.items():
                update_targets(storage, name, data)
    there = open_store(storage)
    ahead = None
    if others and dry_run:
        nothing = forecast(storage, plan.specs, plan.rows, [], rows_per_second=1, compressed={})
        ahead = replace(nothing, n_bytes=sum(map(len, others.values())))
    return CacheReport(
        store=place_of(storage),
        status="forecast" if ahead else "relabelled" if others else "unchanged",
        digest=there.digest,
        n_rows=there.n_rows,
        n_rejected=plan.rows.n_planned - there.n_rows,
        forecast=ahead,
    )
