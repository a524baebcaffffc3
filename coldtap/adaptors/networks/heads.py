"""From tokens to logits: pooling, norm, and a linear classifier. Every adaptor ends in one of these."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

type Pool = Literal["patch-mean", "prefix", "both", "all", "tokens"]
type HeadNorm = Literal["backbone", "new", "none"]
type NormKind = Literal["layer_norm", "rms_norm"]
type NormAt = Literal["before", "after"]


class FrozenNorm(nn.Module):
    """The backbone's final norm, copied from the store and never trained.

    Its numbers are buffers, so that they travel in `adaptor.safetensors` and inference needs no store.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, channels: int, *, kind: NormKind, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the channels, the last axis of `x`."""
        if self.kind == "rms_norm":
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps) + self.bias
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def build_norm(norm: HeadNorm, *, channels: int, kind: NormKind = "layer_norm", eps: float = 1e-6) -> nn.Module:
    """Return a norm over the channels: the backbone's, of that kind and eps, a new one, or none."""
    if norm == "backbone":
        return FrozenNorm(channels, kind=kind, eps=eps)
    return nn.LayerNorm(channels, eps=1e-6) if norm == "new" else nn.Identity()


class ClassifierHead(nn.Module):
    """Pools tokens, normalises before or after pooling, and classifies.

    Pooling: `patch-mean`, `prefix` (the first prefix token, a class token where the backbone has one), `both` (the two
    side by side: 2 · channels into the classifier), `all` (the mean of every token) or `tokens` (none: each patch token
    is classified, for targets a token).
    """

    def __init__(
        self,
        *,
        channels: int,
        n_classes: int,
        tokens: int,
        prefix_tokens: int,
        pool: Pool = "patch-mean",
        norm: HeadNorm = "new",
        norm_at: NormAt = "after",
        backbone_norm: NormKind = "layer_norm",
        backbone_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.tokens, self.prefix_tokens, self.pool, self.norm_at = tokens, prefix_tokens, pool, norm_at
        self.norm = build_norm(norm, channels=channels, kind=backbone_norm, eps=backbone_norm_eps)
        self.classifier = nn.Linear(channels * (2 if pool == "both" else 1), n_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)  # timm's start of a new classifier
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify tokens (batch, token, channel); return logits (batch, class), or (batch, patch, class)."""
        if self.pool == "tokens":
            each: torch.Tensor = self.classifier(self.norm(x[:, self.prefix_tokens :]))
            return each
        if self.norm_at == "before":
            x = self.norm(x)
        patches = x[:, self.prefix_tokens :].mean(dim=1, keepdim=True)
        return self._classify(torch.cat([x[:, : self.prefix_tokens], patches], dim=1))

    def from_pooled(self, pooled: torch.Tensor) -> torch.Tensor:
        """Classify the `pooled` gather: (batch, prefix + 1, channel), the last position the patch mean.

        With `norm_at="before"` this would be another function than `forward` (the mean of normalised tokens is
        not the normalised mean); builders must not ask for it.
        """
        return self._classify(pooled)

    def _classify(self, pooled: torch.Tensor) -> torch.Tensor:
        chosen = self._choose(pooled)  # (batch, 1 or 2, channel)
        if self.norm_at == "after":
            chosen = self.norm(chosen)
        logits: torch.Tensor = self.classifier(chosen.flatten(1))
        return logits

    def _choose(self, pooled: torch.Tensor) -> torch.Tensor:
        if self.pool == "patch-mean":
            return pooled[:, -1:]
        if self.pool == "prefix":
            return pooled[:, :1]
        if self.pool == "both":
            return torch.cat([pooled[:, :1], pooled[:, -1:]], dim=1)
        patches = self.tokens - self.prefix_tokens
        summed = pooled[:, :-1].sum(dim=1, keepdim=True) + patches * pooled[:, -1:]
        return summed / self.tokens


def head_parameters(*, channels: int, n_classes: int, pool: Pool, norm: HeadNorm) -> int:
    """Return the trainable parameters of a head; the backbone's own norm counts as none."""
    width = channels * (2 if pool == "both" else 1)
    return (width + 1) * n_classes + 2 * channels * (norm == "new")
