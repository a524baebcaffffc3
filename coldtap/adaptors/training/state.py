"""What changes of a trial while it learns: all that a checkpoint holds of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from coldtap.adaptors.runs.record import EpochRecord
from coldtap.adaptors.runs.settings import RunSettings
from coldtap.adaptors.training.learner import Tensors, without_prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialState:
    """One trial between two steps.

    `best` is the number of the epoch whose weights are kept, 0 before there are any. A trial learns no more once it has
    `ended`, or where `failure` says why it cannot; `seconds` is its share of the epochs so far. `loss` is the sum of
    the samples' losses (nats) in the epoch that is begun, as text, since it may be infinite. `tensors` holds `kept.*`,
    and in a checkpoint `model.*`, `exp_avg.*` and `exp_avg_sq.*` of a trial that learns; elsewhere its learner has
    them.
    """

    settings: RunSettings
    name: str
    records: tuple[EpochRecord, ...] = ()
    best: int = 0
    ended: bool = False
    failure: str | None = None
    seconds: float = 0.0
    loss: str = "0.0"
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Return whether there is a next step."""
        return not self.ended and self.failure is None

    def kept(self) -> Tensors:
        """Return the weights that are kept so far, by name."""
        return without_prefix(self.tensors, "kept.")

    def with_kept(self, weights: Mapping[str, torch.Tensor]) -> "TrialState":
        """Return the state with these weights kept, and without any others."""
        return replace(self, tensors={f"kept.{name}": value for name, value in weights.items()})

    def after_epoch(self, record: EpochRecord, *, seconds: float, weights: Callable[[], Tensors]) -> "TrialState":
        """Return the state after an epoch: failed, ended or going on, with its weights where they are kept.

        Args:
            record: The epoch.
            seconds: The trial's share of its time.
            weights: Gives the weights after the epoch.
        """
        settings, epoch = self.settings, record.epoch
        spent = replace(self, seconds=self.seconds + seconds)
        for what, loss in (("training", record.train_loss), ("val", record.val_loss)):
            if loss is not None and not math.isfinite(loss):
                return replace(spent, failure=_divergence(settings, loss, what, epoch))
        records = (*self.records, record)
        best = choose_epoch(records) if settings.keep == "best" else epoch
        stalled = settings.patience is not None and epoch - choose_epoch(records) >= settings.patience
        after = replace(spent, records=records, ended=stalled or epoch == settings.epochs)
        if best != epoch or (settings.keep == "last" and not after.ended):
            return after
        after = replace(after, best=epoch).with_kept(weights())
        if not all(value.isfinite().all() for value in after.tensors.values()):
            # With val its loss has said so; without val nothing has looked at the weights after the last step.
            return replace(after, failure=_divergence(settings, math.nan, "training", epoch))
        return after


def choose_epoch(records: Sequence[EpochRecord]) -> int:
    """Return the number of the epoch to keep: best val score, then lower val loss, then the earlier one.

    A score alone would tie often: a val split of 200 images knows 201 accuracies.
    """

    def rank(record: EpochRecord) -> tuple[float, float, int]:
        assert record.val_score is not None, "val chooses"
        assert record.val_loss is not None, "val chooses"
        return record.val_score, -record.val_loss, -record.epoch

    return max(records, key=rank).epoch


def _divergence(settings: RunSettings, loss: float, what: str, epoch: int) -> str:
    return (
        f"the {what} loss is {loss} in epoch {epoch} of {settings.epochs}, at lr={settings.lr:g}: train again with a "
        f"lower one, such as lr={settings.lr / 3:.1g}"
    )
