"""ComBo on one backbone: each token's taps are mapped to one narrow token, and a small transformer classifies them."""

from dataclasses import dataclass

import torch
from torch import nn

from coldtap.adaptors.networks.choose_taps import find_every
from coldtap.adaptors.networks.contract import AdaptorKind, FeatureSpec
from coldtap.adaptors.networks.heads import ClassifierHead, head_parameters
from coldtap.adaptors.networks.options import require_at_least, require_probability
from coldtap.adaptors.networks.transformer import TransformerBlock, block_parameters
from coldtap.errors import OptionError
from coldtap.stores import Store


@dataclass(frozen=True, kw_only=True)
class ComboOptions:
    """Options of ComBo; `width` is D', the channels of the transformer, `hidden` those inside its MLPs."""

    gap: int = 1
    width: int = 128
    depth: int = 6
    heads: int = 2
    hidden: int = 64
    tap_norm: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(1, gap=self.gap, width=self.width, depth=self.depth, heads=self.heads, hidden=self.hidden)
        require_probability(dropout=self.dropout)
        if self.width % self.heads:
            raise OptionError(f"width={self.width} must be divisible by heads={self.heads}")

    @property
    def is_random(self) -> bool:
        """Return whether a step draws random numbers."""
        return self.dropout > 0


class Combo(nn.Module):
    """ComBo (arXiv 2512.01405): one affine map for every token, from all its taps side by side to D' channels.

    A learnable class token is put before them, a transformer mixes them, and a linear layer classifies the class token.
    From notes on the paper: this, and 6 blocks of 128 channels and 2 heads. Inferred: the MLP's width of 64 (with it
    and the 12 blocks of ViT-B the parameters are the 1.7 M that are reported), that block outputs are read and z0 is
    not, that no position is added, the norm before the classifier. Here otherwise: each token of each tap is normalised
    by its own mean and deviation over the channels, where the paper takes statistics of the features; one backbone.
    """

    def __init__(
        self,
        *,
        blocks: list[TransformerBlock],
        head: ClassifierHead,
        channels: int,
        n_taps: int,
        width: int,
        tap_norm: bool,
    ) -> None:
        super().__init__()
        self.tap_norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False) if tap_norm else nn.Identity()
        self.map = nn.Linear(n_taps * channels, width)
        self.class_token = nn.Parameter(0.02 * torch.randn(width))  # of one axis, so that weight decay leaves it alone
        self.blocks = nn.Sequential(*blocks)
        self.head = head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify block outputs (batch, tap, token, channel); return logits (batch, class)."""
        each = self.tap_norm(features).transpose(1, 2).flatten(2)  # (batch, token, tap · channel)
        tokens = torch.cat([self.class_token.expand(each.shape[0], 1, -1), self.map(each)], dim=1)
        logits: torch.Tensor = self.head.from_pooled(self.blocks(tokens)[:, :1])
        return logits


def count_combo(spec: FeatureSpec, options: ComboOptions, *, n_classes: int) -> int:
    """Return the trainable parameters: (taps · d + 1) · D' for the map, D' for the class token, blocks and head."""
    width = options.width
    blocks = options.depth * block_parameters(width=width, hidden=options.hidden)
    head = head_parameters(channels=width, n_classes=n_classes, pool="patch-mean", norm="new")
    return (len(spec.taps) * spec.geometry.channels + 2) * width + blocks + head


def plan_combo(store: Store, options: ComboOptions) -> tuple[FeatureSpec, ComboOptions]:
    """Choose the taps g, 2g, … N: block outputs.

    Raises:
        MissingFeaturesError: The store holds no `layers`, or not these taps, or a stage network.
        OptionError: The gap does not divide the backbone's depth.
    """
    return find_every(store, options.gap, adaptor="combo", first=options.gap), options


def build_combo(spec: FeatureSpec, options: ComboOptions, *, n_classes: int) -> Combo:
    """Build the network from shapes and planned options."""
    width, dropout = options.width, options.dropout
    return Combo(
        blocks=[
            TransformerBlock(width=width, heads=options.heads, hidden=options.hidden, dropout=dropout)
            for _ in range(options.depth)
        ],
        head=ClassifierHead(channels=width, n_classes=n_classes, tokens=1, prefix_tokens=0),
        channels=spec.geometry.channels,
        n_taps=len(spec.taps),
        width=width,
        tap_norm=options.tap_norm,
    )


COMBO = AdaptorKind(
    name="combo",
    paper="arXiv 2512.01405",
    options=ComboOptions,
    plan=plan_combo,
    build=build_combo,
    count=count_combo,
    lr=3e-4,
    gathers=lambda _: ("layers",),
)
