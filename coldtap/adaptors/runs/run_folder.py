"""The run folder: what a finished training leaves behind, and how it is read back.

RUN/
  adaptor.safetensors   the weights that were kept, with the backbone's final norm where the head uses it
  compensation.safetensors   the map that features went through, of a run that has one: scale, offset (tap, channel)
  predictions.parquet   one line a sample of each split that was evaluated
  epochs.csv            one line an epoch
  curves.png            the same as a picture; a run that was trained beside others shares theirs
  run.json              what was trained on what, and how well; written last: a run without it is unfinished
  failed.json           instead of all of these: why a trial came to no end
  checkpoint.safetensors   only while the run is unfinished

Formats 1 to 3, of earlier versions, are read too: 1 and 2 knew single labels and one way to fit, 3 no compensation.
"""

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coldtap.adaptors.data.epoch_order import Shuffle
from coldtap.adaptors.data.memory import Residency
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.errors import RunError
from coldtap.stores.format.canonical import readable_json
from coldtap.stores.format.types import TargetKind
from coldtap.stores.storage.atomic import write_file

FORMAT = 4
READABLE = (1, 2, 3, FORMAT)
ADAPTOR = "adaptor.safetensors"
COMPENSATION = "compensation.safetensors"
RUN = "run.json"
EPOCHS = "epochs.csv"
CURVES = "curves.png"
FAILED = "failed.json"

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
        """Parses what `dataclasses.asdict` gave, in any readable format; an unknown key is a TypeError."""
        # Formats 1 and 2 had one seed for everything; the other new settings had no other value than their defaults.
        return cls(**{"order_seed": record["seed"], **record})

    def differences(self, other: "RunSettings") -> list[str]:
        """Returns each setting that differs in `other`, as `name: here → there`; of two adaptors, that alone."""
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
        fields = {"target_kind": "class", "metric": "top1", **fields}  # formats 1 and 2 knew no other
        parsed = {
            "settings": RunSettings.from_dict(fields["settings"]),
            "features": FeatureSpec.from_dict(fields["features"]),
            "class_names": None if names is None else tuple(names),
            "metrics": {split: _metrics(metrics) for split, metrics in fields["metrics"].items()},
            "residency": Residency(**fields["residency"]),
        }
        return cls(**{**fields, **parsed})


def _metrics(record: Mapping[str, Any]) -> SplitMetrics:
    if "top1" in record:  # formats 1 and 2
        record = {
            "score": record["top1"],
            "scores": {"top1": record["top1"]},
            **{key: record[key] for key in ("loss", "n_samples")},
        }
    return SplitMetrics(**record)


def read_run(folder: Path) -> RunInfo | None:
    """Returns what a finished run says of itself; None where there is no `run.json`.

    Raises:
        RunError: `run.json` is of another format version, or damaged.
    """
    record = _read_json(folder / RUN)
    return None if record is None else _parsed(folder / RUN, RunInfo.from_dict, record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A trial that came to no end: why, and the seconds that it took."""

    settings: RunSettings
    reason: str
    seconds: float


def read_failure(folder: Path) -> Failure | None:
    """Returns what `failed.json` says of a trial that came to no end; None where there is none.

    Raises:
        RunError: `failed.json` is of another format version, or damaged.
    """
    record = _read_json(folder / FAILED)
    return None if record is None else _parsed(folder / FAILED, _failure, record)


def _failure(record: Mapping[str, Any]) -> Failure:
    settings = RunSettings.from_dict(record["settings"])
    return Failure(settings=settings, reason=record["reason"], seconds=record["seconds"])


def write_failure(folder: Path, settings: RunSettings, reason: str, *, seconds: float) -> None:
    """Writes why a trial came to no end."""
    record = {"format": FORMAT, "reason": reason, "seconds": seconds, "settings": dataclasses.asdict(settings)}
    write_file(folder / FAILED, [readable_json(record)])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
        found = record["format"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(f"{path} is damaged ({error!r}): train again into another --out") from error
    if found not in READABLE:
        raise RunError(
            f"{path} is of run format {found!r}; this coldtap reads formats 1 to {FORMAT}: use the coldtap that "
            "wrote it, or train again into another --out"
        )
    return dict(record)


def _parsed[T](path: Path, parse: Callable[[Mapping[str, Any]], T], record: Mapping[str, Any]) -> T:
    try:
        return parse(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): train again into another --out") from error


def write_run(
    folder: Path,
    info: RunInfo,
    *,
    weights: bytes,
    compensation: bytes | None,
    epochs: Sequence[EpochRecord],
    picture: bytes | None,
) -> None:
    """Writes a finished run, each file whole or not at all, `run.json` last; its predictions are written before.

    Raises:
        MachineError: The disk is full, read-only or refuses.
    """
    write_file(folder / ADAPTOR, [weights])
    if compensation is not None:
        write_file(folder / COMPENSATION, [compensation])
    write_file(folder / EPOCHS, [epochs_csv(epochs)])
    if picture is not None:
        write_file(folder / CURVES, [picture])
    write_info(folder, info)


def write_info(folder: Path, info: RunInfo) -> None:
    """Writes `run.json`."""
    write_file(folder / RUN, [readable_json(info.to_dict())])


def epochs_csv(epochs: Sequence[EpochRecord]) -> bytes:
    """Returns the table of epochs as CSV, floats in the shortest text that reads back as the same number."""
    names = [field.name for field in dataclasses.fields(EpochRecord)]
    values = ([getattr(record, name) for name in names] for record in epochs)
    lines = [",".join("" if value is None else repr(value) for value in line) for line in values]
    return "\n".join([",".join(names), *lines, ""]).encode()


def read_epochs(folder: Path) -> tuple[EpochRecord, ...]:
    """Returns the epochs of a finished run, of any readable format.

    Raises:
        RunError: `epochs.csv` is missing or damaged.
    """
    path = folder / EPOCHS
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(_epoch(line) for line in csv.DictReader(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}): train again into another --out") from error


def _epoch(line: Mapping[str, str]) -> EpochRecord:
    score = line["val_score"] if "val_score" in line else line["val_top1"]  # formats 1 and 2
    return EpochRecord(
        epoch=int(line["epoch"]),
        lr=float(line["lr"]),
        train_loss=float(line["train_loss"]),
        val_loss=float(line["val_loss"]) if line["val_loss"] else None,
        val_score=float(score) if score else None,
        seconds=float(line["seconds"]),
    )
