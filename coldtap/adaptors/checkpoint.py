"""The state of an unfinished run after a whole epoch: enough to go on as if nothing had happened.

One safetensors file, no pickle: the weights, the two moments of AdamW, the best weights so far, and in the header
the settings and the epochs as JSON.
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

FORMAT = 1
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run after `len(epochs)` epochs.

    `tensors` holds `model.*`, `best.*` (weights by name) and `exp_avg.*`, `exp_avg_sq.*` (moments by parameter).
    """

    settings: RunSettings
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    steps: int
    tensors: Mapping[str, torch.Tensor]

    def best_weights(self) -> dict[str, torch.Tensor]:
        """Returns the weights of the best epoch, by name."""
        return _of_prefix(self.tensors, "best.")


def take_checkpoint(
    settings: RunSettings,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    *,
    epochs: tuple[EpochRecord, ...],
    best_epoch: int,
    best: Mapping[str, torch.Tensor],
    steps: int,
) -> Checkpoint:
    """Copies a run's state to the CPU: later steps do not touch it."""
    tensors = {f"model.{name}": _copy(value) for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        tensors |= {f"{key}.{name}": _copy(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
    return Checkpoint(settings=settings, epochs=epochs, best_epoch=best_epoch, steps=steps, tensors=tensors)


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
        if state["format"] != FORMAT:
            raise RunError(
                f"{path} is of checkpoint format {state['format']!r}; this coldtap reads format {FORMAT}: "
                "delete it to start the run again"
            )
        if state["sha256"] != sha256(save(tensors)):
            raise ValueError("its digest does not hold")
        return Checkpoint(
            settings=RunSettings(**state["settings"]),
            epochs=tuple(EpochRecord(**record) for record in state["epochs"]),
            best_epoch=state["best_epoch"],
            steps=state["steps"],
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
