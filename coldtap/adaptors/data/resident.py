"""Rows kept as stored numbers, in RAM or on the training device: read once, restored anew for every batch."""

from collections.abc import Generator, Iterable
from math import prod
from typing import Any

import numpy as np
import torch

from coldtap.adaptors.data.devices import to_device
from coldtap.adaptors.data.restore import Restorer, StoredBuffer, StoredTaps
from coldtap.stores.reading.array import OutlyingValues

type Rows = np.ndarray[Any, np.dtype[np.int64]]

LOAD_BYTES = 64_000_000  # of stored numbers a call while rows are loaded


class HeldRows:
    """Some rows of an array, as stored, on a device."""

    def __init__(self, taps: StoredTaps, rows: Rows, device: torch.device) -> None:
        """Read the rows, whose numbers are ascending."""
        self._taps, self._rows = taps, rows
        row_size = prod(taps.row_shape)
        per_call = min(len(rows), max(1, LOAD_BYTES // taps.bytes_per_row))
        in_ram = device.type == "cpu"
        # In RAM the rows are read to where they stay; for a GPU a part at a time.
        self._buffer = taps.buffer(len(rows) if in_ram else per_call)
        shape = (len(rows), *taps.row_shape)
        self._stored = self._buffer.tensor if in_ram else torch.empty(shape, dtype=taps.dtype, device=device)
        found = []
        for start in range(0, len(rows), per_call):
            part = rows[start : start + per_call]
            place = start if in_ram else 0
            outlying = taps.read(self._buffer.array[place : place + len(part)], part)
            if not in_ram:
                self._stored[start : start + len(part)].copy_(self._buffer.tensor[: len(part)])
            found.append(OutlyingValues(position=outlying.position + start * row_size, value=outlying.value))
        self._outlying = _OutlyingByRow(found, len(rows), row_size)

    def features(self, batches: Iterable[Rows], restorer: Restorer) -> Generator[torch.Tensor]:
        """Yield float32 features of each batch of row numbers, on this device, valid until the next is asked for."""
        for rows in batches:
            places = self._places(rows)
            index = to_device(torch.from_numpy(places), self._stored.device)
            yield restorer.chosen(self._stored, index, self._outlying.of(places))

    def buffer(self, n_rows: int, *, pinned: bool) -> StoredBuffer:
        """Return room for some rows, as `StoredTaps` does."""
        return self._taps.buffer(n_rows, pinned=pinned)

    def read(self, out: np.ndarray[Any, Any], rows: Rows) -> OutlyingValues:
        """Copy rows that are kept in RAM, as `StoredTaps` reads them from disk."""
        places = self._places(rows)
        np.take(self._buffer.array, places, axis=0, out=out, mode="clip")
        return self._outlying.of(places)

    def will_need(self, rows: Rows) -> None:
        """Do nothing: the rows are there."""

    def _places(self, rows: Rows) -> Rows:
        return np.searchsorted(self._rows, rows)


class _OutlyingByRow:
    """Outlying values of many rows, found by row: 8 bytes each, in RAM wherever the codes are."""

    def __init__(self, found: list[OutlyingValues], n_rows: int, row_size: int) -> None:
        position = np.concatenate([outlying.position for outlying in found])
        order = np.argsort(position)
        position = position[order]
        self._row_size = row_size
        self._starts = np.searchsorted(position, np.arange(n_rows + 1) * row_size)
        self._within = (position % row_size).astype(np.int32)
        self._value = np.concatenate([outlying.value for outlying in found])[order]

    def of(self, places: Rows) -> OutlyingValues:
        """Return the outlying values of a batch of rows, by position in the batch."""
        starts = self._starts[places]
        counts = self._starts[places + 1] - starts
        ends = np.cumsum(counts)
        here = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        first = np.repeat(np.arange(len(places)) * self._row_size, counts)
        return OutlyingValues(position=first + self._within[here], value=self._value[here])
