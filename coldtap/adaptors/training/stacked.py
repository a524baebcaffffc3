"""Trials of one shape as one batched computation: their parameters stacked, each operation done for all at once."""

import copy
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import nn

from coldtap.adaptors.metrics.tasks import Task
from coldtap.adaptors.networks.contract import EpochAware, Penalised
from coldtap.adaptors.training.learner import Tensors, copy_to_cpu
from coldtap.adaptors.training.optimizer import StackedAdamW, decays
from coldtap.adaptors.training.plan import TrialPlan

# On a CPU a stack saves calls and loses the cache. Measured (docs/log.md): features of more values per sample than this
# are faster side by side.
CPU_STACK_VALUES = 8192


def can_stack(plan: TrialPlan, network: nn.Module) -> bool:
    """Return whether a trial may be computed as one with others that are alike."""
    return not (plan.kind.cannot_stack or plan.options.is_random or isinstance(network, Penalised | EpochAware))


def are_alike(a: TrialPlan, b: TrialPlan, networks: tuple[nn.Module, nn.Module]) -> bool:
    """Return whether two trials have equal shapes, losses and buffers, so that only weights and rates differ."""
    return (
        a.settings.adaptor == b.settings.adaptor
        and a.settings.options == b.settings.options
        and a.settings.label_smoothing == b.settings.label_smoothing
        and _equal_buffers(*networks)
    )


def _equal_buffers(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.named_buffers(), b.named_buffers(), strict=True)
    return all(mine == theirs and torch.equal(values, others) for (mine, values), (theirs, others) in pairs)


def is_faster_stacked(row_shape: Sequence[int], device: torch.device) -> bool:
    """Return whether networks over features of a shape (without the batch axis) are faster as a stack."""
    return device.type == "cuda" or prod(row_shape) <= CPU_STACK_VALUES


class Stacked:
    """Networks of one shape; equal to `SideBySide` up to rounding."""

    def __init__(
        self, plans: Sequence[TrialPlan], networks: Sequence[nn.Module], task: Task, device: torch.device
    ) -> None:
        first = networks[0]
        self._task, self._label_smoothing = task, plans[0].settings.label_smoothing
        self._decays = [plan.settings.weight_decay for plan in plans]
        self._shapes = {name: parameter.shape for name, parameter in first.named_parameters()}
        self._sizes = [prod(shape) for shape in self._shapes.values()]
        self._decayed = torch.cat(
            [torch.full((p.numel(),), float(decays(p)), device=device) for p in first.parameters()]
        )
        self._buffers = {name: value.detach().clone() for name, value in first.named_buffers()}
        flats = [torch.cat([p.detach().reshape(-1) for p in network.parameters()]) for network in networks]
        self._skeleton = copy.deepcopy(first).to("meta")  # its forward pass, without its numbers
        self._take(torch.stack(flats))

    def _take(self, values: torch.Tensor) -> None:
        """Make parameters (trial, parameter) the stack's own."""
        self._values = values
        parts = zip(self._shapes.items(), values.split(self._sizes, dim=1), strict=True)
        self._parameters = {name: part.view(-1, *shape).requires_grad_() for (name, shape), part in parts}
        self._optimizer = StackedAdamW(values, decayed=self._decayed, weight_decay=self._decays)

    def begin_epoch(self, epoch: int) -> None:
        """Do nothing: networks that change with the epochs are not stacked."""

    def step(self, features: torch.Tensor, targets: torch.Tensor, rates: Sequence[float]) -> torch.Tensor:
        """Do one step of every trial; return the mean losses (trial,)."""
        self._skeleton.train()
        losses = self._losses(self._forward(features), targets)  # (trial,)
        gradients = torch.autograd.grad(losses.sum(), list(self._parameters.values()))
        self._optimizer.step(
            torch.cat([gradient.flatten(1) for gradient in gradients], dim=1), rates
        )  # (trial, parameter)
        return losses.detach()

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        trials = len(logits)
        repeated = targets.expand(trials, *targets.shape).flatten(0, 1)  # (trial · sample, …)
        losses = self._task.losses(logits.flatten(0, 1), repeated, label_smoothing=self._label_smoothing)
        return losses.view(trials, -1).mean(dim=1)

    def _forward(self, features: torch.Tensor) -> torch.Tensor:
        def forward(parameters: Tensors) -> torch.Tensor:
            logits: torch.Tensor = torch.func.functional_call(self._skeleton, (parameters, self._buffers), (features,))
            return logits

        logits: torch.Tensor = torch.func.vmap(forward)(self._parameters)
        return logits

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (trial, sample, [patch,] class) in eval mode."""
        self._skeleton.eval()
        with torch.no_grad():
            return self._forward(features)

    def state(self, trial: int) -> Tensors:
        """Copy a trial's weights and moments to the CPU."""
        state = {f"model.{name}": value for name, value in self.weights(trial).items()}
        for key, moments in (("exp_avg", self._optimizer.exp_avg), ("exp_avg_sq", self._optimizer.exp_avg_sq)):
            state |= {f"{key}.{name}": copy_to_cpu(value) for name, value in self._by_name(moments[trial]).items()}
        return state

    def restore(self, trial: int, state: Mapping[str, torch.Tensor], *, steps: int) -> None:
        """Put a trial back to where it was."""
        flats = {"model": self._values, "exp_avg": self._optimizer.exp_avg, "exp_avg_sq": self._optimizer.exp_avg_sq}
        with torch.no_grad():
            for key, flat in flats.items():
                for name, value in self._by_name(flat[trial]).items():
                    value.copy_(state[f"{key}.{name}"])
        self._optimizer.steps = steps

    def weights(self, trial: int) -> Tensors:
        """Copy a trial's weights and buffers to the CPU."""
        parameters = self._by_name(self._values[trial])
        return {name: copy_to_cpu(value) for name, value in {**parameters, **self._buffers}.items()}

    def _by_name(self, flat: torch.Tensor) -> Tensors:
        """Views of one trial's flat numbers (parameter,), by name."""
        parts = zip(self._shapes.items(), flat.detach().split(self._sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def keep(self, trials: Sequence[int]) -> None:
        """Go on with some of the trials."""
        chosen = torch.tensor(trials, device=self._values.device)
        old = self._optimizer
        self._decays = [self._decays[trial] for trial in trials]
        self._take(self._values.detach().index_select(0, chosen))
        self._optimizer.exp_avg = old.exp_avg.index_select(0, chosen)
        self._optimizer.exp_avg_sq = old.exp_avg_sq.index_select(0, chosen)
        self._optimizer.steps = old.steps
