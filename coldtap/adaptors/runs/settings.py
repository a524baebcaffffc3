"""What decides a run's result."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coldtap.adaptors.data.epoch_order import Shuffle
from coldtap.errors import RunError
from coldtap.stores.format.fields import require_types
from coldtap.stores.storage.contract import Storage

type Fit = Literal["train", "train+val"]
type Keep = Literal["best", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What decides a run's result, on one machine: two runs with equal settings end in equal weights.

    `seed` decides the start and dropout; `order_seed` the order of samples and their views, so that trials with other
    seeds can share batches. `patience` is the number of epochs without a better val score after which a run ends.
    `fit` names the splits that are learnt from; with both there is no val, and the last epoch is kept. `compensation`
    names that of the store which features go through; the store's digest stands for its numbers.
    """

    adaptor: str
    options: Mapping[str, Any]
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float
    warmup: float
    seed: int
    order_seed: int
    store_digest: str
    extractor_digest: str
    shuffle: Shuffle = "uniform"
    target: str = "label"
    label_smoothing: float = 0.0
    patience: int | None = None
    fit: Fit = "train"
    keep: Keep = "best"
    compensation: str | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "RunSettings":
        """Parse what `dataclasses.asdict` gave, in any readable format; an unknown key is a TypeError."""
        # Formats 1 and 2 had one seed for everything; the other new settings had no other value than their defaults.
        return require_types(cls(**{"order_seed": record["seed"], **record}))

    def differences(self, other: "RunSettings") -> list[str]:
        """Return each setting that differs in `other`, as `name: here → there`; of two adaptors, that alone."""
        if self.adaptor != other.adaptor:
            return [f"adaptor: {self.adaptor} → {other.adaptor}"]
        mine, theirs = _flat(self), _flat(other)
        names = dict.fromkeys([*mine, *theirs])  # another coldtap's adaptor may have another option
        return [
            f"{name}: {mine.get(name)} → {theirs.get(name)}" for name in names if mine.get(name) != theirs.get(name)
        ]


def _flat(settings: RunSettings) -> dict[str, Any]:
    fields = dataclasses.asdict(settings)
    return {**fields.pop("options"), **fields}


def require_equal(old: RunSettings, new: RunSettings, out: Storage) -> None:
    """Refuse to go on with, or to return, a run of other settings.

    Raises:
        RunError: Naming each setting that differs, old and new.
    """
    if different := old.differences(new):
        raise RunError(
            f"{out} holds a run of other settings: {'; '.join(different)}. Choose another `out`, or delete it"
        )
