"""The linear probe on one tap, from `pooled` features where the store has them."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from coldtap.adaptors.networks.choose_taps import find_tap
from coldtap.adaptors.networks.contract import AdaptorKind, FeatureSpec, spec_of
from coldtap.adaptors.networks.heads import ClassifierHead
from coldtap.adaptors.networks.parts import HeadOptions, build_head, count_head, settle_head
from coldtap.stores import Store
from coldtap.stores.format.gathers import GATHERS, GatherName


@dataclass(frozen=True, kw_only=True)
class LinearOptions(HeadOptions):
    """Options of the linear probe; `tap=-1` is the last tap of the backbone, `-2` the one before it."""

    tap: int = -1


class LinearProbe(nn.Module):
    """A linear classifier on one tap: the baseline of LAST (arXiv 2402.04009) and MIST (arXiv 2406.17559).

    Inferred: what is pooled, and the norm before the classifier. By default the mean of the patch tokens and the
    backbone's own final norm, as in the code of DTL, which is by the authors of LAST.
    """

    def __init__(self, *, head: ClassifierHead, pooled: bool) -> None:
        super().__init__()
        self.head, self.pooled = head, pooled

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify one tap.

        Args:
            features: `pooled` (batch, 1, prefix + 1, channel) or `layers` (batch, 1, token, channel).

        Returns:
            Logits (batch, class).
        """
        tap = features[:, 0]
        logits: torch.Tensor = self.head.from_pooled(tap) if self.pooled else self.head(tap)
        return logits


def count_linear(spec: FeatureSpec, options: LinearOptions, *, n_classes: int) -> int:
    """Return the trainable parameters: (d + 1) · classes, d doubled by pool=both, and 2d for a new norm."""
    return count_head(spec, options, n_classes=n_classes)


def gathers_linear(options: LinearOptions) -> tuple[GatherName, ...]:
    """Return `pooled`, or `layers` where every token is looked at."""
    # The mean of normalised tokens cannot be had from a stored mean.
    every_token = options.pool == "tokens" or (options.norm_at == "before" and options.norm != "none")
    return ("layers",) if every_token else ("pooled",)


def plan_linear(store: Store, options: LinearOptions) -> tuple[FeatureSpec, LinearOptions]:
    """Choose the array that holds the tap: `pooled` if it can serve, else `layers`.

    Raises:
        MissingFeaturesError: Neither holds the tap.
        OptionError: The head's options do not fit the features.
    """
    gathers = dict.fromkeys([*gathers_linear(options), "layers"])
    array, tap = find_tap(store, options.tap, list(gathers), adaptor="linear")
    spec = spec_of(store, array, (tap,))
    # The backbone's final norm was trained for the last tap; an earlier one gets its own.
    options = settle_head(options, spec, prefer_backbone=tap == spec.depth)
    return spec, dataclasses.replace(options, tap=tap)


def build_linear(spec: FeatureSpec, options: LinearOptions, *, n_classes: int) -> LinearProbe:
    """Build the probe from shapes and planned options."""
    return LinearProbe(head=build_head(spec, options, n_classes=n_classes), pooled=GATHERS[spec.gather].has_patch_mean)


LINEAR = AdaptorKind(
    name="linear",
    paper="the linear baseline of arXiv 2402.04009 and 2406.17559",
    options=LinearOptions,
    plan=plan_linear,
    build=build_linear,
    count=count_linear,
    lr=2e-2,
    gathers=gathers_linear,
)
