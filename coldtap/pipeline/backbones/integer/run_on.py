"""Putting a quantised model on a kernel, with what can be fused fused."""

from typing import Any

from timm.layers import Mlp
from torch import nn

from coldtap.pipeline.backbones.integer.kernels import Kernel
from coldtap.pipeline.backbones.integer.layers import QuantisedLayer, quantised_layers
from coldtap.pipeline.backbones.integer.product import GeluInto


def run_on(model: nn.Module, kernel: Kernel) -> None:
    """Run all quantised layers of a model on a kernel.

    Between the two linears of an MLP the GELU joins the first one, which then hands integers to the second: the widest
    activation of a block is never float. The model is changed for good; fit compensation before.
    """
    for layer in quantised_layers(model).values():
        layer.use(kernel)
    for module in model.modules():
        if type(module) is Mlp and _is_plain(module):
            first: Any = module.fc1
            second: Any = module.fc2
            gelu: Any = module.act
            then = GeluInto(approximate=gelu.approximate, range=second.input, largest=second.scheme.largest_activation)
            first.use(kernel, then=then)
            module.act = nn.Identity()


def _is_plain(mlp: Mlp) -> bool:
    """Whether nothing but a GELU stands between its two layers."""
    linears = all(isinstance(layer, QuantisedLayer) and layer.window is None for layer in (mlp.fc1, mlp.fc2))
    return linears and type(mlp.act) is nn.GELU and isinstance(mlp.norm, nn.Identity)
