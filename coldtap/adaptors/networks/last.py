"""LAST: low-rank attention side-tuning, a side network that reads the backbone's taps one group at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from coldtap.adaptors.networks.choose_taps import find_every
from coldtap.adaptors.networks.contract import (
    AdaptorKind,
    FeatureSpec,
)
from coldtap.adaptors.networks.heads import ClassifierHead
from coldtap.adaptors.networks.lsa.function import can_run_groups, run_groups
from coldtap.adaptors.networks.options import require_at_least
from coldtap.adaptors.networks.parts import LsaOptions, build_head, count_head, count_stack, lsa_stack, settle_head
from coldtap.stores import Store

type Recursion = Literal["A", "B"]


@dataclass(frozen=True, kw_only=True)
class LastOptions(LsaOptions):
    """Options of LAST; `gap` blocks of the backbone make a group, `modules` is T, the LSA modules a group."""

    gap: int = 1
    modules: int = 4
    rank: int = 4
    recursion: Recursion = "B"
    bias_correction: bool = True

    def __post_init__(self) -> None:
        LsaOptions.__post_init__(self)
        require_at_least(1, gap=self.gap, modules=self.modules)


class Last(nn.Module):
    """LAST (arXiv 2402.04009): u_0 = z_0, u_i = F_i(u_{i-1} + z_i), represented by u_m − (z_0 + … + z_{m-1}).

    F_i stacks T LSA modules; z_i is the tap after group i. From the paper's reviews: groups, modules, the sum and its
    bias correction. Inferred, hence arguments: which of the two recursions that fit the correction is meant (B, above;
    A is u_i = F_i(u_{i-1}) + z_i), T, rank, start and head. In both, every increment being a residual, the
    representation is z_m plus all increments: a fresh network with `zero-up` is a linear probe on the last tap.
    """

    def __init__(
        self,
        *,
        groups: Iterable[nn.Module],
        head: ClassifierHead,
        recursion: Recursion = "B",
        bias_correction: bool = True,
    ) -> None:
        super().__init__()
        self.groups, self.head = nn.ModuleList(groups), head
        self.recursion, self.bias_correction = recursion, bias_correction

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify the taps z_0 … z_m (batch, tap, token, channel); return logits (batch, class)."""
        logits: torch.Tensor = self.head(self.represent(features))
        return logits

    def represent(self, features: torch.Tensor) -> torch.Tensor:
        """Run the recursion over the taps (batch, tap, token, channel); return (batch, token, channel)."""
        if can_run_groups(features):
            lead = 2 if self.recursion == "B" else 1
            return run_groups(list(self.groups), features, lead=lead, corrected=self.bias_correction)
        u = features[:, 0]
        for i, group in enumerate(self.groups, start=1):
            z = features[:, i]
            u = group(u + z) if self.recursion == "B" else group(u) + z
        if self.bias_correction:
            u = u - features[:, :-1].sum(dim=1)
        return u


def count_last(spec: FeatureSpec, options: LastOptions, *, n_classes: int) -> int:
    """Return the trainable parameters: m · T · (4dr + 2d), and the head."""
    depth = (len(spec.taps) - 1) * options.modules
    head = count_head(spec, options, n_classes=n_classes)
    return count_stack(options, channels=spec.geometry.channels, depth=depth) + head


def plan_last(store: Store, options: LastOptions) -> tuple[FeatureSpec, LastOptions]:
    """Choose the taps 0, g, 2g, … N.

    Raises:
        MissingFeaturesError: The store holds no `layers`, or not these taps, or a stage network.
        OptionError: The gap does not divide the backbone's depth, or the head's options do not fit.
    """
    spec = find_every(store, options.gap, adaptor="LAST")
    # Corrected, the representation is z_N plus increments: what the backbone's own final norm was trained for.
    return spec, settle_head(options, spec, prefer_backbone=options.bias_correction)


def build_last(spec: FeatureSpec, options: LastOptions, *, n_classes: int) -> Last:
    """Build the network from shapes and planned options."""
    groups = [
        lsa_stack(options, channels=spec.geometry.channels, depth=options.modules) for _ in range(len(spec.taps) - 1)
    ]
    head = build_head(spec, options, n_classes=n_classes)
    return Last(groups=groups, head=head, recursion=options.recursion, bias_correction=options.bias_correction)


LAST = AdaptorKind(
    name="last",
    paper="arXiv 2402.04009",
    options=LastOptions,
    plan=plan_last,
    build=build_last,
    count=count_last,
    lr=1e-3,
    gathers=lambda _: ("layers",),
)
