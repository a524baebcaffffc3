"""Scores of several trials at once over the batches of a split: fractions, as benchmarks of the kind define them.

What is added up stays on the device until a split is done: nothing waits for a GPU between two batches.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from coldtap.adaptors.metrics.losses import class_losses, label_losses, mean_over_known, token_losses
from coldtap.stores.format.types import IGNORED

type Floats = np.ndarray[Any, np.dtype[np.float32]]
type Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRows:
    """What one trial said of each sample of a split, in the order in which they came.

    Attributes:
        losses: (sample,) nats.
        targets: (sample,) or (sample, patch) int64, or (sample, class) bool.
        predicted: (sample,) or (sample, patch); None for labels.
        probability: of the predicted class (sample,), or of every label (sample, class); None for token classes.
    """

    losses: Floats
    targets: np.ndarray[Any, Any]
    predicted: Integers | None
    probability: Floats | None


class Metrics(Protocol):
    """Evaluates several trials at once over the batches of a split."""

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch, and wait for no device.

        Args:
            logits: (trial, sample, class), or (trial, sample, patch, class).
            targets: Of the samples, the same for all trials.
        """

    def scores(self) -> list[dict[str, float]]:
        """Return each trial's scores by name, the deciding one first."""

    def losses(self) -> list[float]:
        """Return each trial's mean loss a sample (nats); of token classes, a token that is not ignored."""

    def rows(self) -> list[TrialRows]:
        """Return what each trial said of each sample, of metrics that were asked to keep it."""


class ClassCounts:
    """Sums by class (trial, class) on a device; whole numbers, so that no order of additions shows in them."""

    def __init__(self, n_trials: int, n_classes: int, device: torch.device) -> None:
        # One more class than there are takes what is not to be counted.
        self._counts = torch.zeros(n_trials * (n_classes + 1), dtype=torch.int64, device=device)
        self._starts = torch.arange(n_trials, device=device)[:, None] * (n_classes + 1)
        self._n_classes = n_classes

    def add(self, classes: Tensor, counted: Tensor) -> None:
        """Count classes (trial, ·) where `counted`; `bincount` would wait to learn how many there are."""
        places = (torch.where(counted, classes, self._n_classes) + self._starts).flatten()
        self._counts.index_add_(0, places, torch.ones_like(places))

    def get(self) -> Integers:
        """Return the counts."""
        return self._counts.view(-1, self._n_classes + 1)[:, :-1].cpu().numpy()


class ClassMetrics:
    """Accuracy over all samples (`top1`), and its mean over the classes that occur (`mean_class`)."""

    def __init__(self, *, n_trials: int, n_classes: int, device: torch.device, keep_rows: bool = False) -> None:
        self._right = ClassCounts(n_trials, n_classes, device)
        self._there = ClassCounts(1, n_classes, device)
        self._loss = torch.zeros(n_trials, dtype=torch.float64, device=device)
        self._rows: list[tuple[Tensor, ...]] | None = [] if keep_rows else None

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (trial, sample, class), targets (sample,)."""
        logits = logits.float()
        predicted = logits.argmax(dim=-1)
        expected = targets.expand_as(predicted)
        losses = class_losses(logits.flatten(0, 1), expected.flatten()).unflatten(0, predicted.shape)
        self._right.add(expected, predicted == expected)
        self._there.add(expected[:1], torch.ones_like(expected[:1], dtype=torch.bool))
        self._loss += losses.sum(dim=-1, dtype=torch.float64)
        if self._rows is not None:
            self._rows.append((losses, expected, predicted, logits.softmax(dim=-1).amax(dim=-1)))

    def scores(self) -> list[dict[str, float]]:
        """Return `top1` and `mean_class` of each trial."""
        right, there = self._right.get(), self._there.get()[0]
        by_class = right[:, there > 0] / there[there > 0]
        return [
            {"top1": float(one.sum() / there.sum()), "mean_class": float(each.mean())}
            for one, each in zip(right, by_class, strict=True)
        ]

    def losses(self) -> list[float]:
        """Return each trial's mean loss a sample (nats)."""
        return _means(self._loss, int(self._there.get().sum()))

    def rows(self) -> list[TrialRows]:
        """Return what each trial said of each sample."""
        return [
            TrialRows(losses=losses, targets=targets, predicted=predicted, probability=probability)
            for losses, targets, predicted, probability in _by_trial(self._rows)
        ]


class LabelsMetrics:
    """Mean average precision over the labels that occur (`mAP`), and F1 at a probability of one half.

    `micro_F1` takes all decisions together, `macro_F1` is the mean over the labels that occur. Where no label
    occurs all of them are 0; a trial whose logits are not finite scores NaN. The logits of all samples are kept on
    the device, for average precision ranks them.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Keep a batch: logits (trial, sample, class), targets (sample, class)."""
        logits = logits.float()
        expected = targets.bool().expand_as(logits)
        self._rows.append((label_losses(logits, expected), expected, logits.clone()))

    def scores(self) -> list[dict[str, float]]:
        """Return `mAP`, `micro_F1` and `macro_F1` of each trial."""
        return [_label_scores(targets, logits) for _, targets, logits in _by_trial(self._rows)]

    def losses(self) -> list[float]:
        """Return each trial's mean loss a sample (nats)."""
        return [float(losses.mean(dtype=np.float64)) for losses, *_ in _by_trial(self._rows)]

    def rows(self) -> list[TrialRows]:
        """Return what each trial said of each sample."""
        return [
            TrialRows(
                losses=losses,
                targets=targets,
                predicted=None,
                probability=torch.from_numpy(logits).sigmoid().numpy(),
            )
            for losses, targets, logits in _by_trial(self._rows)
        ]


def _label_scores(targets: np.ndarray[Any, np.dtype[np.bool_]], logits: Floats) -> dict[str, float]:
    """Return the scores of one trial: both arguments (sample, class)."""
    names = ("mAP", "micro_F1", "macro_F1")
    occurs = targets.any(axis=0)
    if not np.isfinite(logits).all():
        return dict.fromkeys(names, float("nan"))
    if not occurs.any():
        return dict.fromkeys(names, 0.0)
    from sklearn.metrics import average_precision_score  # takes a second, which other tasks need not pay

    said = logits >= 0  # a probability of one half
    hits, both = (targets & said).sum(axis=0), targets.sum(axis=0) + said.sum(axis=0)
    scores = (
        average_precision_score(targets[:, occurs], logits[:, occurs], average="macro"),
        2 * hits.sum() / both.sum(),
        (2 * hits[occurs] / both[occurs]).mean(),
    )
    return dict(zip(names, map(float, scores), strict=True))


class TokenClassMetrics:
    """Intersection over union, averaged over the classes (`mIoU`), and the share of right tokens (`accuracy`).

    Both count over all tokens of the split that are not ignored; a class that neither occurs nor is predicted is left
    out. Where every token is ignored both are 0.
    """

    def __init__(self, *, n_trials: int, n_classes: int, device: torch.device, keep_rows: bool = False) -> None:
        self._right = ClassCounts(n_trials, n_classes, device)
        self._said = ClassCounts(n_trials, n_classes, device)
        self._there = ClassCounts(1, n_classes, device)
        self._loss = torch.zeros(n_trials, dtype=torch.float64, device=device)
        self._rows: list[tuple[Tensor, ...]] | None = [] if keep_rows else None

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (trial, sample, patch, class), targets (sample, patch)."""
        logits = logits.float()
        predicted = logits.argmax(dim=-1)
        expected = targets.expand_as(predicted)
        losses = token_losses(logits.flatten(0, 1), expected.flatten(0, 1)).unflatten(0, predicted.shape[:2])
        known = (expected != IGNORED).flatten(1)
        said, there = predicted.flatten(1), expected.flatten(1)
        self._right.add(said, known & (said == there))
        self._said.add(said, known)
        self._there.add(there[:1], known[:1])
        self._loss += losses.sum(dim=(1, 2), dtype=torch.float64)
        if self._rows is not None:
            self._rows.append((mean_over_known(losses, expected), expected, predicted))

    def scores(self) -> list[dict[str, float]]:
        """Return `mIoU` and `accuracy` of each trial."""
        right, there = self._right.get(), self._there.get()
        union = self._said.get() + there - right
        n_tokens = max(int(there.sum()), 1)
        return [
            {
                "mIoU": float((hit[size > 0] / size[size > 0]).mean()) if size.any() else 0.0,
                "accuracy": float(hit.sum() / n_tokens),
            }
            for hit, size in zip(right, union, strict=True)
        ]

    def losses(self) -> list[float]:
        """Return each trial's mean loss a token that is not ignored (nats)."""
        return _means(self._loss, int(self._there.get().sum()))

    def rows(self) -> list[TrialRows]:
        """Return what each trial said of each sample."""
        return [
            TrialRows(losses=losses, targets=targets, predicted=predicted, probability=None)
            for losses, targets, predicted in _by_trial(self._rows)
        ]


def _means(sums: Tensor, n: int) -> list[float]:
    means: list[float] = (sums / max(n, 1)).tolist()
    return means


def _by_trial(batches: list[tuple[Tensor, ...]] | None) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """What was kept of each batch (trial, sample, …), put together and taken apart by trial, on the CPU."""
    assert batches, "metrics that were asked to keep rows, after the first batch"
    columns = [torch.cat(column, dim=1).cpu().numpy() for column in zip(*batches, strict=True)]
    return list(zip(*columns, strict=True))
