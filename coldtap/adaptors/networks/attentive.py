"""The attentive probe: learnable queries attend over the tokens of one tap, and what they see is classified."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from coldtap.adaptors.networks.choose_taps import find_tap
from coldtap.adaptors.networks.contract import AdaptorKind, FeatureSpec, spec_of
from coldtap.adaptors.networks.heads import ClassifierHead, HeadNorm, build_norm, head_parameters
from coldtap.adaptors.networks.options import require_at_least
from coldtap.adaptors.networks.parts import HeadOptions, NormChoice, settle_head, settled_norm
from coldtap.errors import OptionError
from coldtap.stores import Store

type Attended = Literal["patches", "all"]


@dataclass(frozen=True, kw_only=True)
class AttentiveOptions:
    """Options of the attentive probe; `tap=-1` is the last tap of the backbone, `reduction` divides the value width."""

    tap: int = -1
    queries: int = 32
    reduction: int = 1
    attend: Attended = "patches"
    norm: NormChoice = "auto"
    pooled_norm: bool = True

    def __post_init__(self) -> None:
        require_at_least(1, queries=self.queries, reduction=self.reduction)

    @property
    def is_random(self) -> bool:
        """Return whether a step draws random numbers."""
        return False


class AttentiveProbe(nn.Module):
    """Efficient probing, EP (arXiv 2506.10178): M queries, each with its own share of the values.

    With X = norm(tokens) of d channels, W_V of shape (d, d/ρ) and queries q_1 … q_M of d channels,

        y_j = softmax(q_j Xᵀ / √d) X W_V[:, j-th of M equal parts],        y = (y_1, …, y_M) of d/ρ channels.

    As in the authors' code: no query or key projection, no bias, M = 32, ρ = 1, queries drawn at a scale of 0.02. Here
    otherwise: a layer norm before the classifier, where a batch norm would make a sample's logits depend on its batch;
    and a norm before the attention, since a tap is taken before the backbone's final norm.
    """

    def __init__(
        self, *, norm: nn.Module, head: ClassifierHead, channels: int, queries: int, width: int, first: int
    ) -> None:
        super().__init__()
        self.norm, self.head, self.first, self.scale = norm, head, first, channels**-0.5
        self.queries = nn.Parameter(0.02 * torch.randn(queries, channels))
        self.values = nn.Linear(channels, width, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify one tap (batch, 1, token, channel); return logits (batch, class)."""
        logits: torch.Tensor = self.head.from_pooled(self.pool(features[:, 0])[:, None])
        return logits

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the queries see of the tokens (batch, token, channel), side by side: (batch, width)."""
        x = self.norm(tokens[:, self.first :])
        weights = torch.softmax(x @ (self.scale * self.queries).T, dim=1)  # (batch, token, query)
        values = self.values(x).unflatten(-1, (len(self.queries), -1))  # (batch, token, query, width / query)
        pooled: torch.Tensor = (weights[..., None] * values).sum(dim=1)
        return pooled.flatten(1)


def count_attentive(spec: FeatureSpec, options: AttentiveOptions, *, n_classes: int) -> int:
    """Return the trainable parameters: M · d + d²/ρ, (d/ρ + 1) · classes, and 2d, 2d/ρ for new norms."""
    channels = spec.geometry.channels
    width = channels // options.reduction
    entry = 2 * channels * (options.norm == "new")
    head = head_parameters(channels=width, n_classes=n_classes, pool="patch-mean", norm=_pooled_norm(options))
    return options.queries * channels + channels * width + entry + head


def _pooled_norm(options: AttentiveOptions) -> HeadNorm:
    return "new" if options.pooled_norm else "none"


def plan_attentive(store: Store, options: AttentiveOptions) -> tuple[FeatureSpec, AttentiveOptions]:
    """Find the tap in `layers`; stages of a stage network can serve.

    Raises:
        MissingFeaturesError: The store holds no `layers`, or not this tap.
        OptionError: The queries do not share the values evenly, or the norm is not in the store.
    """
    array, tap = find_tap(store, options.tap, ("layers",), adaptor="attentive")
    spec = spec_of(store, array, (tap,))
    if spec.geometry.channels % (options.queries * options.reduction):
        raise OptionError(
            f"queries={options.queries}, reduction={options.reduction}: their product must divide the tap's "
            f"{spec.geometry.channels} channels"
        )
    settled = settle_head(HeadOptions(norm=options.norm), spec, prefer_backbone=tap == spec.depth)
    return spec, dataclasses.replace(options, tap=tap, norm=settled.norm)


def build_attentive(spec: FeatureSpec, options: AttentiveOptions, *, n_classes: int) -> AttentiveProbe:
    """Build the probe from shapes and planned options."""
    channels, final = spec.geometry.channels, spec.final_norm
    width = channels // options.reduction
    return AttentiveProbe(
        norm=build_norm(
            settled_norm(HeadOptions(norm=options.norm)),
            channels=channels,
            kind=final.kind if final else "layer_norm",
            eps=final.eps if final else 1e-6,
        ),
        head=ClassifierHead(channels=width, n_classes=n_classes, tokens=1, prefix_tokens=0, norm=_pooled_norm(options)),
        channels=channels,
        queries=options.queries,
        width=width,
        first=spec.geometry.prefix_tokens if options.attend == "patches" else 0,
    )


ATTENTIVE = AdaptorKind(
    name="attentive",
    paper="arXiv 2506.10178",
    options=AttentiveOptions,
    plan=plan_attentive,
    build=build_attentive,
    count=count_attentive,
    lr=5e-2,
    gathers=lambda _: ("layers",),
)
