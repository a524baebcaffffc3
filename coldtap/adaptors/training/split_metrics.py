"""What trials reach on a split that is read once for all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.metrics.tasks import TrialRows
from coldtap.adaptors.runs.record import SplitMetrics

type Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What one trial reaches on a split, and what it says of each sample, where that was asked for."""

    metrics: SplitMetrics
    rows: TrialRows | None


def evaluate_split(
    logits: Logits, batches: FeatureBatches, *, n_trials: int, n_classes: int | None = None, keep_rows: bool = False
) -> list[Evaluated]:
    """Evaluate trials on a split.

    Args:
        logits: Maps features (sample, *row shape) to the logits of all trials (trial, sample, [patch,] class).
        batches: Of the split.
        n_trials: How many trials there are.
        n_classes: That the logits tell apart; None are those of the targets.
        keep_rows: Whether to keep what is said of each sample.
    """
    task, n_classes = batches.task, n_classes or batches.n_classes
    metric = task.metrics(n_trials=n_trials, n_classes=n_classes, device=batches.device, keep_rows=keep_rows)
    for batch in batches.ordered():
        metric.add(logits(batch.features), batch.targets)
    rows = metric.rows() if keep_rows else [None] * n_trials
    return [
        Evaluated(
            metrics=SplitMetrics(score=scores[task.metric], scores=scores, loss=loss, n_samples=batches.n_samples),
            rows=said,
        )
        for scores, loss, said in zip(metric.scores(), metric.losses(), rows, strict=True)
    ]
