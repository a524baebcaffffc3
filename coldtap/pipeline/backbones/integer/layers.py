"""Quantised layers: integer weights, inputs quantised as they come, and channel-wise compensation."""

from typing import Self

import torch
from torch import Tensor, nn

from coldtap.pipeline.backbones.integer.kernels import FloatKernel, Kernel, Run
from coldtap.pipeline.backbones.integer.product import GeluInto, Product, Window
from coldtap.pipeline.backbones.integer.ranges import ActivationRange, RangeMethod, weight_codes, weight_scales
from coldtap.pipeline.backbones.integer.scheme import Scheme
from coldtap.stores.compensation.channel_affine import ChannelAffine


class QuantisedLayer(nn.Module):
    """A linear or a convolution of integers: float in, float out, or codes where a neighbour is fused.

    It stands in for the `nn.Linear` or `nn.Conv2d` that it was made of, at the same place in the model. Compensation is
    folded: it changes the scale and the bias of the product and nothing else.

    Attributes:
        codes: int8 (out, in) or (out, in, height, width).
        weight_scale: (out,) float32.
        bias: (out,) float32, or None.
        input: range of the input.
        scheme: its bits.
        window: of a convolution; None for a linear.
        affine: compensation of its output, or None.
    """

    def __init__(
        self,
        *,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input: ActivationRange,  # the word of the field
        scheme: Scheme,
        window: Window | None,
    ) -> None:
        super().__init__()
        self.codes, self.weight_scale, self.bias = codes, weight_scale, bias
        self.input, self.scheme, self.window = input, scheme, window
        self.affine: ChannelAffine | None = None
        self._kernel: Kernel = FloatKernel()
        self._then: GeluInto | None = None
        self._run: Run | None = None

    @classmethod
    def of(
        cls,
        layer: nn.Linear | nn.Conv2d,
        scheme: Scheme,
        input: ActivationRange,
        method: RangeMethod,
    ) -> Self:
        """Quantise the weights of a float layer."""
        weight = layer.weight.detach()
        flat = weight.reshape(len(weight), -1)
        scales = weight_scales(flat, method, scheme.largest_weight)
        return cls(
            codes=weight_codes(flat, scales, scheme.largest_weight).reshape(weight.shape),
            weight_scale=scales,
            bias=None if layer.bias is None else layer.bias.detach().float(),
            input=input,
            scheme=scheme,
            window=window_of(layer),
        )

    def compensate(self, affine: ChannelAffine) -> None:
        """Take on a compensation (out,) in place of any earlier one."""
        self.affine, self._run = affine, None

    def use(self, kernel: Kernel, *, then: GeluInto | None = None) -> None:
        """Run on a kernel; with `then` the output is the next layer's codes."""
        self._kernel, self._then, self._run = kernel, then, None

    def product(self) -> Product:
        """Return its integer product, compensation folded in."""
        scale, bias = self.weight_scale, self.bias
        if self.affine is not None:
            # In float64, and rounded once.
            alpha, beta = (torch.from_numpy(part).to(scale.device) for part in (self.affine.scale, self.affine.offset))
            bias = (beta if bias is None else alpha * bias + beta).float()
            scale = (alpha * scale).float()
        return Product(codes=self.codes, scale=scale, bias=bias, input=self.input, window=self.window, then=self._then)

    def quantise(self, values: Tensor) -> Tensor:
        """Quantise an input to its codes."""
        return self.input.quantise(values, self.scheme.largest_activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out), or (batch, in, height, width) to (batch, out, height, width); x may be codes."""
        if self._run is None:
            self._run = self._kernel.prepare(self.product())
        return self._run(x if x.dtype == torch.uint8 else self.quantise(x))

    def _apply(self, fn, recurse: bool = True) -> Self:  # type: ignore[no-untyped-def]
        """Move it to a device."""
        self.codes, self.weight_scale = fn(self.codes), fn(self.weight_scale)
        self.bias = None if self.bias is None else fn(self.bias)
        self._run = None
        return self


def window_of(layer: nn.Linear | nn.Conv2d) -> Window | None:
    """Return the geometry of a convolution; None of a linear."""
    if isinstance(layer, nn.Linear):
        return None
    assert not isinstance(layer.padding, str)
    stride, padding, dilation = ((int(pair[0]), int(pair[1])) for pair in (layer.stride, layer.padding, layer.dilation))
    return Window(stride=stride, padding=padding, dilation=dilation)


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLayer]:
    """Return all quantised layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLayer)}
