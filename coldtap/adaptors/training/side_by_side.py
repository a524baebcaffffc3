"""The learners of trials that share a pass: of one shape stacked where that is faster, the others side by side."""

from collections.abc import Sequence

import torch

from coldtap.adaptors.metrics.tasks import Task
from coldtap.adaptors.training.learner import Learner, Member, SideBySide
from coldtap.adaptors.training.stacked import Stacked, can_stack, is_faster_stacked


def make_learners(
    members: Sequence[Member], task: Task, device: torch.device, *, row_shape: Sequence[int]
) -> list[tuple[Learner, list[int]]]:
    """Makes the learners of some trials; returns each with the numbers of its trials, ascending.

    Args:
        members: The trials.
        task: What they learn.
        device: Where their networks are.
        row_shape: Shape of one sample's features.
    """
    alike = _alike(members) if is_faster_stacked(row_shape, device) else []
    stacks = [numbers for numbers in alike if len(numbers) > 1]
    stacked = {number for numbers in stacks for number in numbers}
    others = [number for number in range(len(members)) if number not in stacked]
    learners: list[tuple[Learner, list[int]]] = [
        (Stacked([members[number] for number in numbers], task, device), numbers) for numbers in stacks
    ]
    if others:
        learners.append((SideBySide([members[number] for number in others], task, device), others))
    return learners


def _alike(members: Sequence[Member]) -> list[list[int]]:
    """Numbers of trials that may be computed as one, together."""
    groups: list[list[int]] = []
    for number, member in enumerate(members):
        for group in groups:
            if can_stack(members[group[0]], member):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups
