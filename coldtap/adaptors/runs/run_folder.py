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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from coldtap.adaptors.runs.record import FORMAT, READABLE, EpochRecord, Failure, RunInfo
from coldtap.errors import RunError
from coldtap.stores.format.canonical import readable_json
from coldtap.stores.storage.atomic import write_file

ADAPTOR = "adaptor.safetensors"
COMPENSATION = "compensation.safetensors"
RUN = "run.json"
EPOCHS = "epochs.csv"
CURVES = "curves.png"
FAILED = "failed.json"


def read_run(folder: Path) -> RunInfo | None:
    """Return what a finished run says of itself; None where there is no `run.json`.

    Raises:
        RunError: `run.json` is of another format version, or damaged.
    """
    record = _read_json(folder / RUN)
    return None if record is None else _parsed(folder / RUN, RunInfo.from_dict, record)


def read_failure(folder: Path) -> Failure | None:
    """Return what `failed.json` says of a trial that came to no end; None where there is none.

    Raises:
        RunError: `failed.json` is of another format version, or damaged.
    """
    record = _read_json(folder / FAILED)
    return None if record is None else _parsed(folder / FAILED, Failure.from_dict, record)


def write_failure(folder: Path, failure: Failure) -> None:
    """Write why a trial came to no end."""
    write_file(folder / FAILED, [readable_json(failure.to_dict())])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
        found = record["format"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(f"{path} is damaged ({error!r}): train again into another `out`") from error
    if found not in READABLE:
        raise RunError(
            f"{path} is of run format {found!r}; this coldtap reads formats 1 to {FORMAT}: use the coldtap that "
            "wrote it, or train again into another `out`"
        )
    return dict(record)


def _parsed[T](path: Path, parse: Callable[[Mapping[str, Any]], T], record: Mapping[str, Any]) -> T:
    try:
        return parse(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): train again into another `out`") from error


def write_run(
    folder: Path,
    info: RunInfo,
    *,
    weights: bytes,
    compensation: bytes | None,
    epochs: Sequence[EpochRecord],
) -> None:
    """Write a finished run, each file whole or not at all, `run.json` last; its predictions are written before.

    Raises:
        MachineError: The disk is full, read-only or refuses.
    """
    write_file(folder / ADAPTOR, [weights])
    if compensation is not None:
        write_file(folder / COMPENSATION, [compensation])
    write_file(folder / EPOCHS, [epochs_csv(epochs)])
    write_info(folder, info)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run that this process has just read or written."""
    return load_file(folder / ADAPTOR)


def write_info(folder: Path, info: RunInfo) -> None:
    """Write `run.json`."""
    write_file(folder / RUN, [readable_json(info.to_dict())])


def epochs_csv(epochs: Sequence[EpochRecord]) -> bytes:
    """Return the table of epochs as CSV, floats in the shortest text that reads back as the same number."""
    names = [field.name for field in dataclasses.fields(EpochRecord)]
    values = ([getattr(record, name) for name in names] for record in epochs)
    lines = [",".join("" if value is None else repr(value) for value in line) for line in values]
    return "\n".join([",".join(names), *lines, ""]).encode()


def read_epochs(folder: Path) -> tuple[EpochRecord, ...]:
    """Return the epochs of a finished run, of any readable format.

    Raises:
        RunError: `epochs.csv` is missing or damaged.
    """
    path = folder / EPOCHS
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(_epoch(line) for line in csv.DictReader(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}): train again into another `out`") from error


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
