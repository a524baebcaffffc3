"""A quantised layer as ONNX nodes: QuantizeLinear and DequantizeLinear before a MatMul or a Conv.

A runtime that knows the form multiplies integers; one that does not restores floats and gives the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from coldtap.pipeline.backbones.integer.product import Product

# Runtimes sum in int32; this leaves as much again for the products.
LARGEST_BIAS = 2**30


class OnnxLayer(nn.Module):
    """Stands in for a `QuantisedLayer` while torch's exporter traces a model; it computes nothing by itself.

    Compensation comes in with the product: it is in the weight's scale and in the bias, and adds no node. The product
    is of eight bits, and nothing follows it.
    """

    _codes: Tensor
    _scale: Tensor
    _bias: Tensor | None
    _input_scale: Tensor
    _input_zero: Tensor

    def __init__(self, product: Product) -> None:
        super().__init__()
        self._window = product.window
        codes, scale = product.codes, product.scale
        if product.window is None:
            codes = codes.t().contiguous()  # runtimes know MatMul, and no transpose before it
        elif product.bias is not None:
            codes, scale = _make_room(codes, scale, product.bias, product.input.scale)
        self.register_buffer("_codes", codes)
        self.register_buffer("_scale", scale)
        self.register_buffer("_bias", product.bias)
        self.register_buffer("_input_scale", torch.tensor(product.input.scale))
        self.register_buffer("_input_zero", torch.tensor(product.input.zero, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Run, with the shapes of a `QuantisedLayer`."""
        range_ = self._input_scale, self._input_zero
        codes = torch.onnx.ops.symbolic("QuantizeLinear", (x, *range_), dtype=torch.uint8, shape=x.shape)
        values = _dequantise((codes, *range_), axis=1)
        if self._window is None:
            y = values @ _dequantise((self._codes, self._scale), axis=1)
            return y if self._bias is None else y + self._bias
        weight = _dequantise((self._codes, self._scale), axis=0)
        window = self._window
        return functional.conv2d(values, weight, self._bias, window.stride, window.padding, window.dilation)


def _dequantise(inputs: Sequence[Tensor], *, axis: int) -> Tensor:
    """Floats of codes, of their scale or of scales along an axis, and where it is not 0 of their zero point."""
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, {"axis": axis}, dtype=torch.float32, shape=inputs[0].shape
    )


def _make_room(codes: Tensor, scale: Tensor, bias: Tensor, input_scale: float) -> tuple[Tensor, Tensor]:
    """Codes and scales of a convolution's weight under which its bias fits the integers of a runtime.

    onnxruntime fuses a convolution's bias as int32 in units of input scale · weight scale, and lets it overflow. A
    channel whose weights are next to nothing beside its bias (dead ones, once their norm is folded) gets a coarser
    scale: at most 2^-23 of its bias per product.
    """
    least = bias.abs() / (input_scale * LARGEST_BIAS)
    # Without weights any scale is right, and the finest keeps the bias.
    wanted = torch.where(codes.flatten(1).any(1), scale, 0).maximum(least)
    wanted = torch.where(wanted > 0, wanted, scale)
    kept = (scale / wanted).clamp(max=1).reshape(-1, *(1,) * (codes.ndim - 1))
    return (codes * kept).round().to(torch.int8), wanted
