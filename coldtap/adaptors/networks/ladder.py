"""The gated ladder: a narrow transformer beside the backbone, which takes in one tap a rung."""

from dataclasses import dataclass

import torch
from torch import nn

from coldtap.adaptors.networks.choose_taps import find_every
from coldtap.adaptors.networks.contract import AdaptorKind, FeatureSpec
from coldtap.adaptors.networks.heads import ClassifierHead
from coldtap.adaptors.networks.options import require_at_least, require_positive, require_probability
from coldtap.adaptors.networks.parts import HeadOptions, build_head, count_head, settle_head
from coldtap.adaptors.networks.transformer import TransformerBlock, block_parameters
from coldtap.errors import OptionError
from coldtap.stores import Store


@dataclass(frozen=True, kw_only=True)
class LadderOptions(HeadOptions):
    """Options of the ladder; `gap` blocks of the backbone make a rung, `reduction` divides the backbone's width."""

    gap: int = 1
    reduction: int = 8
    heads: int = 4
    mlp_ratio: int = 4
    temperature: float = 0.1
    tap_norm: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(1, gap=self.gap, reduction=self.reduction, heads=self.heads, mlp_ratio=self.mlp_ratio)
        require_positive(temperature=self.temperature)
        require_probability(dropout=self.dropout)

    @property
    def is_random(self) -> bool:
        """Return whether a step draws random numbers."""
        return self.dropout > 0


class Ladder(nn.Module):
    """Ladder side-tuning, LST (arXiv 2206.06522): h_i = block_i(μ_i · h_{i-1} + (1 − μ_i) · down_i(z_i)).

    h_0 = down_0(z_0) and μ_i = sigmoid(α_i / T) with α_i starting at 0; at the end a norm, a linear map up to the
    backbone's width, and the head. As in the authors' code: the recursion, biases, T = 0.1, a width of d / 8. Here
    otherwise: blocks start at random, where LST starts them from the backbone's own pruned weights, which a store does
    not hold; the number of heads is an option, since a store does not know the backbone's; `tap_norm` puts a norm
    without parameters on each tap.
    """

    def __init__(
        self,
        *,
        blocks: list[TransformerBlock],
        head: ClassifierHead,
        channels: int,
        width: int,
        temperature: float,
        tap_norm: bool,
    ) -> None:
        super().__init__()
        self.tap_norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False) if tap_norm else nn.Identity()
        self.down = nn.ModuleList(nn.Linear(channels, width) for _ in range(len(blocks) + 1))
        self.gates = nn.Parameter(torch.zeros(len(blocks)))
        self.temperature = temperature
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, channels)
        self.head = head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify the taps z_0 … z_m (batch, tap, token, channel); return logits (batch, class)."""
        h = self.down[0](self.tap_norm(features[:, 0]))
        kept = torch.sigmoid(self.gates / self.temperature)
        for i, (down, block) in enumerate(zip(self.down[1:], self.blocks, strict=True)):
            h = block(torch.lerp(down(self.tap_norm(features[:, i + 1])), h, kept[i]))
        logits: torch.Tensor = self.head(self.up(self.norm(h)))
        return logits


def count_ladder(spec: FeatureSpec, options: LadderOptions, *, n_classes: int) -> int:
    """Return the trainable parameters, w = d / reduction.

    (m + 1) · (d + 1) · w down, m gates, m blocks, 2w for the norm, (w + 1) · d up, and the head.
    """
    channels, rungs = spec.geometry.channels, len(spec.taps) - 1
    width = channels // options.reduction
    down = (rungs + 1) * (channels + 1) * width
    blocks = rungs * (1 + block_parameters(width=width, hidden=options.mlp_ratio * width))
    return down + blocks + 2 * width + (width + 1) * channels + count_head(spec, options, n_classes=n_classes)


def plan_ladder(store: Store, options: LadderOptions) -> tuple[FeatureSpec, LadderOptions]:
    """Choose the taps 0, g, 2g, … N.

    Raises:
        MissingFeaturesError: The store holds no `layers`, or not these taps, or a stage network.
        OptionError: The gap does not divide the depth, or reduction and heads the width, or the head does not fit.
    """
    spec = find_every(store, options.gap, adaptor="ladder")
    if spec.geometry.channels % (options.reduction * options.heads):
        raise OptionError(
            f"reduction={options.reduction}, heads={options.heads}: their product must divide the backbone's "
            f"{spec.geometry.channels} channels"
        )
    return spec, settle_head(options, spec, prefer_backbone=False)


def build_ladder(spec: FeatureSpec, options: LadderOptions, *, n_classes: int) -> Ladder:
    """Build the network from shapes and planned options."""
    width = spec.geometry.channels // options.reduction
    hidden = options.mlp_ratio * width
    return Ladder(
        blocks=[
            TransformerBlock(width=width, heads=options.heads, hidden=hidden, dropout=options.dropout)
            for _ in spec.taps[1:]
        ],
        head=build_head(spec, options, n_classes=n_classes),
        channels=spec.geometry.channels,
        width=width,
        temperature=options.temperature,
        tap_norm=options.tap_norm,
    )


LADDER = AdaptorKind(
    name="ladder",
    paper="arXiv 2206.06522",
    options=LadderOptions,
    plan=plan_ladder,
    build=build_ladder,
    count=count_ladder,
    lr=3e-3,
    gathers=lambda _: ("layers",),
)
