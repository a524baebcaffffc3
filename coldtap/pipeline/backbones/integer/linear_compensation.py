"""QwT's addition to a block: a linear map of its input, run beside it.

Source: arXiv 2411.13918 and its code: y = block(x) + x W + b with W in half precision; for a residual block W is a
grouped 1 × 1 convolution with the block's stride. The code rounds x to half too; here products and sums are float32,
because a residual stream can be larger than a half holds.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

WEIGHT_DTYPE = torch.float16


class LinearCompensation(nn.Module):
    """x W + b, added to what a block gives.

    Attributes:
        weight: (group, in, out) in float16, in and out of one group; ViT has one group.
        bias: (group · out,) in float32.
        stride: of the block, for maps.
    """

    weight: Tensor
    bias: Tensor
    stride: int

    def __init__(self, weight: Tensor, bias: Tensor, stride: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(WEIGHT_DTYPE))
        self.register_buffer("bias", bias.float())
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, token, in) to (batch, token, out), or maps (batch, in, height, width) to (batch, out, …)."""
        weight = self.weight.float()
        if x.ndim == 3:
            return x @ weight[0] + self.bias
        kernel = weight.transpose(1, 2).reshape(-1, weight.shape[1], 1, 1)
        added: Tensor = functional.conv2d(x, kernel, self.bias, stride=self.stride, groups=len(weight))
        return added


def add_to_block(block: nn.Module, compensation: LinearCompensation) -> None:
    """Add a compensation to a block's output; it becomes the block's submodule `qwt`."""
    block.add_module("qwt", compensation)
    block.register_forward_hook(_added)


def _added(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    compensated: Tensor = output + block.get_submodule("qwt")(inputs[0])
    return compensated
