"""One range for all channels behind a layer norm, by moving what differs into the norm and the layer that reads it.

Channels of a normed activation have ranges that differ by orders of magnitude. With r1 = s / mean(s) and
r2 = z − mean(z) of their own scales s and zero points z, the norm's weight and bias become γ / r1 and
(β + s · r2) / r1, and the layer's weight r1 · W, its bias b − W (s · r2): the same function, whose activation has
one range. Source: RepQ-ViT (arXiv 2212.08254), section 3.2; signs are of codes round(x / s) + z.
"""

import torch
from torch import Tensor, nn

# Channels whose scale is a smaller part of the mean one are treated as if they had this part.
SMALLEST = 1e-3


def reparameterise(norm: nn.LayerNorm, layer: nn.Linear, rows: Tensor, largest: int) -> Tensor:
    """Rewrite a norm and the only layer that reads it, in place.

    Args:
        norm: with weight and bias.
        layer: its reader; one without a bias gets one.
        rows: what the layer was seen to read, (row, channel).
        largest: code of the activation.

    Returns:
        What the layer reads now, (row, channel).
    """
    low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
    scale = (high - low) / largest
    scale = scale.clamp(min=SMALLEST * float(scale.mean()) or 1.0)
    zero = (-low / scale).round().clamp(0, largest)
    ratio = (scale / scale.mean()).to(layer.weight)
    shift = (scale * (zero - zero.mean().round())).to(layer.weight)
    with torch.no_grad():
        moved = layer.weight @ shift
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(moved))
        layer.bias.sub_(moved)
        layer.weight.mul_(ratio)
        if norm.bias is None:
            norm.bias = nn.Parameter(torch.zeros_like(norm.weight))
        norm.bias.copy_((norm.bias + shift) / ratio)
        norm.weight.div_(ratio)
    return (rows + shift.to(rows)) / ratio.to(rows)
