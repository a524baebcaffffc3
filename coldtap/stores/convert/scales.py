"""Before a conversion: the scales of the new store from the first rows of the old one, and a trial of a few rows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coldtap.errors import StoreError
from coldtap.stores.convert.block import blocks_at_once, fill, read_values
from coldtap.stores.convert.rows import Rows
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunks import CRC_BYTES
from coldtap.stores.format.codes import ErrorBound, worst_channels
from coldtap.stores.format.tiers import Numbers
from coldtap.stores.reading.store import Store
from coldtap.stores.writing.block import ArrayBuffer
from coldtap.stores.writing.calibration import COMPRESSED_ROWS, Calibration, CalibrationSamples


def first_rows(source: Store, n_rows: int) -> Rows:
    """Return the first present rows of the first (split, view) that has any."""
    for segment in source.segments:
        rows = source.rows(segment.split, segment.view)
        if len(rows):
            return rows[:n_rows]
    raise StoreError(f"{source.storage} has no rows: all were rejected")


def try_first_rows(
    source: Store,
    specs: Sequence[ArraySpec],
    bound: ErrorBound | None,
    kept: Mapping[str, Numbers] | None,
    *,
    same_numbers: bool,
) -> Calibration:
    """Fix the scales by the rule of extraction, and convert a few rows without writing them.

    Args:
        source: the old store.
        specs: the arrays of the new one.
        bound: of its codes.
        kept: the numbers that are used already, by the old store or by an earlier call; None to choose them.
        same_numbers: copy the stored numbers.
    """
    numbers, errors = (dict(kept), {}) if kept else _calibrate(source, specs, bound)
    rows = _consecutive(first_rows(source, COMPRESSED_ROWS))
    compressed, began = {}, time.perf_counter()
    for spec in specs:
        array, buffer = source.arrays[spec.name], _small_buffer(spec, numbers[spec.name], len(rows))
        overflown = fill(array, buffer, rows, int(rows[0]), same_numbers)
        sealed = buffer.shard.seal(np.ones(len(rows), bool))
        if spec.layout == "compact":
            n_frames = sealed.pieces[0].nbytes - len(rows) * spec.chunks_per_row * CRC_BYTES
            compressed[spec.name] = n_frames / (len(rows) * spec.bytes_per_row)
        if not (spec.kept_as.is_exact or spec.kept_as.is_coded or overflown):
            # Rounding is alike in all rows, those that set the exponents too.
            errors[spec.name] = _rounding(source, buffer, rows)
    return Calibration(
        numbers=numbers,
        errors=errors,
        compressed=compressed,
        rows_per_second=len(rows) / (time.perf_counter() - began),
        blocks_at_once=blocks_at_once(),
    )


def _calibrate(
    source: Store, specs: Sequence[ArraySpec], bound: ErrorBound | None
) -> tuple[dict[str, Numbers], dict[str, list[dict[str, Any]]]]:
    rows = first_rows(source, CalibrationSamples.rows_needed(specs, bound))
    samples = CalibrationSamples(specs, bound, len(rows))
    for row in rows:
        for spec in specs:
            (values,) = read_values(source.arrays[spec.name], row[None])
            tokens = samples.tokens(spec, int(row)) if spec.kept_as.is_coded else None
            for place, tap in enumerate(values):
                largest = max(float(tap.max()), -float(tap.min()))
                samples.add(spec.name, place, largest, None if tokens is None else tap[tokens])
    return samples.numbers(), samples.errors()


def _consecutive(rows: Rows) -> Rows:
    """The first run of rows that follow each other."""
    return np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)[0]


def _small_buffer(spec: ArraySpec, numbers: Numbers, n_rows: int) -> ArrayBuffer:
    return ArrayBuffer(replace(spec, block_rows=n_rows), numbers)


def _rounding(source: Store, buffer: ArrayBuffer, rows: Rows) -> list[dict[str, Any]]:
    """What a float tier loses of some rows, a tap; empty where it loses nothing."""
    spec = buffer.spec
    values = read_values(source.arrays[spec.name], rows)
    restored = np.empty(values.shape, np.float32)
    spec.kept_as.restore(buffer.shard.values.reshape(values.shape), restored, buffer.numbers)
    if np.array_equal(values, restored):
        return []
    return worst_channels(values, restored, prefix_tokens=spec.geometry.prefix_tokens)
