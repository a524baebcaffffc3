"""The backbone's final norm as data: adaptors apply it without the backbone."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalNorm:
    """A frozen layer norm or RMS norm over channels.

    `weight` and `bias` are float32 of shape (channel,), or None where the norm has none.
    """

    kind: Literal["layer_norm", "rms_norm"]
    eps: float
    weight: np.ndarray[Any, np.dtype[np.float32]] | None
    bias: np.ndarray[Any, np.dtype[np.float32]] | None
