"""The networks of some trials: a step on a batch that all of them share, their logits, and their state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from coldtap.adaptors.data.devices import seeded
from coldtap.adaptors.metrics.tasks import Task
from coldtap.adaptors.networks.contract import EpochAware, Penalised
from coldtap.adaptors.runs.run_folder import RunSettings
from coldtap.adaptors.training.optimizer import make_optimizer

type Tensors = dict[str, torch.Tensor]

FIRST_STEP_STREAM = 1  # random numbers of the start have stream 0, those of step k stream k + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A trial as a learner sees it: its settings and its network, on the device, with its start or its weights.

    `is_random` says that its steps draw random numbers, `can_stack` that its kind can be computed as one with others.
    """

    settings: RunSettings
    network: nn.Module
    is_random: bool
    can_stack: bool


class Learner(Protocol):
    """Some trials' networks and optimizers. The order of trials is that of the members they were made of."""

    def begin_epoch(self, epoch: int) -> None:
        """Is called before the first step of an epoch."""

    def step(self, features: torch.Tensor, targets: torch.Tensor, rates: Sequence[float]) -> torch.Tensor:
        """Does one step of every trial; returns the mean losses (trial,) before it, in nats, detached."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Returns what every network makes of a batch in eval mode: (trial, sample, [patch,] class)."""

    def state(self, trial: int) -> Tensors:
        """Copies a trial's weights (`model.*`) and moments (`exp_avg.*`, `exp_avg_sq.*`) to the CPU."""

    def restore(self, trial: int, state: Mapping[str, torch.Tensor], *, steps: int) -> None:
        """Puts a trial back to a state that was copied after `steps` steps."""

    def weights(self, trial: int) -> Tensors:
        """Copies a trial's weights and buffers to the CPU, by name."""

    def keep(self, trials: Sequence[int]) -> None:
        """Goes on with some of the trials, by their present numbers, ascending."""


class SideBySide:
    """Networks of any shapes, one after the other on each batch: what each computes is what it would compute alone."""

    def __init__(self, members: Sequence[Member], task: Task, device: torch.device) -> None:
        self._members, self._task, self._device = list(members), task, device
        self._optimizers = [
            make_optimizer(member.network, weight_decay=member.settings.weight_decay) for member in members
        ]
        self._steps = 0

    def begin_epoch(self, epoch: int) -> None:
        """Tells networks that change with the epochs."""
        for member in self._members:
            if isinstance(member.network, EpochAware):
                member.network.begin_epoch(epoch, member.settings.epochs)

    def step(self, features: torch.Tensor, targets: torch.Tensor, rates: Sequence[float]) -> torch.Tensor:
        """Does one step of every trial; returns the mean losses (trial,)."""
        losses = [
            self._step(member, optimizer, features, targets, rate)
            for member, optimizer, rate in zip(self._members, self._optimizers, rates, strict=True)
        ]
        self._steps += 1
        return torch.stack(losses)

    def _step(
        self,
        member: Member,
        optimizer: torch.optim.AdamW,
        features: torch.Tensor,
        targets: torch.Tensor,
        rate: float,
    ) -> torch.Tensor:
        network, settings = member.network.train(), member.settings
        for group in optimizer.param_groups:
            group["lr"] = rate
        if member.is_random:
            # A stream a step: dropout is the same whether or not a run was interrupted, or has others beside it.
            with seeded(settings.seed, FIRST_STEP_STREAM + self._steps, self._device):
                logits = network(features)
        else:
            logits = network(features)
        loss = self._task.losses(logits, targets, label_smoothing=settings.label_smoothing).mean()
        total = loss + network.penalty() if isinstance(network, Penalised) else loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return loss.detach()

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Returns logits (trial, sample, [patch,] class) in eval mode."""
        with torch.inference_mode():
            return torch.stack([member.network.eval()(features) for member in self._members])

    def state(self, trial: int) -> Tensors:
        """Copies a trial's weights and moments to the CPU."""
        network, optimizer = self._members[trial].network, self._optimizers[trial]
        state = {f"model.{name}": value for name, value in self.weights(trial).items()}
        for name, parameter in network.named_parameters():
            moments = optimizer.state[parameter]
            state |= {f"{key}.{name}": copy_to_cpu(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
        return state

    def restore(self, trial: int, state: Mapping[str, torch.Tensor], *, steps: int) -> None:
        """Puts a trial back to where it was."""
        network, optimizer = self._members[trial].network, self._optimizers[trial]
        network.load_state_dict(of_prefix(state, "model."))
        for name, parameter in network.named_parameters():
            optimizer.state[parameter] = {
                # Beside the parameter and in float32, as the fused AdamW itself makes it.
                "step": torch.tensor(float(steps), device=parameter.device),
                "exp_avg": state[f"exp_avg.{name}"].to(parameter.device, copy=True),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device, copy=True),
            }
        self._steps = steps

    def weights(self, trial: int) -> Tensors:
        """Copies a trial's weights and buffers to the CPU."""
        return {name: copy_to_cpu(value) for name, value in self._members[trial].network.state_dict().items()}

    def keep(self, trials: Sequence[int]) -> None:
        """Goes on with some of the trials."""
        self._members = [self._members[trial] for trial in trials]
        self._optimizers = [self._optimizers[trial] for trial in trials]


def copy_to_cpu(value: torch.Tensor) -> torch.Tensor:
    """Copies a tensor: later steps do not touch the copy."""
    return value.detach().to("cpu", copy=True).contiguous()


def of_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """Returns the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
