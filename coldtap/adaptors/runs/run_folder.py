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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load

from coldtap.adaptors.runs.record import FORMAT, READABLE, EpochRecord, Failure, RunInfo
from coldtap.errors import CorruptStoreError, RunError
from coldtap.stores.format.canonical import parse_json, readable_json
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage

ADAPTOR = "adaptor.safetensors"
COMPENSATION = "compensation.safetensors"
RUN = "run.json"
EPOCHS = "epochs.csv"
CURVES = "curves.png"
FAILED = "failed.json"


def read_run(run: Place) -> RunInfo | None:
    """Return what a finished run says of itself; None where there is no `run.json`.

    Args:
        run: The run folder, or its storage.

    Raises:
        RunError: `run.json` is of another format version, or damaged.
    """
    return _read(storage_at(run), RUN, RunInfo.from_dict)


def read_failure(run: Place) -> Failure | None:
    """Return what `failed.json` says of a trial that came to no end; None where there is none.

    Raises:
        RunError: `failed.json` is of another format version, or damaged.
    """
    return _read(storage_at(run), FAILED, Failure.from_dict)


def write_failure(run: Place, failure: Failure) -> None:
    """Write why a trial came to no end."""
    storage_at(run).put(FAILED, [readable_json(failure.to_dict())])


def _read[T](run: Storage, name: str, parse: Callable[[Mapping[str, Any]], T]) -> T | None:
    where = run.describe(name)
    try:
        record = parse_json(run.get(name))
        found = record["format"]
        if found in READABLE:
            return parse(record)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, CorruptStoreError) as error:
        raise RunError(f"{where} is damaged ({error!r}): train again into another `out`") from error
    raise RunError(
        f"{where} is of run format {found!r}; this coldtap reads formats 1 to {FORMAT}: use the coldtap that wrote "
        "it, or train again into another `out`"
    )


def write_run(
    run: Storage,
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
    run.put(ADAPTOR, [weights])
    if compensation is not None:
        run.put(COMPENSATION, [compensation])
    run.put(EPOCHS, [epochs_csv(epochs)])
    write_info(run, info)


def read_weights(run: Storage) -> dict[str, torch.Tensor]:
    """Return the weights of a run that this process has just read or written."""
    return load(run.get(ADAPTOR, limit=None))


def write_info(run: Storage, info: RunInfo) -> None:
    """Write `run.json`."""
    run.put(RUN, [readable_json(info.to_dict())])


def epochs_csv(epochs: Sequence[EpochRecord]) -> bytes:
    """Return the table of epochs as CSV, floats in the shortest text that reads back as the same number."""
    names = [field.name for field in dataclasses.fields(EpochRecord)]
    values = ([getattr(record, name) for name in names] for record in epochs)
    lines = [",".join("" if value is None else repr(value) for value in line) for line in values]
    return "\n".join([",".join(names), *lines, ""]).encode()


def read_epochs(run: Place) -> tuple[EpochRecord, ...]:
    """Return the epochs of a finished run, of any readable format.

    Raises:
        RunError: `epochs.csv` is missing or damaged.
    """
    storage = storage_at(run)
    try:
        lines = storage.get(EPOCHS).decode().splitlines()
        return tuple(_epoch(line) for line in csv.DictReader(lines))
    except (OSError, ValueError, KeyError, TypeError, csv.Error, CorruptStoreError) as error:
        where = storage.describe(EPOCHS)
        raise RunError(f"{where} cannot be read ({error}): train again into another `out`") from error


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
