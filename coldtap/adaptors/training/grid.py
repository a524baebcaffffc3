"""The options of trials: what all have in common, what is each one's own, and the seeds; grids as one way to them."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from coldtap.adaptors.networks.options import option_defaults, parse_options
from coldtap.adaptors.training.options import TrainingOptions, TrialOptions
from coldtap.errors import OptionError

# What may differ among trials that share batches, beside the adaptor's own options.
TRAINING_KEYS = ("lr", "weight_decay", "warmup", "epochs", "label_smoothing", "patience")


@dataclass(frozen=True, kw_only=True)
class _GridOptions:
    """The training settings of a trial, for one parser of text."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    epochs: int = 100
    label_smoothing: float = 0.0
    patience: int = 1


def expand_grid(grid: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    """Return every combination of a grid's values by name: `{"lr": [1e-3, 3e-3], "rank": [4]}` gives two.

    Raises:
        OptionError: A name without a value.
    """
    for name, values in grid.items():
        if not values:
            raise OptionError(f"`grid[{name!r}]`: give at least one value, as in {name}=1,2")
    return [dict(zip(grid, chosen, strict=True)) for chosen in product(*grid.values())]


def trial_options(
    adaptor: str,
    options_type: type[Any],
    trials: Sequence[Mapping[str, object]],
    *,
    training: TrainingOptions,
    options: Mapping[str, object],
    seeds: int = 1,
) -> list[TrialOptions]:
    """Return the options of trials, each with every seed.

    The seeds are `training.seed` and those after it. All trials have the order of samples that the first has alone, so
    that they share batches.

    Args:
        adaptor: The adaptor's name.
        options_type: The dataclass of its options.
        trials: Of each, what is its own, by name: of the training (`TRAINING_KEYS`), or of the adaptor's options; text,
            or as they are.
        training: What they have in common.
        options: The adaptor's options that they have in common.
        seeds: Number of seeds.

    Raises:
        OptionError: An unknown name, a value of the wrong type, or two equal trials.
    """
    if seeds < 1:
        raise OptionError(f"seeds={seeds}: it must be 1 or more")
    order = training.seed if training.order_seed is None else training.order_seed
    found = []
    for own in trials:
        varied = {name: _parsed(adaptor, options_type, name, value, options) for name, value in own.items()}
        changes: dict[str, Any] = {name: value for name, value in varied.items() if name in TRAINING_KEYS}
        others = {name: value for name, value in varied.items() if name not in TRAINING_KEYS}
        for seed in range(training.seed, training.seed + seeds):
            each = dataclasses.replace(training, **changes, seed=seed, order_seed=order)
            found.append(TrialOptions(adaptor=adaptor, training=each, options={**options, **others}, varied=varied))
    names = Counter(trial.name for trial in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise OptionError(f"the trial {twice[0]} is asked for twice")
    return found


def _parsed(adaptor: str, options_type: type[Any], name: str, value: object, options: Mapping[str, object]) -> object:
    known = {*option_defaults(options_type), *TRAINING_KEYS}
    if name not in known:
        raise OptionError(
            f"`grid[{name!r}]`: adaptor {adaptor} has no such setting; it knows {', '.join(sorted(known))}"
        )
    if name in options:
        raise OptionError(f"{name} is given twice, for all trials and for one: leave one out")
    if name in TRAINING_KEYS:
        return getattr(parse_options(_GridOptions, {name: value}, adaptor=adaptor), name)
    # With the common options, since what a value may be can depend on them, as that of heads on rank.
    return getattr(parse_options(options_type, {**options, name: value}, adaptor=adaptor), name)
