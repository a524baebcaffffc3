"""Stored numbers of an adaptor's taps: read into a buffer, and made float32 on the device that trains.

Codes and halves travel and stay as they are stored; they become float32 last, into one buffer, a few rows at a time so
that a row is still in the cache for the next operation. On the CPU the result has the bits of `StoredArray.read_into`,
unless a compensation is applied with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, overload

import numpy as np
import torch

from coldtap.adaptors.data.devices import to_device
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.stores import Store
from coldtap.stores.format.codes import Floats
from coldtap.stores.format.compensation import TapMaps
from coldtap.stores.reading.array import OutlyingValues

type Rows = np.ndarray[Any, np.dtype[np.int64]]

# bfloat16 is stored as its bits, in a dtype that numpy has.
TORCH_DTYPES = {"<f4": torch.float32, "<f2": torch.float16, "<u2": torch.bfloat16, "|i1": torch.int8}
PART_VALUES = 2**19  # restored at once on the CPU: 2 MB of float32, which stay in a core's cache


@dataclass(frozen=True, slots=True)
class StoredBuffer:
    """One memory for rows as they are stored, as numpy (which the reader fills) and as torch (which moves it)."""

    array: np.ndarray[Any, Any]
    tensor: torch.Tensor


class StoredTaps:
    """The taps of a stored array that an adaptor reads, as stored numbers.

    Attributes:
        row_shape: Shape of one row.
        dtype: Their dtype in torch.
        bytes_per_row: Stored bytes of a row, without outlying values.
    """

    def __init__(self, store: Store, spec: FeatureSpec, maps: TapMaps | None = None) -> None:
        """Hold the array; `maps` are of the taps of `spec`, and are applied to what is restored."""
        self._array, self._maps = store.arrays[spec.array], maps
        self._taps = spec.taps if self._array.spec.gathered_as.has_tap_axis else None
        self.row_shape = spec.row_shape
        self.dtype = TORCH_DTYPES[self._array.spec.dtype.str]
        self.bytes_per_row = prod(spec.row_shape) * self.dtype.itemsize

    def buffer(self, n_rows: int, *, pinned: bool = False) -> StoredBuffer:
        """Return room for some rows; pinned memory is what a GPU copies from without waiting."""
        tensor = torch.empty(n_rows, *self.row_shape, dtype=self.dtype, pin_memory=pinned)
        bits = tensor.view(torch.uint16) if self.dtype == torch.bfloat16 else tensor
        return StoredBuffer(bits.numpy(), tensor)

    def read(self, out: np.ndarray[Any, Any], rows: Rows) -> OutlyingValues:
        """Read rows into a part of a buffer; return the values that its codes do not hold."""
        outlying = self._array.read_stored_into(out, rows, self._taps)
        return outlying if self._maps is None else self._mapped(outlying, self._maps)

    def _mapped(self, outlying: OutlyingValues, maps: TapMaps) -> OutlyingValues:
        """Outlying values are put in after all else, so that they take their map here."""
        n_taps, n_channels = maps.scale.shape
        tap = outlying.position // prod(self.row_shape[-2:]) % n_taps
        channel = outlying.position % n_channels
        value = maps.scale[tap, channel] * outlying.value + maps.offset[tap, channel]
        return OutlyingValues(position=outlying.position, value=value)

    def will_need(self, rows: Rows) -> None:
        """Tell the kernel that these rows are read next."""
        self._array.will_need(rows, self._taps)

    def factors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return what stored numbers are multiplied with, and what is added then; None where there is nothing to do.

        Both broadcast over a row.
        """
        scale, offset = self._stored_factors()
        if self._maps is not None:
            scale, offset = _folded(scale, offset, self._maps)
        return over_row(scale, self.row_shape), over_row(offset, self.row_shape)

    def _stored_factors(self) -> tuple[Floats | None, Floats | None]:
        """Scale and offset (tap, channel) that the tier has by itself."""
        scaling = self._array.scaling_of(self._taps)
        exponents = self._array.exponents_of(self._taps)
        if scaling is not None:
            return scaling.scale, scaling.offset
        # Powers of two: a product is exact, as is `ldexp`.
        return (np.ldexp(np.float32(1), exponents)[:, None], None) if any(exponents) else (None, None)


def _folded(scale: Floats | None, offset: Floats | None, maps: TapMaps) -> tuple[Floats, Floats]:
    """What restores stored numbers and maps them at once: rounded to float32 once."""
    wide = maps.scale.astype(np.float64)
    one, shift = (1.0 if scale is None else scale), (0.0 if offset is None else offset)
    return (wide * one).astype(np.float32), (wide * shift + maps.offset).astype(np.float32)


@overload
def over_row(values: Floats, row_shape: tuple[int, ...]) -> torch.Tensor: ...
@overload
def over_row(values: None, row_shape: tuple[int, ...]) -> None: ...
def over_row(values: Floats | None, row_shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return (tap, channel) as (tap, 1, channel); for `sum`, which has no tap axis, as (1, channel)."""
    return None if values is None else torch.from_numpy(values.reshape(*row_shape[:-2], 1, values.shape[-1]))


class Restorer:
    """Makes stored numbers float32 on a device; what it returns is valid until it is called again."""

    def __init__(self, taps: StoredTaps, device: torch.device, batch_size: int) -> None:
        scale, offset = taps.factors()
        self._scale = None if scale is None else scale.to(device)
        self._offset = None if offset is None else offset.to(device)
        self._as_stored = scale is None and offset is None and taps.dtype == torch.float32
        on_cpu = device.type == "cpu"
        self._part = max(1, PART_VALUES // prod(taps.row_shape)) if on_cpu else batch_size
        self._out = torch.empty(batch_size, *taps.row_shape, device=device)
        self._gathered = torch.empty(min(self._part, batch_size), *taps.row_shape, dtype=taps.dtype, device=device)

    def rows(self, stored: torch.Tensor, outlying: OutlyingValues) -> torch.Tensor:
        """Restore every row of `stored`: float32 of its shape."""
        if self._as_stored:
            return stored
        for part in self._parts(len(stored)):
            self._restore(self._out[part], stored[part])
        return self._with(outlying, len(stored))

    def chosen(self, stored: torch.Tensor, index: torch.Tensor, outlying: OutlyingValues) -> torch.Tensor:
        """Restore the rows of `stored` at `index` (on its device); outlying values are by place in the result."""
        if self._as_stored:
            return torch.index_select(stored, 0, index, out=self._out[: len(index)])
        for part in self._parts(len(index)):
            out = self._out[part]
            self._restore(out, torch.index_select(stored, 0, index[part], out=self._gathered[: len(out)]))
        return self._with(outlying, len(index))

    def _parts(self, n_rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self._part, n_rows)) for start in range(0, n_rows, self._part))

    def _restore(self, out: torch.Tensor, stored: torch.Tensor) -> None:
        out.copy_(stored)
        # Two roundings, as the formula of the format has them: `addcmul` would round once where the CPU fuses.
        if self._scale is not None:
            out.mul_(self._scale)
        if self._offset is not None:
            out.add_(self._offset)

    def _with(self, outlying: OutlyingValues, n_rows: int) -> torch.Tensor:
        out = self._out[:n_rows]
        if len(outlying.position) == 0:
            return out
        if out.device.type == "cpu":
            out.view(-1).numpy()[outlying.position] = outlying.value
        else:
            place = to_device(torch.from_numpy(outlying.position), out.device)
            out.view(-1)[place] = to_device(torch.from_numpy(outlying.value), out.device)
        return out
