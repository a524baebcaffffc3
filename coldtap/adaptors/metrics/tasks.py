"""What is learnt: each kind of target with its loss and its scores.

    kind         targets                             scores, the deciding one first
    class        (sample,) int64                     top1, mean_class
    labels       (sample, class) 0 or 1              mAP, micro_F1, macro_F1
    token-class  (sample, patch) int64, −1 ignored   mIoU, accuracy

Logits are (sample, class), for `token-class` (sample, patch, class).
"""

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from coldtap.adaptors.metrics.losses import class_losses, label_losses, mean_over_known, token_losses
from coldtap.adaptors.metrics.metrics import ClassMetrics, LabelsMetrics, Metrics, TokenClassMetrics, TrialRows
from coldtap.errors import MachineError
from coldtap.stores.format.types import TargetKind

__all__ = ["Metrics", "TargetKind", "Task", "TrialRows", "require_scorer", "task_of"]


class Task(Protocol):
    """A kind of target with its loss and its scores; `metric` names the score that decides."""

    @property
    def kind(self) -> TargetKind:
        """Of the targets."""

    @property
    def metric(self) -> str:
        """Name of the deciding score."""

    def losses(self, logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of each sample (sample,), in nats.

        It may run under `torch.func.vmap` over a trial axis of `logits`.

        Args:
            logits: Of the samples.
            targets: Of the samples.
            label_smoothing: Share of a target that is spread evenly over all outcomes: the classes, or of a label
                the two, there or not.
        """

    def metrics(self, *, n_trials: int, n_classes: int, device: torch.device, keep_rows: bool = False) -> Metrics:
        """Return an empty metrics; with `keep_rows` it keeps what is said of each sample."""


class ClassTask:
    """One class a sample: cross-entropy; accuracy decides."""

    kind: TargetKind = "class"
    metric = "top1"

    def losses(self, logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy of each sample (sample,)."""
        return class_losses(logits, targets, label_smoothing)

    def metrics(self, *, n_trials: int, n_classes: int, device: torch.device, keep_rows: bool = False) -> Metrics:
        """Return an empty metrics."""
        return ClassMetrics(n_trials=n_trials, n_classes=n_classes, device=device, keep_rows=keep_rows)


class LabelsTask:
    """Any number of labels a sample: binary cross-entropy, the mean over labels; mean average precision decides."""

    kind: TargetKind = "labels"
    metric = "mAP"

    def losses(self, logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean binary cross-entropy of each sample's labels (sample,)."""
        return label_losses(logits, targets, label_smoothing)

    def metrics(self, *, n_trials: int, n_classes: int, device: torch.device, keep_rows: bool = False) -> Metrics:
        """Return an empty metrics; it keeps the logits, and so the rows, whether asked or not."""
        return LabelsMetrics()


class TokenClassTask:
    """One class a patch token: cross-entropy, the mean over tokens; mean intersection over union decides."""

    kind: TargetKind = "token-class"
    metric = "mIoU"

    def losses(self, logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy of each sample's known tokens (sample,); 0 where all of them are ignored."""
        return mean_over_known(token_losses(logits, targets, label_smoothing), targets)

    def metrics(self, *, n_trials: int, n_classes: int, device: torch.device, keep_rows: bool = False) -> Metrics:
        """Return an empty metrics."""
        return TokenClassMetrics(n_trials=n_trials, n_classes=n_classes, device=device, keep_rows=keep_rows)


def task_of(kind: TargetKind) -> Task:
    """Return the task of a kind of target."""
    tasks: dict[TargetKind, Task] = {"class": ClassTask(), "labels": LabelsTask(), "token-class": TokenClassTask()}
    return tasks[kind]


def require_scorer(kind: TargetKind) -> None:
    """Refuse targets whose scores need a package that is not installed.

    Raises:
        MachineError: scikit-learn is missing, which has average precision.
    """
    if kind == "labels" and find_spec("sklearn") is None:
        raise MachineError("targets of kind labels are scored with scikit-learn: pip install 'coldtap[train]'")
