"""The record of a trial: what `run.json` says of a finished one, `failed.json` of one that came to no end."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldtap.adaptors.data.memory import Residency
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.adaptors.runs.settings import RunSettings
from coldtap.stores.format.fields import require_types
from coldtap.stores.format.types import TargetKind

FORMAT = 4
READABLE = (1, 2, 3, FORMAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """One epoch: mean losses (nats), the deciding score on val, the last step's learning rate, and seconds.

    Loss and score on val are None where val is learnt from. The seconds of trials that share their batches are those of
    all of them.
    """

    epoch: int
    lr: float
    train_loss: float
    val_loss: float | None
    val_score: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMetrics:
    """How well an adaptor does on one split: the deciding score, all scores by name, in [0, 1]; mean loss (nats)."""

    score: float
    scores: Mapping[str, float]
    loss: float
    n_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """All that `run.json` says.

    `metric` names the deciding score; `class_names` is None where the source gave none; `mixing` says how far a block
    shuffle is from a uniform one; `model` is the backbone as the store's maker named it, a timm name with its
    pretrained tag, which the extractor's `architecture` leaves out; `trials` is the number of trials that shared
    batches, seconds and memory with this one; `seconds` is its share of theirs; it and `bytes_per_sample` (stored
    bytes of a sample's features) are 0 in formats 1 and 2; `compensation_sha256` is of the file of that name, None
    where there is none.
    """

    settings: RunSettings
    features: FeatureSpec
    target_kind: TargetKind
    metric: str
    n_classes: int
    class_names: tuple[str, ...] | None
    parameters: int
    metrics: Mapping[str, SplitMetrics]
    best_epoch: int
    epoch_seconds: float
    peak_memory_bytes: int
    device: str
    residency: Residency
    versions: Mapping[str, str]
    store: str
    model: str
    extractor: Mapping[str, Any]
    adaptor_sha256: str
    mixing: str | None = None
    trials: int = 1
    seconds: float = 0.0
    bytes_per_sample: float = 0.0
    compensation_sha256: str | None = None

    @property
    def extractor_digest(self) -> str:
        """Digest of the extractor whose features the adaptor was trained on: what `predict` compares."""
        return self.settings.extractor_digest

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        fields = dataclasses.asdict(self)
        fields["features"] = self.features.to_dict()
        fields["class_names"] = None if self.class_names is None else list(self.class_names)
        digests = {"extractor_digest": self.extractor_digest, "store_digest": self.settings.store_digest}
        return {"format": FORMAT, "adaptor": self.settings.adaptor, "seed": self.settings.seed, **digests, **fields}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "RunInfo":
        """Parse what `to_dict` gave; a missing or unknown key is a KeyError or TypeError."""
        repeated = ("format", "adaptor", "seed", "extractor_digest", "store_digest")
        fields = {name: value for name, value in record.items() if name not in repeated}
        names = fields["class_names"]
        fields = {"target_kind": "class", "metric": "top1", **fields}  # formats 1 and 2 knew no other
        parsed = {
            "settings": RunSettings.from_dict(fields["settings"]),
            "features": FeatureSpec.from_dict(fields["features"]),
            "class_names": None if names is None else tuple(names),
            "metrics": {split: _metrics(metrics) for split, metrics in fields["metrics"].items()},
            "residency": Residency(**fields["residency"]),
        }
        return require_types(cls(**{**fields, **parsed}))


def _metrics(record: Mapping[str, Any]) -> SplitMetrics:
    if "top1" in record:  # formats 1 and 2
        record = {
            "score": record["top1"],
            "scores": {"top1": record["top1"]},
            **{key: record[key] for key in ("loss", "n_samples")},
        }
    return SplitMetrics(**record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A trial that came to no end: why, and the seconds that it took."""

    settings: RunSettings
    reason: str
    seconds: float

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Failure":
        """Parse `failed.json`; a missing key is a KeyError."""
        settings = RunSettings.from_dict(record["settings"])
        return require_types(cls(settings=settings, reason=record["reason"], seconds=record["seconds"]))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `failed.json`."""
        fields = {"reason": self.reason, "seconds": self.seconds, "settings": dataclasses.asdict(self.settings)}
        return {"format": FORMAT, **fields}
