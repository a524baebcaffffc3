"""Tiers: how the numbers of a store are kept, in both directions.

`float32` holds x itself; `float16` x / 2^e with one exact exponent e per tap; `bfloat16` the upper half of a float32's
bits in uint16; `int8` error-bounded codes (`codes.py`). The pipeline encodes on its device, bit for bit as here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from coldtap.stores.format.codes import (
    ABSENT_CODE,
    DEFAULT_SNR_DB,
    ErrorBound,
    Escapes,
    Floats,
    Scaling,
    encode,
    restore_codes,
)

type TierName = Literal["float32", "float16", "bfloat16", "int8"]
type Layout = Literal["fast", "compact"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout.__value__)

FLOAT16_MAX = 65504.0
HEADROOM = 16.0

type Stored = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What turns an array's stored numbers into values; fixed for good when the store is begun.

    Attributes:
        exponents: e of each tap; zeros outside float16.
        scaling: of the codes; None outside int8.
    """

    exponents: tuple[int, ...]
    scaling: Scaling | None = None


class Tier:
    """One way to keep float32 values; this one keeps them as they are.

    Attributes:
        name: what users and recipes call it.
        dtype: of the stored numbers, as numpy writes it (zarr 3.4 has no bfloat16: its bits are kept in uint16).
        fill_value: what a missing chunk (an absent row) reads as in any Zarr reader: never zeros, and no value has it.
        layouts: those allowed, the default first.
        is_exact: every float32 comes back with its bits.
        is_coded: it has a bound of errors, a scaling per tap and channel, and escapes.
        calibration_rows: rows that fix its scales; variances need more of them than a largest value (docs/log.md).
    """

    name: TierName = "float32"
    dtype = "<f4"
    fill_value: float | int = float("nan")
    layouts: tuple[Layout, ...] = ("fast",)
    is_exact = False
    is_coded = False
    calibration_rows = 64

    @property
    def tier_of_pooled(self) -> TierName:
        """The tier in which `pooled` is kept beside it."""
        return self.name

    def choose_bound(self, bound: ErrorBound | None) -> ErrorBound | None:
        """Return the bound of errors that holds where the user asks for this one; None where it has none."""
        return None

    def exponent(self, largest: float) -> int:
        """Return e of a tap whose largest |x| over the calibration rows is `largest`."""
        return 0

    def limit(self, exponent: int) -> float:
        """Return the largest |x| that can be kept."""
        return float("inf")

    def encode(self, values: Floats, numbers: Numbers) -> tuple[Stored, Escapes | None]:
        """Return stored numbers (row, tap, token, channel) of values of that shape, and what they do not hold."""
        return values, None

    def restore(self, stored: Stored, out: Floats, numbers: Numbers) -> None:
        """Write the values of stored numbers into `out`; escapes are not put in.

        Args:
            stored: (row, tap, token, channel) in the tier's dtype.
            out: the same shape, float32.
            numbers: of the taps of `stored`.
        """
        self._widen(stored, out, numbers)
        for tap, exponent in enumerate(numbers.exponents):
            if exponent:
                np.ldexp(out[:, tap], exponent, out=out[:, tap])

    def _widen(self, stored: Stored, out: Floats, numbers: Numbers) -> None:
        """Write float32 numbers whose exponents are not applied yet."""
        np.copyto(out, stored)


class _Float32(Tier):
    is_exact = True


class _Float16(Tier):
    name: TierName = "float16"
    dtype = "<f2"

    def exponent(self, largest: float) -> int:
        return float16_exponent(largest)

    def limit(self, exponent: int) -> float:
        return FLOAT16_MAX * 2.0**exponent

    def encode(self, values: Floats, numbers: Numbers) -> tuple[Stored, Escapes | None]:
        scaled: Stored = values
        if any(numbers.exponents):  # rarely, and ldexp costs more than all else here
            scaled = np.ldexp(values, -np.array(numbers.exponents, np.int32)[:, None, None])
        return scaled.astype("<f2"), None


class _Bfloat16(Tier):
    name: TierName = "bfloat16"
    dtype = "<u2"
    fill_value = 0xFFFF  # a NaN

    def encode(self, values: Floats, numbers: Numbers) -> tuple[Stored, Escapes | None]:
        bits: Stored = values.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return (bits >> np.uint32(16)).astype("<u2"), None

    def _widen(self, stored: Stored, out: Floats, numbers: Numbers) -> None:
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")


class _Int8(Tier):
    name: TierName = "int8"
    dtype = "|i1"
    fill_value = ABSENT_CODE
    layouts: tuple[Layout, ...] = ("compact", "fast")
    is_coded = True
    calibration_rows = 128

    @property
    def tier_of_pooled(self) -> TierName:
        return "float16"

    def choose_bound(self, bound: ErrorBound | None) -> ErrorBound | None:
        return bound or ErrorBound(snr_db=DEFAULT_SNR_DB)

    def encode(self, values: Floats, numbers: Numbers) -> tuple[Stored, Escapes | None]:
        assert numbers.scaling is not None
        encoded = encode(values, numbers.scaling)
        return encoded.codes, encoded.escapes

    def _widen(self, stored: Stored, out: Floats, numbers: Numbers) -> None:
        assert numbers.scaling is not None
        restore_codes(stored, out, numbers.scaling)


TIERS: Mapping[str, Tier] = {tier.name: tier for tier in (_Float32(), _Float16(), _Bfloat16(), _Int8())}


def scales_rule(bound: ErrorBound | None, calibration_rows: int) -> dict[str, Any]:
    """Return the rule that fixes a store's scales, as its recipe keeps it: codes by a bound, float16 by headroom."""
    powers = {"headroom": HEADROOM, "calibration_rows": calibration_rows}
    return {"rule": "power of two", **powers} if bound is None else {**bound.to_dict(), **powers}


def float16_exponent(largest: float) -> int:
    """Return the smallest e ≥ 0 that leaves 16 × headroom: largest / 2^e ≤ 65,504 / 16.

    Args:
        largest: the largest |x| of a tap over the calibration rows.
    """
    limit = FLOAT16_MAX / HEADROOM
    return 0 if largest <= limit else int(np.ceil(np.log2(largest / limit)))
