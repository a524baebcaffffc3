"""What a report knows: runs grouped by the store and target that they were trained on.

Nothing here knows how a run folder is written; `reading` fills it, `page` and the pictures show it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from coldtap.stores.format.types import TargetKind

type Counts = np.ndarray[Any, np.dtype[np.int64]]

CLASS_SCORES: Mapping[TargetKind, str] = {"class": "accuracy", "labels": "AP", "token-class": "IoU"}
"""What is said of one class, by the kind of the target; AP is average precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPoint:
    """One epoch: mean losses (nats) and the deciding score on val as a fraction; None where there is no val."""

    epoch: int
    train_loss: float
    val_loss: float | None
    val_score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitScore:
    """How well a run does on one split: the deciding score and all others by name, as fractions; mean loss (nats)."""

    score: float
    others: Mapping[str, float]
    loss: float
    n_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One class: how many samples (or patches) are of it, and its score as a fraction, None where there are none."""

    name: str
    n: int
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Which class was taken for which: the pairs that occur, by class number, and how often: (pair,) int64 each."""

    truth: Counts
    predicted: Counts
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One sample that was got wrong: its loss (nats), its classes, and what was said of it."""

    sample_id: str
    loss: float
    truth: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The predictions of one split, summed up; `confusion` is None for several labels a sample.

    `mistakes` has the worst first, `n_wrong` counts all of them.
    """

    split: str
    kind: TargetKind
    n_samples: int
    n_wrong: int
    class_names: tuple[str, ...]
    classes: tuple[ClassScore, ...]
    confusion: Confusion | None
    mistakes: tuple[Mistake, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One finished run.

    `seconds` are those of training, of trials that shared a pass this one's share; `n_sharing` counts those trials, of
    all of which `epoch_seconds` and the memory are together. `bytes_per_sample` and `seconds` are None where the run
    does not say. `outcome` is a sentence where there are no predictions. `failed_seeds` are those with which a trial of
    the same setting came to no end.
    """

    name: str
    folder: str
    adaptor: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    command: str
    metric: str
    splits: Mapping[str, SplitScore]
    epochs: tuple[EpochPoint, ...]
    best_epoch: int
    parameters: int
    features: str
    bytes_per_sample: float | None
    epoch_seconds: float
    seconds: float | None
    peak_memory_bytes: int
    n_sharing: int
    residency: str
    device: str
    versions: Mapping[str, str]
    written: datetime
    backbone: str
    extractor_digest: str
    weights_digest: str
    adaptor_digest: str
    outcome: Outcome | str
    failed_seeds: tuple[int, ...]

    @property
    def val(self) -> float | None:
        """The deciding score on val, as a fraction."""
        return self.splits["val"].score if "val" in self.splits else None

    @property
    def test(self) -> float | None:
        """The deciding score on test, as a fraction."""
        return self.splits["test"].score if "test" in self.splits else None

    @property
    def is_refit(self) -> bool:
        """Return whether the run learnt from val too, as the second step of a protocol does."""
        return bool(self.settings["fit"] == "train+val")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """The runs on one target of one store, in the order of `by_setting`; `problem` says why it could not be read."""

    path: str
    digest: str
    target: str
    problem: str | None
    encoding: str | None
    runs: tuple[RunReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A folder without a finished run, and why it has none."""

    folder: str
    settings: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything on the page."""

    stores: tuple[StoreReport, ...]
    unfinished: tuple[Unfinished, ...]

    @property
    def runs(self) -> tuple[RunReport, ...]:
        """All finished runs, store by store."""
        return tuple(run for store in self.stores for run in store.runs)
