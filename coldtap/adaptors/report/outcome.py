"""Predictions summed up: the score of every class, which class was taken for which, and the worst mistakes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from coldtap.adaptors.metrics.metrics import TrialRows
from coldtap.adaptors.report.model import ClassScore, Confusion, Counts, Mistake, Outcome
from coldtap.adaptors.report.numbers import SPACE
from coldtap.stores.format.types import IGNORED

MAX_MISTAKES = 12
THRESHOLD = 0.5  # a label counts as predicted from this probability on
MAX_LABELS = 3  # named of one sample

type Numbers = np.ndarray[Any, np.dtype[Any]]


def single_label(split: str, class_names: tuple[str, ...], sample_ids: Sequence[str], rows: TrialRows) -> Outcome:
    """Sum up predictions of one class a sample.

    Args:
        split: Their split.
        class_names: By class number.
        sample_ids: One a sample.
        rows: What was said of each.

    Raises:
        ValueError: The columns of another kind of target.
    """
    targets, predicted, probability = rows.targets, _there(rows.predicted), _there(rows.probability)
    confusion = count_pairs(targets, predicted, n_classes=len(class_names))
    wrong = np.flatnonzero(targets != predicted)
    mistakes = [
        Mistake(
            sample_id=sample_ids[i],
            loss=float(rows.losses[i]),
            truth=class_names[targets[i]],
            answer=f"taken for {class_names[predicted[i]]} ({_percent(probability[i])})",
        )
        for i in _worst(wrong, rows.losses)
    ]
    n, right, _ = _totals(confusion, len(class_names))
    return Outcome(
        split=split,
        kind="class",
        n_samples=len(targets),
        n_wrong=len(wrong),
        class_names=class_names,
        classes=_by_class(class_names, n, right, n),
        confusion=confusion,
        mistakes=tuple(mistakes),
    )


def token_classes(split: str, class_names: tuple[str, ...], sample_ids: Sequence[str], rows: TrialRows) -> Outcome:
    """Sum up predictions of one class a patch; ignored patches do not count. Arguments as of `single_label`."""
    targets, predicted = rows.targets, _there(rows.predicted)  # (sample, patch)
    known = targets != IGNORED
    confusion = count_pairs(targets[known], predicted[known], n_classes=len(class_names))
    wrong = np.flatnonzero((known & (targets != predicted)).any(axis=1))
    mistakes = [
        _patch_mistake(sample_ids[i], float(rows.losses[i]), targets[i], predicted[i], class_names)
        for i in _worst(wrong, rows.losses)
    ]
    n, right, said = _totals(confusion, len(class_names))
    return Outcome(
        split=split,
        kind="token-class",
        n_samples=len(targets),
        n_wrong=len(wrong),
        class_names=class_names,
        classes=_by_class(class_names, n, right, n + said - right),
        confusion=confusion,
        mistakes=tuple(mistakes),
    )


def many_labels(split: str, class_names: tuple[str, ...], sample_ids: Sequence[str], rows: TrialRows) -> Outcome:
    """Sum up predictions of any number of labels a sample. Arguments as of `single_label`."""
    targets, probabilities = rows.targets, _there(rows.probability)  # (sample, class)
    wrong = np.flatnonzero(((probabilities >= THRESHOLD) != targets).any(axis=1))
    mistakes = [
        Mistake(
            sample_id=sample_ids[i],
            loss=float(rows.losses[i]),
            truth=_some([class_names[label] for label in np.flatnonzero(targets[i])]),
            answer=f"answered {_some(_likely(class_names, probabilities[i]))}",
        )
        for i in _worst(wrong, rows.losses)
    ]
    scores = [_average_precision(targets[:, c], probabilities[:, c]) for c in range(len(class_names))]
    columns = zip(class_names, targets.sum(axis=0).tolist(), scores, strict=True)
    return Outcome(
        split=split,
        kind="labels",
        n_samples=len(targets),
        n_wrong=len(wrong),
        class_names=class_names,
        classes=tuple(ClassScore(name=name, n=n, score=score) for name, n, score in columns),
        confusion=None,
        mistakes=tuple(mistakes),
    )


def _there(column: Numbers | None) -> Numbers:
    if column is None:
        raise ValueError("the predictions are of another kind of target")
    return column


def _average_precision(truth: Numbers, scores: Numbers) -> float | None:
    """As `tasks` has it, of one label; None where no sample has it."""
    from sklearn.metrics import average_precision_score  # a second to import: only where it is needed

    return float(average_precision_score(truth, scores)) if truth.any() else None


def count_pairs(truth: Counts, predicted: Counts, *, n_classes: int) -> Confusion:
    """Count each pair of true and predicted class; a dense matrix of 20,000 classes would not fit."""
    pairs, counts = np.unique(truth * n_classes + predicted, return_counts=True)
    return Confusion(truth=pairs // n_classes, predicted=pairs % n_classes, counts=counts.astype(np.int64))


def _totals(confusion: Confusion, n_classes: int) -> tuple[Counts, Counts, Counts]:
    """Samples of each class, those got right, and those taken for it: (class,) int64 each."""

    def count(classes: Counts, counts: Counts) -> Counts:
        return np.bincount(classes, counts, minlength=n_classes).astype(np.int64)

    right = confusion.truth == confusion.predicted
    return (
        count(confusion.truth, confusion.counts),
        count(confusion.truth[right], confusion.counts[right]),
        count(confusion.predicted, confusion.counts),
    )


def _by_class(class_names: tuple[str, ...], n: Counts, right: Counts, counted: Counts) -> tuple[ClassScore, ...]:
    """Each class with its samples, and how many were got `right` of those that are `counted`."""
    columns = zip(class_names, n.tolist(), right.tolist(), counted.tolist(), strict=True)
    return tuple(ClassScore(name=name, n=size, score=r / o if o else None) for name, size, r, o in columns)


def _worst(wrong: Counts, losses: Numbers) -> Counts:
    """The samples of highest loss, worst first; of equal losses, in the order of the samples."""
    worst: Counts = wrong[np.argsort(-losses[wrong], kind="stable")][:MAX_MISTAKES]
    return worst


def _patch_mistake(
    sample_id: str, loss: float, targets: Counts, predicted: Counts, class_names: tuple[str, ...]
) -> Mistake:
    known = targets != IGNORED
    wrong = known & (targets != predicted)
    pairs = Counter(zip(targets[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    (truth, answer), n = pairs.most_common(1)[0]
    return Mistake(
        sample_id=sample_id,
        loss=loss,
        truth=f"{int(wrong.sum())} of {int(known.sum())} patches wrong",
        answer=f"{class_names[truth]} taken for {class_names[answer]} in {n}",
    )


def _likely(class_names: tuple[str, ...], probabilities: Numbers) -> list[str]:
    """The labels that are predicted, the surest first."""
    order = np.argsort(-probabilities, kind="stable")
    return [f"{class_names[i]} ({_percent(probabilities[i])})" for i in order if probabilities[i] >= THRESHOLD]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LABELS} more" if len(names) > MAX_LABELS else ""
    return ", ".join(names[:MAX_LABELS]) + more or "none"


def _percent(probability: float) -> str:
    return f"{100 * probability:.0f}{SPACE}%"
