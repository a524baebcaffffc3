"""One learner of all trials that share a pass: of one shape stacked where that is faster, the others side by side."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from coldtap.adaptors.metrics.tasks import Task
from coldtap.adaptors.training.learner import Learner, Tensors
from coldtap.adaptors.training.plan import TrialPlan
from coldtap.adaptors.training.side_by_side import SideBySide
from coldtap.adaptors.training.stacked import Stacked, are_alike, can_stack, is_faster_stacked


def make_learner(
    plans: Sequence[TrialPlan], networks: Sequence[nn.Module], task: Task, device: torch.device
) -> "GroupedLearner":
    """Make the learner of some trials.

    Args:
        plans: The trials, over the same features.
        networks: Of each, on the device.
        task: What they learn.
        device: Where their networks are.
    """
    stacks = _stacks(plans, networks) if is_faster_stacked(plans[0].features.row_shape, device) else []
    stacked = {number for numbers in stacks for number in numbers}
    others = [number for number in range(len(plans)) if number not in stacked]

    def learner(make: type[Stacked] | type[SideBySide], numbers: list[int]) -> Learner:
        return make([plans[n] for n in numbers], [networks[n] for n in numbers], task, device)

    groups = [(learner(Stacked, numbers), numbers) for numbers in stacks]
    if others:
        groups.append((learner(SideBySide, others), others))
    return GroupedLearner(groups, device)


def _stacks(plans: Sequence[TrialPlan], networks: Sequence[nn.Module]) -> list[list[int]]:
    """Numbers of trials that are computed as one, two or more together."""
    groups: list[list[int]] = []
    for number, (plan, network) in enumerate(zip(plans, networks, strict=True)):
        if not can_stack(plan, network):
            continue
        for group in groups:
            if are_alike(plans[group[0]], plan, (networks[group[0]], network)):
                group.append(number)
                break
        else:
            groups.append([number])
    return [group for group in groups if len(group) > 1]


class GroupedLearner:
    """Learners of some trials each, as one of all of them, in the order of the trials."""

    def __init__(self, groups: Sequence[tuple[Learner, list[int]]], device: torch.device) -> None:
        """Take learners, each with the numbers of its trials, ascending; together these are 0, 1, 2, ….

        Args:
            groups: The learners.
            device: Where they compute.
        """
        self._device = device
        self._take(groups)

    def _take(self, groups: Sequence[tuple[Learner, list[int]]]) -> None:
        self._groups = list(groups)
        self._places = {n: (learner, at) for learner, numbers in groups for at, n in enumerate(numbers)}
        concatenated = [number for _, numbers in groups for number in numbers]
        # Where trial 0, 1, 2, … lies among the groups' trials, one group after the other.
        order = sorted(range(len(concatenated)), key=concatenated.__getitem__)
        self._order = torch.tensor(order, dtype=torch.int64, device=self._device)

    def __len__(self) -> int:
        return len(self._places)

    def _ordered(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Values (trial, …) of each group, as those of all trials in their order."""
        return values[0] if len(values) == 1 else torch.cat(values).index_select(0, self._order)

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch."""
        for learner, _ in self._groups:
            learner.begin_epoch(epoch)

    def step(self, features: torch.Tensor, targets: torch.Tensor, rates: Sequence[float]) -> torch.Tensor:
        """Do one step of every trial; return the mean losses (trial,)."""
        return self._ordered(
            [learner.step(features, targets, [rates[n] for n in numbers]) for learner, numbers in self._groups]
        )

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (trial, sample, [patch,] class) in eval mode."""
        return self._ordered([learner.logits(features) for learner, _ in self._groups])

    def state(self, trial: int) -> Tensors:
        """Copy a trial's weights and moments to the CPU."""
        learner, place = self._places[trial]
        return learner.state(place)

    def restore(self, trial: int, state: Mapping[str, torch.Tensor], *, steps: int) -> None:
        """Put a trial back to where it was."""
        learner, place = self._places[trial]
        learner.restore(place, state, steps=steps)

    def weights(self, trial: int) -> Tensors:
        """Copy a trial's weights and buffers to the CPU."""
        learner, place = self._places[trial]
        return learner.weights(place)

    def keep(self, trials: Sequence[int]) -> None:
        """Go on with some of the trials, which are 0, 1, 2, … from now on."""
        numbered = {old: new for new, old in enumerate(trials)}
        left: list[tuple[Learner, list[int]]] = []
        for learner, numbers in self._groups:
            places = [place for place, number in enumerate(numbers) if number in numbered]
            if places and len(places) < len(numbers):
                learner.keep(places)
            if places:
                left.append((learner, [numbered[numbers[place]] for place in places]))
        self._take(left)
