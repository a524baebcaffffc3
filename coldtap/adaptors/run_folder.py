"""The run folder: what a finished training leaves behind, and how it is read back.

RUN/
  adaptor.safetensors   the best epoch's weights, with the backbone's final norm where the head uses it
  run.json              what was trained on what, and how well; written last: a run without it is unfinished
  epochs.csv            one line an epoch
  curves.png            the same as a picture
  checkpoint.safetensors   only while the run is unfinished

Format 1, of earlier versions, knew one shuffle, `uniform`, and no features on a GPU; it is read too.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldtap.adaptors.epoch_order import Shuffle
from coldtap.adaptors.memory import Residency
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.stores.canonical import readable_json
from coldtap.stores.durable import write_file
from coldtap.stores.errors import RunError

FORMAT = 2
READABLE = (1, FORMAT)
ADAPTOR = "adaptor.safetensors"
RUN = "run.json"
EPOCHS = "epochs.csv"
CURVES = "curves.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What decides a run's result, on one machine: two runs with equal settings end in equal weights."""

    adaptor: str
    options: Mapping[str, Any]
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float
    warmup: float
    seed: int
    store_digest: str
    extractor_digest: str
    shuffle: Shuffle = "uniform"

    def differences(self, other: "RunSettings") -> list[str]:
        """Returns each setting that differs in `other`, as `name: here → there`; of two adaptors, that alone."""
        if self.adaptor != other.adaptor:
            return [f"adaptor: {self.adaptor} → {other.adaptor}"]
        mine, theirs = _flat(self), _flat(other)
        return [f"{name}: {old} → {theirs[name]}" for name, old in mine.items() if old != theirs[name]]


def _flat(settings: RunSettings) -> dict[str, Any]:
    fields = dataclasses.asdict(settings)
    return {**fields.pop("options"), **fields}


def require_equal(old: RunSettings, new: RunSettings, out: Path) -> None:
    """Refuses to go on with, or to return, a run of other settings.

    Raises:
        RunError: Naming each setting that differs, old and new.
    """
    if different := old.differences(new):
        raise RunError(
            f"{out} holds a run of other settings: {'; '.join(different)}. Choose another --out, or delete it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """One epoch: mean losses (nats), accuracy on val as a fraction, the last step's learning rate, and seconds."""

    epoch: int
    lr: float
    train_loss: float
    val_loss: float
    val_top1: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMetrics:
    """How well an adaptor does on one split: accuracy as a fraction, mean cross-entropy in nats."""

    top1: float
    loss: float
    n_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """All that `run.json` says.

    `class_names` is None where the source gave none; `mixing` says how far a block shuffle is from a uniform one;
    `model` is the backbone as the store's maker named it, a timm name with its pretrained tag, which the extractor's
    `architecture` leaves out.
    """

    settings: RunSettings
    features: FeatureSpec
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

    @property
    def extractor_digest(self) -> str:
        """Digest of the extractor whose features the adaptor was trained on: what `predict` compares."""
        return self.settings.extractor_digest

    def to_dict(self) -> dict[str, Any]:
        """The content of `run.json`."""
        fields = dataclasses.asdict(self)
        fields["features"] = self.features.to_dict()
        fields["class_names"] = None if self.class_names is None else list(self.class_names)
        digests = {"extractor_digest": self.extractor_digest, "store_digest": self.settings.store_digest}
        return {"format": FORMAT, "adaptor": self.settings.adaptor, "seed": self.settings.seed, **digests, **fields}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "RunInfo":
        """Parses what `to_dict` gave; a missing or unknown key is a KeyError or TypeError."""
        repeated = ("format", "adaptor", "seed", "extractor_digest", "store_digest")
        fields = {name: value for name, value in record.items() if name not in repeated}
        names = fields["class_names"]
        parsed = {
            "settings": RunSettings(**fields["settings"]),
            "features": FeatureSpec.from_dict(fields["features"]),
            "class_names": None if names is None else tuple(names),
            "metrics": {split: SplitMetrics(**metrics) for split, metrics in fields["metrics"].items()},
            "residency": Residency(**fields["residency"]),
        }
        return cls(**{**fields, **parsed})


def read_run(folder: Path) -> RunInfo | None:
    """Returns what a finished run says of itself; None where there is no `run.json`.

    Raises:
        RunError: `run.json` is of another format version, or damaged.
    """
    path = folder / RUN
    try:
        record = json.loads(path.read_bytes())
        if record["format"] not in READABLE:
            raise RunError(f"{path} is of run format {record['format']!r}; this coldtap reads formats 1 to {FORMAT}")
        return RunInfo.from_dict(record)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise RunError(f"{path} is damaged ({error!r}): train again into another --out") from error


def write_run(folder: Path, info: RunInfo, weights: bytes, epochs: Sequence[EpochRecord], picture: bytes) -> None:
    """Writes a finished run, each file whole or not at all, `run.json` last.

    Raises:
        MachineError: The disk is full, read-only or refuses.
    """
    write_file(folder / ADAPTOR, [weights])
    write_file(folder / EPOCHS, [epochs_csv(epochs)])
    write_file(folder / CURVES, [picture])
    write_file(folder / RUN, [readable_json(info.to_dict())])


def epochs_csv(epochs: Sequence[EpochRecord]) -> bytes:
    """Returns the table of epochs as CSV, floats in the shortest text that reads back as the same number."""
    names = [field.name for field in dataclasses.fields(EpochRecord)]
    lines = [",".join(repr(getattr(record, name)) for name in names) for record in epochs]
    return "\n".join([",".join(names), *lines, ""]).encode()
