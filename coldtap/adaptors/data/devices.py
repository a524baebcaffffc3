"""The device that trains: its name, its memory, and random numbers that leave no trace in the caller's process."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def describe_device(device: torch.device) -> str:
    """Return `cpu`, or the GPU with its model's name."""
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def free_gpu_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU; 0 for the CPU, which has none of its own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a small tensor from the CPU; to a GPU through pinned memory, so that nothing waits for the GPU's work."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


@contextmanager
def seeded(seed: int, stream: int, device: torch.device) -> Iterator[None]:
    """Draw torch's random numbers from (seed, stream) inside the block; restore its generators after it.

    With a stream an epoch, dropout is the same whether or not the run was interrupted before it.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(state >> 1))
        yield
