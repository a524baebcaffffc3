"""One network, its optimizer and its schedule: an epoch of steps, and a pass of evaluation."""

import math
from collections.abc import Callable, Iterable
from contextlib import closing

import torch
from torch import nn
from torch.nn import functional as F

from coldtap.adaptors.batches import Batch, FeatureBatches
from coldtap.adaptors.checkpoint import Checkpoint, EpochPart
from coldtap.adaptors.devices import restore_random_states, seeded
from coldtap.adaptors.run_folder import RunSettings, SplitMetrics
from coldtap.stores.errors import RunError


def learning_rate_at(step: int, *, steps: int, peak: float, warmup: float) -> float:
    """Returns the learning rate of a step: up in a line over the first `warmup` of the steps, then down a half cosine.

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


def make_optimizer(model: nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """Returns AdamW with decay on matrices only: biases and norms, of one axis, are left alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    # Fused: one call for the hundreds of small tensors of a LAST, which else cost more than their arithmetic.
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


class Fitter:
    """Fits a network by the settings of a run.

    Attributes:
        steps: The optimizer's steps so far.
        epoch_batches: Those of the epoch that is being fitted.
        epoch_loss: The sum of its samples' losses (nats).
    """

    def __init__(self, model: nn.Module, settings: RunSettings, device: torch.device, *, n_batches: int) -> None:
        self.model, self.settings, self.device = model, settings, device
        self.optimizer = make_optimizer(model, weight_decay=settings.weight_decay)
        self.total_steps = settings.epochs * n_batches
        self.steps = 0
        self.epoch_batches = 0
        self.epoch_loss = torch.zeros((), dtype=torch.float64, device=device)
        self.lr = 0.0

    def fit_epoch(
        self,
        batches: FeatureBatches,
        epoch: int,
        *,
        after: Checkpoint | None = None,
        between_steps: Callable[[], None] | None = None,
    ) -> float:
        """Trains on every sample once; returns the mean loss (nats).

        Args:
            batches: Of the train split.
            epoch: The epoch's number, from 1.
            after: The state inside this epoch that was restored, if it does not begin anew.
            between_steps: Called after every step but the last of the epoch.

        Raises:
            RunError: The loss is no longer finite.
        """
        self.model.train()
        part = after.part if after is not None and after.part is not None else EpochPart(batches=0, loss=0, seconds=0)
        self.epoch_batches = part.batches
        self.epoch_loss = torch.tensor(part.loss, dtype=torch.float64, device=self.device)
        order = batches.shuffled(seed=self.settings.seed, epoch=epoch, start_batch=part.batches)
        with seeded(self.settings.seed, epoch, self.device), closing(order):
            if after is not None and after.part is not None:
                restore_random_states(after.random_states(), self.device)
            for batch in order:
                self.epoch_loss += self._step(batch) * len(batch.targets)
                self.epoch_batches += 1
                if between_steps is not None and self.epoch_batches < batches.n_batches:
                    between_steps()
        return self.loss_so_far(epoch) / batches.n_samples

    def loss_so_far(self, epoch: int) -> float:
        """Returns the sum of the epoch's losses (nats).

        Raises:
            RunError: It is no longer finite.
        """
        return self._finite(float(self.epoch_loss), "training", epoch)

    def _step(self, batch: Batch) -> torch.Tensor:
        settings = self.settings
        self.lr = learning_rate_at(self.steps, steps=self.total_steps, peak=settings.lr, warmup=settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        logits = self.model(batch.features.to(self.device))
        loss = F.cross_entropy(logits, batch.targets.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    def evaluate(self, batches: Iterable[Batch], *, split: str, epoch: int) -> SplitMetrics:
        """Returns accuracy and mean loss over some batches.

        Raises:
            RunError: The loss is not finite.
        """
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        n_samples = 0
        with torch.inference_mode():
            for batch in batches:
                targets = batch.targets.to(self.device)
                logits = self.model(batch.features.to(self.device))
                loss += F.cross_entropy(logits, targets, reduction="sum")
                right += (logits.argmax(dim=1) == targets).sum()
                n_samples += len(targets)
        mean = self._finite(float(loss) / n_samples, split, epoch)
        return SplitMetrics(top1=int(right) / n_samples, loss=mean, n_samples=n_samples)

    def _finite(self, loss: float, what: str, epoch: int) -> float:
        if not math.isfinite(loss):
            raise RunError(
                f"the {what} loss is {loss} in epoch {epoch} of {self.settings.epochs}, at lr={self.settings.lr:g}: "
                f"train again into another --out with a lower one, such as --lr {self.settings.lr / 3:.1g}"
            )
        return loss
