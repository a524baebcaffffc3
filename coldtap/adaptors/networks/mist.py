"""MIST, formerly MIET: a small attention network on the sum of the backbone's taps."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from coldtap.adaptors.networks.contract import (
    AdaptorKind,
    FeatureSpec,
    arrays_of,
    describe_gathers,
    refuse_stage_network,
    spec_of,
)
from coldtap.adaptors.networks.heads import ClassifierHead
from coldtap.adaptors.networks.lsa.function import can_run_groups, run_groups
from coldtap.adaptors.networks.options import require_at_least
from coldtap.adaptors.networks.parts import LsaOptions, build_head, count_head, count_stack, lsa_stack, settle_head
from coldtap.errors import MissingFeaturesError
from coldtap.stores import Store


@dataclass(frozen=True, kw_only=True)
class MistOptions(LsaOptions):
    """Options of MIST; `at` is the k of S_k = z0 + … + zk, `-1` the last tap of the backbone."""

    at: int = -1
    depth: int = 6
    rank: int = 8
    entry_norm: bool = True

    def __post_init__(self) -> None:
        LsaOptions.__post_init__(self)
        require_at_least(1, depth=self.depth)


class Mist(nn.Module):
    """MIST (arXiv 2406.17559, first called MIET): low-rank attention on one gathered tensor, S_k = z0 + … + zk.

    From the paper's reviews: the gather, and that the edge network is low-rank attention. Inferred: that it stacks the
    LSA modules of LAST, their number and rank, the layer norm at its entry (the sum's scale grows with depth and a few
    channels are huge), and the head.
    """

    def __init__(self, *, stack: nn.Module, head: ClassifierHead, channels: int, entry_norm: bool = True) -> None:
        super().__init__()
        self.entry = nn.LayerNorm(channels, eps=1e-6) if entry_norm else nn.Identity()
        self.stack, self.head = stack, head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify the summed taps (batch, token, channel); return logits (batch, class)."""
        logits: torch.Tensor = self.head(self.represent(features))
        return logits

    def represent(self, features: torch.Tensor) -> torch.Tensor:
        """Run the modules over the summed taps (batch, token, channel); return the same shape."""
        if can_run_groups(features):
            entry = self.entry if isinstance(self.entry, nn.LayerNorm) else None
            return run_groups([self.stack], features.unsqueeze(1), lead=1, corrected=False, entry=entry)
        represented: torch.Tensor = self.stack(self.entry(features))
        return represented


def count_mist(spec: FeatureSpec, options: MistOptions, *, n_classes: int) -> int:
    """Return the trainable parameters: depth · (4dr + 2d), 2d for the entry's norm, and the head."""
    channels = spec.geometry.channels
    entry = 2 * channels * options.entry_norm
    return (
        count_stack(options, channels=channels, depth=options.depth)
        + entry
        + count_head(spec, options, n_classes=n_classes)
    )


def plan_mist(store: Store, options: MistOptions) -> tuple[FeatureSpec, MistOptions]:
    """Choose the stored sum S_k.

    Raises:
        MissingFeaturesError: The store holds no sum, or not at k, or a stage network.
        OptionError: The head's options do not fit the features.
    """
    refuse_stage_network(store, adaptor="MIST")
    sums = arrays_of(store, "sum")
    if not sums:
        raise MissingFeaturesError(
            f"MIST needs `sum`; {store.storage} holds {describe_gathers(store)}: cache again with `gather='sum'`"
        )
    at = options.at if options.at >= 0 else store.depth + 1 + options.at
    found = [array for array in sums if array.taps == (at,)]
    if not found:
        held = sorted(array.taps[0] for array in sums)
        raise MissingFeaturesError(
            f"MIST needs the sum at tap {at}; {store.storage} holds sums at {', '.join(map(str, held))}: "
            f"choose with `settings['at']=N`, or cache again with `sum_at='{at}'`"
        )
    spec = spec_of(store, found[0], (at,))
    # The backbone's norm was trained for z_N; a normalised sum has other channel means, so it gets its own norm.
    return spec, dataclasses.replace(settle_head(options, spec, prefer_backbone=False), at=at)


def build_mist(spec: FeatureSpec, options: MistOptions, *, n_classes: int) -> Mist:
    """Build the network from shapes and planned options."""
    channels = spec.geometry.channels
    stack = lsa_stack(options, channels=channels, depth=options.depth)
    head = build_head(spec, options, n_classes=n_classes)
    return Mist(stack=stack, head=head, channels=channels, entry_norm=options.entry_norm)


MIST = AdaptorKind(
    name="mist",
    paper="arXiv 2406.17559",
    options=MistOptions,
    plan=plan_mist,
    build=build_mist,
    count=count_mist,
    lr=2e-3,
    gathers=lambda _: ("sum",),
)
