"""The state of an unfinished run between two steps: enough to go on as if nothing had happened.

One safetensors file, no pickle: the weights, the two moments of AdamW, the best weights so far, the state of torch's
random numbers inside an epoch, and in the header the settings and the epochs as JSON.

Format 1, of earlier versions, knew whole epochs and uniform shuffles only; it is read too.
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
from torch import nn

from coldtap.adaptors.run_folder import EpochRecord, RunSettings
from coldtap.stores.canonical import sha256
from coldtap.stores.durable import TEMPORARY_SUFFIX, write_file
from coldtap.stores.errors import RunError

FORMAT = 2
READABLE = (1, FORMAT)
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPart:
    """The first batches of an epoch: how many, the sum of their samples' losses (nats), and seconds."""

    batches: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run after `len(epochs)` epochs and, where there is one, a part of the next.

    `tensors` holds `model.*`, `best.*` (weights by name; none in the first epoch), `exp_avg.*`, `exp_avg_sq.*` (moments
    by parameter), and with a part `random.*` (states of torch's generators). `best_epoch` is 0 in the first epoch.
    """

    settings: RunSettings
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    steps: int
    part: EpochPart | None
    tensors: Mapping[str, torch.Tensor]

    def best_weights(self) -> dict[str, torch.Tensor]:
        """Returns the weights of the best epoch, by name."""
        return _of_prefix(self.tensors, "best.")

    def random_states(self) -> dict[str, torch.Tensor]:
        """Returns the states of torch's generators inside the epoch, by device type."""
        return _of_prefix(self.tensors, "random.")


def take_checkpoint(
    settings: RunSettings,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    *,
    epochs: tuple[EpochRecord, ...],
    best_epoch: int,
    best: Mapping[str, torch.Tensor],
    steps: int,
    part: EpochPart | None = None,
    random_states: Mapping[str, torch.Tensor] | None = None,
) -> Checkpoint:
    """Copies a run's state to the CPU: later steps do not touch it."""
    tensors = {f"model.{name}": _copy(value) for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    tensors |= {f"random.{name}": value for name, value in (random_states or {}).items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        tensors |= {f"{key}.{name}": _copy(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
    return Checkpoint(settings=settings, epochs=epochs, best_epoch=best_epoch, steps=steps, part=part, tensors=tensors)


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies a module's weights and buffers to the CPU, by name."""
    return {name: _copy(value) for name, value in model.state_dict().items()}


def restore_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Puts weights and moments back to where they were."""
    model.load_state_dict(_of_prefix(checkpoint.tensors, "model."))
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            # Beside the parameter and in float32, as the fused AdamW itself makes it.
            "step": torch.tensor(float(checkpoint.steps), device=parameter.device),
            "exp_avg": checkpoint.tensors[f"exp_avg.{name}"].to(parameter.device, copy=True),
            "exp_avg_sq": checkpoint.tensors[f"exp_avg_sq.{name}"].to(parameter.device, copy=True),
        }


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, whole or not at all.

    Raises:
        MachineError: The disk is full, read-only or refuses.
    """
    state = {
        "format": FORMAT,
        "settings": dataclasses.asdict(checkpoint.settings),
        "epochs": [dataclasses.asdict(record) for record in checkpoint.epochs],
        "best_epoch": checkpoint.best_epoch,
        "steps": checkpoint.steps,
        "part": None if checkpoint.part is None else dataclasses.asdict(checkpoint.part),
    }
    tensors = dict(checkpoint.tensors)
    # safetensors checks its header only: a digest guards the numbers.
    state["sha256"] = sha256(save(tensors))
    write_file(folder / CHECKPOINT, [save(tensors, {"coldtap": json.dumps(state)})])


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Returns the checkpoint of an unfinished run, None where there is none.

    Raises:
        RunError: It is damaged or of another format version.
    """
    path = folder / CHECKPOINT
    try:
        data = path.read_bytes()
        tensors = load(data)
        state = _state_of(data)
        if state["format"] not in READABLE:
            raise RunError(
                f"{path} is of checkpoint format {state['format']!r}; this coldtap reads formats 1 to {FORMAT}: "
                "delete it to start the run again"
            )
        if state["sha256"] != sha256(save(tensors)):
            raise ValueError("its digest does not hold")
        return Checkpoint(
            settings=RunSettings(**state["settings"]),  # format 1 lacks the shuffle: its default was the only one
            epochs=tuple(EpochRecord(**record) for record in state["epochs"]),
            best_epoch=state["best_epoch"],
            steps=state["steps"],
            part=EpochPart(**state["part"]) if state["format"] > 1 and state["part"] is not None else None,
            tensors=tensors,
        )
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it to start the run again") from error


def remove_checkpoint(folder: Path) -> None:
    """Removes the checkpoint of a run that is finished, and what a death in its writing left."""
    for name in (CHECKPOINT, CHECKPOINT + TEMPORARY_SUFFIX):
        (folder / name).unlink(missing_ok=True)


def _state_of(data: bytes) -> dict[str, Any]:
    """The JSON in a safetensors header: 8 bytes of length, then the header itself."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    state: dict[str, Any] = json.loads(header["__metadata__"]["coldtap"])
    return state


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _of_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
