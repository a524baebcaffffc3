"""From stored numbers back to float32: the inverse of how a tier keeps them.

`float16` holds x / 2^e with one exact exponent e a tap; `bfloat16` holds the upper half of a float32's bits
in uint16; `float32` holds x itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from coldtap.stores.arrays import Tier

FLOAT16_MAX = 65504.0
HEADROOM = 16.0


def restore(
    stored: np.ndarray[Any, Any],
    out: np.ndarray[Any, np.dtype[np.float32]],
    tier: Tier,
    exponents: Sequence[int],
) -> None:
    """Write the float32 values of stored numbers into `out`.

    Args:
        stored: (row, tap, …) in the tier's dtype.
        out: the same shape, float32.
        tier: how the numbers are kept.
        exponents: e of each tap of `stored`; all zero outside float16.
    """
    if tier == "bfloat16":
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        np.copyto(out, stored)
    for tap, exponent in enumerate(exponents):
        if exponent:
            np.ldexp(out[:, tap], exponent, out=out[:, tap])


def float16_exponent(largest: float) -> int:
    """The smallest e ≥ 0 that leaves 16 × headroom: largest / 2^e ≤ 65,504 / 16.

    Args:
        largest: the largest |x| of a tap over the calibration rows.
    """
    limit = FLOAT16_MAX / HEADROOM
    return 0 if largest <= limit else int(np.ceil(np.log2(largest / limit)))
