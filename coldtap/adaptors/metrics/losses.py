"""The loss of each kind of target, in nats and a number a sample, so that trials and samples can be told apart.

All of them run under `torch.func.vmap` over a trial axis of the logits. `label_smoothing` is the share of a target
that is spread evenly over all outcomes (arXiv 1512.00567, section 7): the classes, or of a label the two, there or not.
"""

from torch import Tensor
from torch.nn import functional as F

from coldtap.stores.format.types import IGNORED


def class_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each sample (sample,): logits (sample, class), targets (sample,) int64."""
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def label_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean binary cross-entropy of each sample's labels (sample,): both arguments (sample, class)."""
    smooth = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(dim=-1)


def token_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each token, 0 where it is ignored (sample, patch): logits (sample, patch, class)."""
    flat = F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )
    each: Tensor = flat.unflatten(0, targets.shape)
    return each


def mean_over_known(losses: Tensor, targets: Tensor) -> Tensor:
    """Return each sample's mean loss over the tokens that are not ignored (sample,); 0 where all of them are."""
    return losses.sum(dim=-1) / (targets != IGNORED).sum(dim=-1).clamp(min=1)
