"""Head2Toe: a linear classifier on the pooled tokens of every tap, of which it selects the features that serve."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from coldtap.adaptors.networks.contract import (
    AdaptorKind,
    FeatureSpec,
    arrays_of,
    describe_gathers,
    refuse_stage_network,
    spec_of,
)
from coldtap.adaptors.networks.heads import ClassifierHead, head_parameters
from coldtap.adaptors.networks.options import require_probability
from coldtap.errors import MissingFeaturesError, OptionError
from coldtap.stores import Store

type Scaling = Literal["unit", "standard"]


@dataclass(frozen=True, kw_only=True)
class Head2ToeOptions:
    """Options of Head2Toe.

    `keep` is the share of the features that are selected, `lasso` the weight of the group lasso until then, and
    `select_after` the share of the epochs before the selection.
    """

    keep: float = 0.1
    lasso: float = 1e-4
    select_after: float = 0.5
    scaling: Scaling = "standard"

    def __post_init__(self) -> None:
        require_probability(select_after=self.select_after)
        if not 0 < self.keep <= 1:
            raise OptionError(f"keep={self.keep}: it must be above 0 and at most 1")
        if not 0 <= self.lasso < float("inf"):
            raise OptionError(f"lasso={self.lasso}: it must be 0 or more, and finite")

    @property
    def is_random(self) -> bool:
        """Return whether a step draws random numbers."""
        return False


class Head2Toe(nn.Module):
    """Head2Toe (arXiv 2201.03529): group lasso over the features of all taps, then the best of them alone.

    Prefix tokens and patch means of all taps are scaled, laid side by side and classified by W (class, feature). The
    loss gains λ · Σ_f ‖W[:, f]‖, which pushes whole features to zero; then the features with the largest ‖W[:, f]‖ are
    kept, and the lasso ends. As in the authors' code: the lasso, the score, keep = 0.1, λ = 1e-4. Here otherwise: one
    run that selects on its way and goes on with the weights it has, where the paper trains once to select and then a
    new classifier; the pooled tokens of block outputs alone, where it also takes tensors inside the blocks; and
    features of mean 0 and deviation 1 in each token, where it takes unit vectors (`scaling=unit`).

    Attributes:
        mask: (feature,) 1 for a feature that is used, 0 for one that was not selected.
        selecting: (1,) 1 before the selection, 0 after it. Both are in the state dict.
    """

    mask: torch.Tensor
    selecting: torch.Tensor

    def __init__(self, *, head: ClassifierHead, features: int, options: Head2ToeOptions) -> None:
        super().__init__()
        self.head, self.options = head, options
        self.register_buffer("mask", torch.ones(features))
        self.register_buffer("selecting", torch.ones(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify pooled taps (batch, tap, prefix + 1, channel); return logits (batch, class)."""
        if self.options.scaling == "unit":
            scaled = F.normalize(features, dim=-1)
        else:
            scaled = F.layer_norm(features, features.shape[-1:], eps=1e-6)
        logits: torch.Tensor = self.head.from_pooled((scaled.flatten(1) * self.mask)[:, None])
        return logits

    def penalty(self) -> torch.Tensor:
        """Return λ · Σ_f ‖W[:, f]‖ (nats) before the selection, 0 after it."""
        return self.selecting[0] * (self.options.lasso * self._scores().sum())

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Select before the first epoch that lies past the share `select_after`, but never before epoch 2."""
        first = max(2, int(self.options.select_after * epochs) + 1)
        if epoch < first or not self.selecting.item():
            return
        n_kept = max(1, round(self.options.keep * len(self.mask)))
        kept = self._scores().topk(n_kept).indices
        self.mask.zero_().index_fill_(0, kept, 1)
        self.selecting.zero_()

    def _scores(self) -> torch.Tensor:
        """‖W[:, f]‖ of each feature."""
        scores: torch.Tensor = torch.linalg.vector_norm(self.head.classifier.weight, dim=0)
        return scores


def n_features(spec: FeatureSpec) -> int:
    """Return the features that the pooled tokens of all taps have together: taps · (prefix + 1) · d."""
    return len(spec.taps) * (spec.geometry.prefix_tokens + 1) * spec.geometry.channels


def count_head2toe(spec: FeatureSpec, options: Head2ToeOptions, *, n_classes: int) -> int:
    """Return the trainable parameters: (taps · (prefix + 1) · d + 1) · classes, the unselected ones too."""
    return head_parameters(channels=n_features(spec), n_classes=n_classes, pool="patch-mean", norm="none")


def plan_head2toe(store: Store, options: Head2ToeOptions) -> tuple[FeatureSpec, Head2ToeOptions]:
    """Take every tap that `pooled` holds.

    Raises:
        MissingFeaturesError: The store holds no `pooled`, or a stage network.
    """
    refuse_stage_network(store, adaptor="head2toe")
    pooled = arrays_of(store, "pooled")
    if not pooled:
        raise MissingFeaturesError(
            f"head2toe needs `pooled`; {store.storage} holds {describe_gathers(store)}: "
            "cache again with `gather='pooled'` and `taps='all'`"
        )
    return spec_of(store, pooled[0], tuple(pooled[0].taps)), options


def build_head2toe(spec: FeatureSpec, options: Head2ToeOptions, *, n_classes: int) -> Head2Toe:
    """Build the classifier from shapes and options."""
    features = n_features(spec)
    head = ClassifierHead(channels=features, n_classes=n_classes, tokens=1, prefix_tokens=0, norm="none")
    return Head2Toe(head=head, features=features, options=options)


HEAD2TOE = AdaptorKind(
    name="head2toe",
    paper="arXiv 2201.03529",
    options=Head2ToeOptions,
    plan=plan_head2toe,
    build=build_head2toe,
    count=count_head2toe,
    lr=1e-2,
    gathers=lambda _: ("pooled",),
)
