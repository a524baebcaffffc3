"""The state of unfinished trials between two steps: enough to go on as if nothing had happened.

One safetensors file for all trials that share batches, no pickle: of each trial the weights, the two moments of AdamW
and the kept weights so far; in the header the settings and the epochs as JSON.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from coldtap.adaptors.runs.record import EpochRecord
from coldtap.adaptors.runs.settings import RunSettings
from coldtap.adaptors.training.learner import Tensors, without_prefix
from coldtap.adaptors.training.state import TrialState
from coldtap.errors import CorruptStoreError, RunError
from coldtap.stores.format.canonical import parse_json, safetensors_header, sha256
from coldtap.stores.format.fields import require_types
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage

FORMAT = 3
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Trials after `epochs` epochs and the first `batches` batches of the next, which took `seconds`."""

    trials: tuple[TrialState, ...]
    epochs: int
    batches: int
    steps: int
    seconds: float


def write_checkpoint(folder: Storage, checkpoint: Checkpoint) -> None:
    """Write the checkpoint, whole or not at all.

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
    folder.put(CHECKPOINT, [save(tensors, {"coldtap": json.dumps(state)})])


def read_checkpoint(folder: Place) -> Checkpoint | None:
    """Return the checkpoint of unfinished trials, None where there is none.

    Raises:
        RunError: It is damaged or of another format version.
    """
    storage = storage_at(folder)
    where = storage.describe(CHECKPOINT)
    try:
        data = storage.get(CHECKPOINT, limit=None)
        tensors = load(data)
        state = _state_of(data)
        if state["format"] != FORMAT:
            raise RunError(
                f"{where} is of checkpoint format {state['format']!r}; this coldtap reads format {FORMAT}: go on with "
                "the coldtap that wrote it, or delete it to start again"
            )
        if state["sha256"] != sha256(save(tensors)):
            raise ValueError("its digest does not hold")
        trials = tuple(_trial(record, without_prefix(tensors, f"{n}.")) for n, record in enumerate(state["trials"]))
        numbers = {name: state[name] for name in ("epochs", "batches", "steps", "seconds")}
        return replace(require_types(Checkpoint(trials=(), **numbers)), trials=trials)
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError, CorruptStoreError) as error:
        raise RunError(f"{where} is damaged ({error}): delete it to start again") from error


def remove_checkpoint(folder: Storage) -> None:
    """Remove the checkpoint of finished trials, and what a death in its writing left."""
    folder.delete(CHECKPOINT)
    folder.sweep(CHECKPOINT)


def _trial(record: Mapping[str, Any], tensors: Tensors) -> TrialState:
    parsed = {
        "settings": RunSettings.from_dict(record["settings"]),
        "records": tuple(EpochRecord(**epoch) for epoch in record["records"]),
    }
    return replace(require_types(TrialState(**{**record, **parsed, "tensors": {}})), tensors=tensors)


def _state_of(data: bytes) -> dict[str, Any]:
    """The JSON in a safetensors header."""
    state: dict[str, Any] = parse_json(safetensors_header(data)["__metadata__"]["coldtap"])
    return state


class CheckpointWriter:
    """Writes the checkpoints of one pass, as often as is due.

    Attributes:
        last: The state after the last epoch, or the last one that was written inside one; None before there is any.
    """

    def __init__(self, folder: Storage, found: Checkpoint | None, *, every_s: float) -> None:
        """Begin to count.

        Args:
            folder: Where the checkpoint lies.
            found: The one that is there.
            every_s: Seconds between checkpoints at least, more where writing is slow.
        """
        self.last = self._written = found
        self._folder, self._every_s = folder, every_s
        self._written_at, self._write_s = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Return whether it is time to write."""
        # Every 5 s, as is the default, a write of more than 0.25 s takes a twentieth of the time and no more.
        return time.monotonic() - self._written_at >= self._every_s * max(1, 4 * self._write_s)

    def take(self, checkpoint: Checkpoint) -> None:
        """Remember a state, and write it if that is due."""
        self.last = checkpoint
        if self.is_due():
            began = time.monotonic()
            self.write_last()
            self._written_at = time.monotonic()
            self._write_s = self._written_at - began

    def write_last(self) -> None:
        """Write the last state, if it is not written."""
        if self.last is not None and self.last is not self._written:
            write_checkpoint(self._folder, self.last)
            self._written = self.last
