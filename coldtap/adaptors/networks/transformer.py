"""A plain pre-norm transformer block, for the adaptors whose papers use one.

torch's own `nn.TransformerEncoderLayer` is not used: without gradients it takes a fused path whose numbers differ in
the last bits from those of training, and neither that path nor `scaled_dot_product_attention` can be batched by
`torch.func.vmap` on a CPU, so that trials could not share one computation (docs/methods.md).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """One block as in ViT: x + attention(LN(x)), then x + MLP(LN(x)), with GELU and biases everywhere.

    Args:
        width: Channels in and out, divisible by `heads`.
        heads: Attention heads.
        hidden: Width inside the MLP.
        dropout: Probability, on the output of the attention and of the MLP.
    """

    def __init__(self, *, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix and transform tokens (batch, token, width); return the same shape."""
        x = x + self._drop(self.out(self._attend(self.qkv(self.attention_norm(x)))))
        out: torch.Tensor = x + self._drop(self.mlp(self.mlp_norm(x)))
        return out

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        # (3, batch, head, token, width / heads)
        q, k, v = qkv.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q / math.sqrt(width // self.heads)) @ k.transpose(-2, -1)
        mixed: torch.Tensor = torch.softmax(scores, dim=-1) @ v
        return mixed.transpose(1, 2).reshape(batch, tokens, width)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)


def block_parameters(*, width: int, hidden: int) -> int:
    """Return the parameters of one block of width w and hidden width h: 4w² + 2wh + 9w + h.

    They are 4w² + 4w for the attention, 2wh + h + w for the MLP, and 4w for the two norms.
    """
    return 4 * width * width + 2 * width * hidden + 9 * width + hidden
