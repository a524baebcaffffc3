"""How much memory trials will take that share a pass, and how many fit."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Copies of a trial's parameters: weights, gradients and two moments; those of a checkpoint but the gradients; the kept.
COPIES = 4 + 3 + 1
# The share of the free memory that trials may take beside their features.
TRIALS_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialMemory:
    """Bytes of one trial: its `state`, which it has all the time, and the most that a `step` takes beside it."""

    state: int
    step: int


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside it make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def ignore(self, tensors: Sequence[torch.Tensor]) -> None:
        """Leaves out what is there already."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

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
    network: nn.Module, row_shape: Sequence[int], *, batch_size: int, loss_of: Callable[[torch.Tensor], torch.Tensor]
) -> TrialMemory:
    """Forecasts what one trial takes, from a step on a batch of noise, without changing its network.

    Args:
        network: The trial's network.
        row_shape: Shape of one sample's features.
        batch_size: Samples a batch.
        loss_of: Logits to one number.
    """
    parameters = list(network.parameters())
    device = parameters[0].device
    counter = _LiveBytes()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        features = torch.randn(batch_size, *row_shape, device=device)
        counter.ignore([features, *parameters, *network.buffers()])
        with counter:
            torch.autograd.grad(loss_of(network.train()(features)), parameters, allow_unused=True)
    return TrialMemory(state=COPIES * sum(p.numel() * p.element_size() for p in parameters), step=counter.peak)


def trials_that_fit(trial: TrialMemory, *, free: int, stacked: bool) -> int:
    """Returns how many trials of a size fit into free memory at a time: one at least.

    Args:
        trial: What one takes.
        free: Bytes that may still be taken.
        stacked: Whether they make their steps together, not one after the other.
    """
    left = TRIALS_SHARE * free
    if stacked:
        return max(1, int(left // (trial.state + trial.step)))
    return max(1, int((left - trial.step) // max(1, trial.state)))
