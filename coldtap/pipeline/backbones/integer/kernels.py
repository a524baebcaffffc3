"""Kernels: ways to run an integer product (`kernel_choice.py` says which).

`onednn` is oneDNN's quantised linear and convolution (VNNI on x86), with scales, bias and GELU in the same pass.
`int_mm` is `torch._int_mm`, on CUDA and where oneDNN is not. `float` restores floats and multiplies those: the
reference, which runs anywhere and is no faster than an unquantised backbone.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from coldtap.pipeline.backbones.integer.product import GeluInto, Product

type Run = Callable[[Tensor], Tensor]


class Kernel(Protocol):
    """A way to run a product."""

    name: str

    def __hash__(self) -> int: ...

    def prepare(self, product: Product) -> Run:
        """Return what takes codes, uint8 (…, in) or (batch, in, height, width), to y or the codes of what follows."""


class FloatKernel:
    """Restores the floats that the codes stand for, and multiplies them in float32."""

    name = "float"

    def prepare(self, product: Product) -> Run:
        """Prepare, as `Kernel`."""
        weight = product.codes.float() * product.scale.reshape(-1, *(1,) * (product.codes.ndim - 1))
        window = product.window

        def run(codes: Tensor) -> Tensor:
            values = product.input.restore(codes)
            if window is None:
                return follow(functional.linear(values, weight, product.bias), product.then)
            y = functional.conv2d(values, weight, product.bias, window.stride, window.padding, window.dilation)
            return follow(y, product.then)

        return run


def follow(y: Tensor, then: GeluInto | None) -> Tensor:
    """Return y, or the codes of what follows."""
    if then is None:
        return y
    return then.range.quantise(functional.gelu(y, approximate=then.approximate), then.largest)


class OneDnnKernel:
    """oneDNN, through the operators that PyTorch's own quantisation compiles to; CPU only."""

    name = "onednn"

    def prepare(self, product: Product) -> Run:
        """Prepare, as `Kernel`."""
        ops, window = torch.ops.onednn, product.window
        x, then = product.input, product.then
        zeros = torch.zeros(len(product.codes), dtype=torch.int32)
        after: tuple[Any, ...]
        if then is None:
            after = (1.0, 0, torch.float32, "none", [], "")
        else:
            after = (then.range.scale, then.range.zero, torch.uint8, "gelu", [], then.approximate)
        largest = 255 if then is None else then.largest
        if window is None:
            packed = ops.qlinear_prepack(product.codes.contiguous(), None)

            def run(codes: Tensor) -> Tensor:
                y: Tensor = ops.qlinear_pointwise(
                    codes, x.scale, x.zero, packed, product.scale, zeros, product.bias, *after
                )
                return y if largest == 255 else y.clamp_(max=largest)

            return run
        assert then is None, "convolutions are followed by nothing"
        geometry = [*map(list, (window.stride, window.padding, window.dilation)), 1]
        packed = ops.qconv_prepack(product.codes, product.scale, x.scale, x.zero, *geometry, None)

        def convolve(codes: Tensor) -> Tensor:
            y: Tensor = ops.qconv2d_pointwise(
                codes, x.scale, x.zero, packed, product.scale, zeros, product.bias, *geometry, *after
            )
            return y

        return convolve


class IntMmKernel:
    """`torch._int_mm`: signed codes, products summed in int32; the zero point comes in by the sums of the weights."""

    name = "int_mm"

    def prepare(self, product: Product) -> Run:
        """Prepare, as `Kernel`."""
        n_out = len(product.codes)
        weight = product.codes.reshape(n_out, -1).t()  # (in, out), column-major as cuBLAS wants it
        k = weight.shape[0]
        # cuBLAS takes multiples of eight; a code of zero adds nothing.
        weight = functional.pad(weight.t(), (0, -k % 8, 0, -n_out % 8)).contiguous().t()
        shift = (128 - product.input.zero) * weight.sum(0, dtype=torch.int32)
        scale, window = product.input.scale * product.scale, product.window

        def run(codes: Tensor) -> Tensor:
            rows, shape = (codes, codes.shape[:-1]) if window is None else _patches(codes, product)
            signed = (rows.reshape(-1, k).to(torch.int16) - 128).to(torch.int8)
            n_rows = len(signed)
            signed = functional.pad(signed, (0, -k % 8, 0, max(0, 17 - n_rows)))  # cuBLAS takes more than 16 rows
            y = (torch._int_mm(signed, weight) + shift)[:n_rows, :n_out].float() * scale
            y = (y if product.bias is None else y + product.bias).reshape(*shape, n_out)
            return follow(y if window is None else y.permute(0, 3, 1, 2), product.then)

        return run


def _patches(codes: Tensor, product: Product) -> tuple[Tensor, tuple[int, ...]]:
    """What each pixel of the output sees, (batch, height, width, in · kernel), and those first three sizes."""
    window = product.window
    assert window is not None
    (top, left), (down, right), (high, wide) = window.padding, window.stride, window.dilation
    codes = functional.pad(codes, (left, left, top, top), value=product.input.zero)
    height, width = product.codes.shape[2:]
    seen = codes.unfold(2, (height - 1) * high + 1, down).unfold(3, (width - 1) * wide + 1, right)
    seen = seen[..., ::high, ::wide].permute(0, 2, 3, 1, 4, 5)
    return seen.reshape(*seen.shape[:3], -1), tuple(seen.shape[:3])
