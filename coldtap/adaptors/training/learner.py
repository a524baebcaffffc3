"""What trains the networks of some trials: a step on a batch that all of them share, their logits, and their state."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

type Tensors = dict[str, torch.Tensor]


class Learner(Protocol):
    """Some trials' networks and optimizers, in the order of the plans that they were made of."""

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, before its first step."""

    def step(self, features: torch.Tensor, targets: torch.Tensor, rates: Sequence[float]) -> torch.Tensor:
        """Do one step of every trial.

        Args:
            features: (sample, *row shape) float32.
            targets: (sample, …) as the task has them.
            rates: The learning rate of each trial.

        Returns:
            (trial,) mean losses before the step, in nats, detached.
        """

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return what every network makes of a batch in eval mode: (trial, sample, [patch,] class)."""

    def state(self, trial: int) -> Tensors:
        """Copy a trial's weights (`model.*`) and moments (`exp_avg.*`, `exp_avg_sq.*`) to the CPU."""

    def restore(self, trial: int, state: Mapping[str, torch.Tensor], *, steps: int) -> None:
        """Put a trial back to a state that was copied after `steps` steps."""

    def weights(self, trial: int) -> Tensors:
        """Copy a trial's weights and buffers to the CPU, by name."""

    def keep(self, trials: Sequence[int]) -> None:
        """Go on with some of the trials, by their present numbers, ascending."""


def copy_to_cpu(value: torch.Tensor) -> torch.Tensor:
    """Copy a tensor: later steps do not touch the copy."""
    return value.detach().to("cpu", copy=True).contiguous()


def without_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
