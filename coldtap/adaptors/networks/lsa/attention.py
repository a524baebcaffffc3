"""Low-rank self-attention (LSA), the module that LAST and MIST stack.

From LAST, arXiv 2402.04009: attention whose projections have rank r ≪ d, a residual, and no feed-forward part.
The paper's text was not at hand; `docs/methods.md` says what is known, and what is a switch here and why.
"""

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from coldtap.errors import OptionError

type Init = Literal["zero-up", "random"]


class LowRankAttention(nn.Module):
    """One LSA module of LAST (arXiv 2402.04009): f(X) = X + s · softmax(Q Kᵀ / √(r/h)) V A_O.

    Q, K, V = LN(X) A_Q, LN(X) A_K, LN(X) A_V with A of shape (d, r), and A_O of shape (r, d).
    Inferred, hence arguments: heads h (1), bias (none), dropout and drop-path (0), scale s (1), and the start:
    `zero-up` sets A_O to zero, so that a fresh module passes X through unchanged.
    """

    def __init__(
        self,
        *,
        channels: int,
        rank: int = 4,
        heads: int = 1,
        init: Init = "zero-up",
        norm: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if rank % heads:
            raise OptionError(f"rank={rank} must be divisible by heads={heads}")
        self.rank, self.heads, self.dropout, self.drop_path, self.scale = rank, heads, dropout, drop_path, scale
        self.norm = nn.LayerNorm(channels, eps=1e-6) if norm else nn.Identity()
        # One matrix for Q, K and V: one pass over the tokens instead of three.
        self.down = nn.Parameter(torch.empty(channels, 3 * rank))  # (channel, q|k|v)
        self.up = nn.Parameter(torch.empty(rank, channels))
        self.down_bias = nn.Parameter(torch.zeros(3 * rank)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.kaiming_uniform_(self.down.T, a=math.sqrt(5))  # as nn.Linear(channels, 3 · rank) starts
        if init == "zero-up":
            nn.init.zeros_(self.up)
        else:
            nn.init.kaiming_uniform_(self.up.T, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the low-rank attention of the tokens to them.

        Args:
            x: (batch, token, channel).

        Returns:
            (batch, token, channel).
        """
        qkv = self.norm(x) @ self.down
        if self.down_bias is not None:
            qkv = qkv + self.down_bias
        z = self._attend(qkv)
        if (noise := self.draw_noise(z)) is not None:
            z = z * noise
        # addmm adds the residual inside the product, which saves a pass over the tokens (docs/methods.md).
        mixed = torch.addmm(x.reshape(-1, x.shape[-1]), z.reshape(-1, self.rank), self.up, alpha=self.scale)
        if self.up_bias is not None:
            mixed = mixed + self.scale * self.up_bias
        return mixed.view(x.shape)

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """softmax(Q Kᵀ / √(r/h)) V of (batch, token, 3 · rank), as (batch, token, rank)."""
        batch, tokens, _ = qkv.shape
        width = self.rank // self.heads
        q, k, v = (self._split_heads(part, width) for part in qkv.split(self.rank, dim=-1))
        # Written out, since scaled_dot_product_attention is slower at such widths (docs/methods.md). With beta=0
        # the first argument is never read.
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
        z = torch.bmm(torch.softmax(scores, dim=-1), v)
        if self.heads == 1:
            return z
        return z.view(batch, self.heads, tokens, width).transpose(1, 2).reshape(batch, tokens, self.rank)

    def _split_heads(self, part: torch.Tensor, width: int) -> torch.Tensor:
        """(batch, token, rank) as (batch · head, token, width)."""
        if self.heads == 1:
            return part
        batch, tokens, _ = part.shape
        return part.view(batch, tokens, self.heads, width).transpose(1, 2).reshape(-1, tokens, width)

    def draw_noise(self, z: torch.Tensor) -> torch.Tensor | None:
        """Draw what dropout and drop-path multiply Z by.

        Args:
            z: (batch, token, rank), of which only shape and type matter.

        Returns:
            (batch, token, rank), or (batch, 1, 1) with drop-path alone: it drops whole samples. None if nothing is
            dropped, in training or ever.
        """
        noise = None
        if self.dropout and self.training:
            noise = F.dropout(torch.ones_like(z), self.dropout)
        if self.drop_path and self.training:
            keep = 1 - self.drop_path
            kept = z.new_empty(z.shape[0], 1, 1).bernoulli_(keep) / keep
            noise = kept if noise is None else noise * kept
        return noise


def lsa_parameters(*, channels: int, rank: int, norm: bool = True, bias: bool = False) -> int:
    """Return the parameters of one LSA module: 4dr, 2d for its norm, 3r + d for biases.

    At d=768, r=4, 48 of them hold 663,552: one of several fits to the 0.66 M that are reported for LAST on ViT-B/16
    (docs/methods.md has the others).
    """
    return 4 * channels * rank + 2 * channels * norm + (3 * rank + channels) * bias
