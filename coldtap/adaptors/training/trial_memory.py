"""How much memory trials will take that share a pass, and how many fit."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coldtap.adaptors.data.batches import Batch
from coldtap.adaptors.metrics.tasks import Task
from coldtap.adaptors.training.plan import TrialPlan
from coldtap.adaptors.training.side_by_side import SideBySide
from coldtap.adaptors.training.stacked import Stacked, can_stack, is_faster_stacked

# Copies of a trial's parameters: weights, gradients and two moments; those of a checkpoint but the gradients; the kept.
COPIES = 4 + 3 + 1
# The share of the free memory that trials may take beside their features.
TRIALS_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialMemory:
    """Bytes of one trial: its `state`, which it has all the time, and the most that its `step` takes beside it.

    Steps of trials that are `stacked` are made together, those of others one after the other.
    """

    state: int
    step: int
    stacked: bool


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside it make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            # A view, or a result in place, is of memory that is there already.
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in given:
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def forecast_trial(
    plan: TrialPlan, network: nn.Module, task: Task, batch: Batch, *, device: torch.device
) -> TrialMemory:
    """Forecast what one trial takes, from one step in the way in which it would be trained.

    Args:
        plan: The trial.
        network: Its network, not to be used afterwards, since it has made a step.
        task: What is learnt.
        batch: A batch of the size of the training's.
        device: That trains.
    """
    stacked = is_faster_stacked(plan.features.row_shape, device) and can_stack(plan, network)
    parameters = list(network.parameters())
    trials = 2 if stacked else 1
    learner = (Stacked if stacked else SideBySide)([plan] * trials, [network] * trials, task, device)
    peak = _peak_of(lambda: learner.step(batch.features, batch.targets, [0.0] * trials), device)
    state = COPIES * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return TrialMemory(state=state, step=peak // trials, stacked=stacked)


def _peak_of(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a step has at a time, of those that it makes itself."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    counter = _LiveBytes()
    with counter:
        step()
    return counter.peak


def how_many_fit(trials: Sequence[TrialMemory], *, free: int) -> int:
    """Return how many trials, from the first on, fit into free memory (bytes) at a time: one at least."""
    states = together = largest = 0
    for number, trial in enumerate(trials):
        states += trial.state
        together += trial.step if trial.stacked else 0
        largest = max(largest, 0 if trial.stacked else trial.step)
        if states + together + largest > TRIALS_SHARE * free:
            return max(1, number)
    return len(trials)
