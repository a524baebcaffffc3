"""AdamW with decay on matrices only, for one network and for a stack of them; and the schedule of its rate."""

import math
from collections.abc import Sequence

import torch
from torch import nn

BETAS = (0.9, 0.999)
EPS = 1e-8


def learning_rate_at(step: int, *, steps: int, peak: float, warmup: float) -> float:
    """Return the learning rate of a step: up in a line over the first `warmup` of the steps, then down a half cosine.

    Args:
        step: Number of the step, from 0.
        steps: Steps of the whole run.
        peak: The highest rate.
        warmup: Share of the steps, in [0, 1).
    """
    rising = int(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return 0.5 * peak * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def decays(parameter: torch.Tensor) -> bool:
    """Return whether weight decay acts on a parameter: on matrices; biases and norms, of one axis, are left alone."""
    return parameter.ndim > 1


def make_optimizer(model: nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """Return torch's AdamW for one network."""
    groups = [
        {"params": [p for p in model.parameters() if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if not decays(p)], "weight_decay": 0.0},
    ]
    # Fused: one call for the hundreds of small tensors of a LAST, which else cost more than their arithmetic.
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, eps=EPS, fused=True)


class StackedAdamW:
    """AdamW (arXiv 1711.05101) over the flat parameters of several networks, each with its own rate and decay.

    torch's AdamW takes one rate a tensor, and one optimizer a network costs more calls than a small network's step.

    Attributes:
        exp_avg: First moments (trial, parameter).
        exp_avg_sq: Second moments (trial, parameter).
        steps: Steps done.
    """

    def __init__(self, values: torch.Tensor, *, decayed: torch.Tensor, weight_decay: Sequence[float]) -> None:
        """Take over the parameters.

        Args:
            values: (trial, parameter), changed in place by `step`.
            decayed: (parameter,) 1 where decay acts, 0 elsewhere.
            weight_decay: Of each trial.
        """
        self._values = values
        self._decay = values.new_tensor(weight_decay)[:, None] * decayed
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(values), torch.zeros_like(values)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: torch.Tensor, rates: Sequence[float]) -> None:
        """Move the parameters by gradients (trial, parameter), at each trial's learning rate."""
        self.steps += 1
        rate = self._values.new_tensor(rates)[:, None]
        first, second = BETAS
        self.exp_avg.lerp_(gradients, 1 - first)
        self.exp_avg_sq.mul_(second).addcmul_(gradients, gradients, value=1 - second)
        root = (self.exp_avg_sq / (1 - second**self.steps)).sqrt_().add_(EPS)
        self._values.mul_(1 - rate * self._decay)
        self._values.addcdiv_(self.exp_avg * (rate / (first**self.steps - 1)), root)
