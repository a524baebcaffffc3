"""The state of unfinished trials between two steps: enough to go on as if nothing had happened.

One safetensors file for all trials that share batches, no pickle: of each trial the weights, the two moments of AdamW
and the kept weights so far; in the header the settings and the epochs as JSON.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from coldtap.adaptors.runs.run_folder import EpochRecord, RunSettings
from coldtap.adaptors.training.learner import Tensors, of_prefix
from coldtap.errors import RunError
from coldtap.stores.format.canonical import sha256
from coldtap.stores.storage.atomic import TEMPORARY_SUFFIX, write_file

FORMAT = 3
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialState:
    """One trial between two steps.

    `best` is the number of the epoch whose weights are kept, 0 before there are any. A trial learns no more once it has
    `ended`, or where `failure` says why it cannot; `seconds` is its share of the epochs so far. `loss` is the sum of
    the samples' losses (nats) in the epoch that is begun, as text, since it may be infinite. `tensors` holds `model.*`,
    `exp_avg.*`, `exp_avg_sq.*` (absent once it learns no more) and `kept.*`.
    """

    settings: RunSettings
    name: str
    records: tuple[EpochRecord, ...]
    best: int
    ended: bool
    failure: str | None
    seconds: float
    loss: str
    tensors: Mapping[str, torch.Tensor]

    def kept(self) -> Tensors:
        """Returns the weights that are kept so far, by name."""
        return of_prefix(self.tensors, "kept.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Trials after `epochs` epochs and the first `batches` batches of the next, which took `seconds`."""

    trials: tuple[TrialState, ...]
    epochs: int
    batches: int
    steps: int
    seconds: float


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, whole or not at all.

    Raises:
        MachineError: The disk is full, read-only or refuses.
    """
    tensors = {
        f"{number}.{name}": value
        for number, trial in enumerate(checkpoint.trials)
        for name, value in trial.tensors.items()
    }
    described = dataclasses.replace(
        checkpoint, trials=tuple(dataclasses.replace(trial, tensors={}) for trial in checkpoint.trials)
    )
    # safetensors checks its header only: a digest guards the numbers.
    state = {"format": FORMAT, "sha256": sha256(save(tensors)), **dataclasses.asdict(described)}
    write_file(folder / CHECKPOINT, [save(tensors, {"coldtap": json.dumps(state)})])


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Returns the checkpoint of unfinished trials, None where there is none.

    Raises:
        RunError: It is damaged or of another format version.
    """
    path = folder / CHECKPOINT
    try:
        data = path.read_bytes()
        tensors = load(data)
        state = _state_of(data)
        if state["format"] != FORMAT:
            raise RunError(
                f"{path} is of checkpoint format {state['format']!r}; this coldtap reads format {FORMAT}: go on with "
                "the coldtap that wrote it, or delete it to start again"
            )
        if state["sha256"] != sha256(save(tensors)):
            raise ValueError("its digest does not hold")
        trials = tuple(_trial(record, of_prefix(tensors, f"{n}.")) for n, record in enumerate(state["trials"]))
        numbers = {name: state[name] for name in ("epochs", "batches", "steps", "seconds")}
        return Checkpoint(trials=trials, **numbers)
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it to start again") from error


def remove_checkpoint(folder: Path) -> None:
    """Removes the checkpoint of finished trials, and what a death in its writing left."""
    for name in (CHECKPOINT, CHECKPOINT + TEMPORARY_SUFFIX):
        (folder / name).unlink(missing_ok=True)


def _trial(record: Mapping[str, Any], tensors: Tensors) -> TrialState:
    parsed = {
        "settings": RunSettings.from_dict(record["settings"]),
        "records": tuple(EpochRecord(**epoch) for epoch in record["records"]),
        "tensors": tensors,
    }
    return TrialState(**{**record, **parsed})


def _state_of(data: bytes) -> dict[str, Any]:
    """The JSON in a safetensors header: 8 bytes of length, then the header itself."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    state: dict[str, Any] = json.loads(header["__metadata__"]["coldtap"])
    return state
