"""How a tier keeps numbers, in both directions.

`float16` holds x / 2^e with one exact exponent e a tap; `bfloat16` the upper half of a float32's bits in uint16;
`float32` x itself; `int8` error-bounded codes (`codes.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coldtap.stores.format.arrays import Tier
from coldtap.stores.format.codes import ErrorBound, Scaling, restore_codes

FLOAT16_MAX = 65504.0
HEADROOM = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What turns an array's stored numbers into values; fixed for good when the store is begun.

    Attributes:
        exponents: e of each tap; zeros outside float16.
        scaling: of the codes; None outside int8.
    """

    exponents: tuple[int, ...]
    scaling: Scaling | None = None


def restore(
    stored: np.ndarray[Any, Any], out: np.ndarray[Any, np.dtype[np.float32]], tier: Tier, numbers: Numbers
) -> None:
    """Write the float32 values of stored numbers into `out`; escapes are not put in.

    Args:
        stored: (row, tap, token, channel) in the tier's dtype.
        out: the same shape, float32.
        tier: how the numbers are kept.
        numbers: of the taps of `stored`.
    """
    if tier == "int8":
        assert numbers.scaling is not None
        restore_codes(stored, out, numbers.scaling)
    elif tier == "bfloat16":
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        np.copyto(out, stored)
    for tap, exponent in enumerate(numbers.exponents):
        if exponent:
            np.ldexp(out[:, tap], exponent, out=out[:, tap])


def to_float(
    values: np.ndarray[Any, np.dtype[np.float32]], tier: Tier, exponents: Sequence[int]
) -> np.ndarray[Any, Any]:
    """The stored numbers of a float tier; the pipeline does the same on its device, bit for bit.

    Args:
        values: (row, tap, token, channel).
        tier: `float32`, `float16` or `bfloat16`.
        exponents: e of each tap.
    """
    if tier == "bfloat16":
        bits: np.ndarray[Any, Any] = values.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return (bits >> np.uint32(16)).astype("<u2")
    if tier == "float16":
        scaled: np.ndarray[Any, Any] = values
        if any(exponents):  # rarely, and ldexp costs more than all else here
            scaled = np.ldexp(values, -np.array(exponents, np.int32)[:, None, None])
        return scaled.astype("<f2")
    return values


def scales_rule(bound: ErrorBound | None, calibration_rows: int) -> dict[str, Any]:
    """The rule that fixes a store's scales, as its recipe keeps it: codes by a bound, float16 by headroom."""
    powers = {"headroom": HEADROOM, "calibration_rows": calibration_rows}
    return {"rule": "power of two", **powers} if bound is None else {**bound.to_dict(), **powers}


def float16_exponent(largest: float) -> int:
    """The smallest e ≥ 0 that leaves 16 × headroom: largest / 2^e ≤ 65,504 / 16.

    Args:
        largest: the largest |x| of a tap over the calibration rows.
    """
    limit = FLOAT16_MAX / HEADROOM
    return 0 if largest <= limit else int(np.ceil(np.log2(largest / limit)))
