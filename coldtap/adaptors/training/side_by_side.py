"""Trials one after the other on each batch: any networks, and each computes what it would compute alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from coldtap.adaptors.data.devices import seeded
from coldtap.adaptors.metrics.tasks import Task
from coldtap.adaptors.networks.contract import EpochAware, Penalised
from coldtap.adaptors.training.learner import Tensors, copy_to_cpu, without_prefix
from coldtap.adaptors.training.optimizer import make_optimizer
from coldtap.adaptors.training.plan import TrialPlan

FIRST_STEP_STREAM = 1  # random numbers of the start have stream 0, those of step k stream k + 1


class SideBySide:
    """Networks of any shapes, on the device, with their start or their weights."""

    def __init__(
        self, plans: Sequence[TrialPlan], networks: Sequence[nn.Module], task: Task, device: torch.device
    ) -> None:
        self._plans, self._networks, self._task, self._device = list(plans), list(networks), task, device
        self._optimizers = [
            make_optimizer(network, weight_decay=plan.settings.weight_decay)
            for plan, network in zip(plans, networks, strict=True)
        ]
        self._steps = 0

    def begin_epoch(self, epoch: int) -> None:
        """Tell networks that change with the epochs."""
        for plan, network in zip(self._plans, self._networks, strict=True):
            if isinstance(network, EpochAware):
                network.begin_epoch(epoch, plan.settings.epochs)

    def step(self, features: torch.Tensor, targets: torch.Tensor, rates: Sequence[float]) -> torch.Tensor:
        """Do one step of every trial; return the mean losses (trial,)."""
        losses = [
            self._step(trial, features, targets, rate)  # (): the mean over the batch
            for trial, rate in enumerate(rates)
        ]
        self._steps += 1
        return torch.stack(losses)

    def _step(self, trial: int, features: torch.Tensor, targets: torch.Tensor, rate: float) -> torch.Tensor:
        plan, network, optimizer = self._plans[trial], self._networks[trial].train(), self._optimizers[trial]
        settings = plan.settings
        for group in optimizer.param_groups:
            group["lr"] = rate
        if plan.options.is_random:
            # A stream a step: dropout is the same whether or not a run was interrupted, or has others beside it.
            with seeded(settings.seed, FIRST_STEP_STREAM + self._steps, self._device):
                logits = network(features)  # (sample, [patch,] class)
        else:
            logits = network(features)
        loss = self._task.losses(logits, targets, label_smoothing=settings.label_smoothing).mean()
        total = loss + network.penalty() if isinstance(network, Penalised) else loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return loss.detach()

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (trial, sample, [patch,] class) in eval mode."""
        with torch.inference_mode():
            return torch.stack([network.eval()(features) for network in self._networks])

    def state(self, trial: int) -> Tensors:
        """Copy a trial's weights and moments to the CPU."""
        network, optimizer = self._networks[trial], self._optimizers[trial]
        state = {f"model.{name}": value for name, value in self.weights(trial).items()}
        for name, parameter in network.named_parameters():
            moments = optimizer.state[parameter]
            state |= {f"{key}.{name}": copy_to_cpu(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
        return state

    def restore(self, trial: int, state: Mapping[str, torch.Tensor], *, steps: int) -> None:
        """Put a trial back to where it was."""
        network, optimizer = self._networks[trial], self._optimizers[trial]
        network.load_state_dict(without_prefix(state, "model."))
        for name, parameter in network.named_parameters():
            optimizer.state[parameter] = {
                # Beside the parameter and in float32, as the fused AdamW itself makes it.
                "step": torch.tensor(float(steps), device=parameter.device),
                "exp_avg": state[f"exp_avg.{name}"].to(parameter.device, copy=True),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device, copy=True),
            }
        self._steps = steps

    def weights(self, trial: int) -> Tensors:
        """Copy a trial's weights and buffers to the CPU."""
        return {name: copy_to_cpu(value) for name, value in self._networks[trial].state_dict().items()}

    def keep(self, trials: Sequence[int]) -> None:
        """Go on with some of the trials."""
        self._plans = [self._plans[trial] for trial in trials]
        self._networks = [self._networks[trial] for trial in trials]
        self._optimizers = [self._optimizers[trial] for trial in trials]
