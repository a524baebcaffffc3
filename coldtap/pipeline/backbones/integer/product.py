"""One integer product: what a kernel is given to run a quantised linear or convolution."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from coldtap.pipeline.backbones.integer.ranges import ActivationRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Geometry of a convolution, each (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeluInto:
    """A GELU whose output is quantised at once, for the next product.

    Attributes:
        approximate: of `torch.nn.functional.gelu`.
        range: of the codes.
        largest: code.
    """

    approximate: Literal["none", "tanh"]
    range: ActivationRange
    largest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """y = input.scale · scale · (sum of (x − input.zero) · codes) + bias, by output channel.

    Attributes:
        codes: integer weights, int8 (out, in) or (out, in, height, width).
        scale: (out,) float32; compensation is folded in.
        bias: (out,) float32, or None.
        input: scale and zero point of the input's codes.
        window: of a convolution; None for a linear.
        then: what follows, or None where y is wanted.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    input: ActivationRange
    window: Window | None
    then: GeluInto | None
