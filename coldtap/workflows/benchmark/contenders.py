"""The adaptors of a benchmark: the options that each has in every trial, and the settings it may choose from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coldtap.adaptors.networks.kinds import ADAPTORS, adaptor_kind
from coldtap.adaptors.networks.options import option_defaults, parse_options
from coldtap.adaptors.training.grid import TRAINING_KEYS, expand_grid, trial_options
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.errors import OptionError
from coldtap.stores.format.gathers import GatherName

RATE_FACTORS = (0.25, 1.0, 4.0)  # of the adaptor's own learning rate, where the grid names none


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An adaptor, its options in all trials, and of each trial what is its own."""

    adaptor: str
    options: Mapping[str, object]
    trials: tuple[Mapping[str, object], ...]

    @property
    def gathers(self) -> frozenset[GatherName]:
        """The gathers that it reads, with one setting or another."""
        kind = adaptor_kind(self.adaptor)
        known = option_defaults(kind.options)
        found: set[GatherName] = set()
        for trial in self.trials:
            own = {name: value for name, value in trial.items() if name in known}
            found.update(kind.gathers(parse_options(kind.options, {**self.options, **own}, adaptor=self.adaptor)))
        return frozenset(found)

    def __str__(self) -> str:
        """Its grid: `last: 6 settings, rank=4; lr 0.00025, 0.001, 0.004; gap 1, 2`."""
        values = {name: dict.fromkeys(trial[name] for trial in self.trials) for name in self.trials[0]}
        grid = [f"{name} {', '.join(map(str, of_name))}" for name, of_name in values.items()]
        fixed = [f"{name}={value}" for name, value in self.options.items()]
        number = f"{len(self.trials)} setting{'s' if len(self.trials) > 1 else ''}"
        return f"{self.adaptor}: {number}: {'; '.join([*fixed, *grid])}"


def make_contenders(
    adaptors: Sequence[str],
    options: Mapping[str, str],
    grid: Mapping[str, Sequence[object]],
    training: TrainingOptions,
) -> list[Contender]:
    """Makes contenders, and checks all of their settings before anything is trained.

    Args:
        adaptors: Their names.
        options: By `ADAPTOR.NAME`, what an adaptor has in every trial.
        grid: By `ADAPTOR.NAME`, values to choose from; by the name of a setting of training, such as `lr`, those of all
            adaptors but the ones that have their own. Where nothing names `lr`, an adaptor tries a quarter of its
            default, its default, and four times its default.
        training: What all trials have in common.

    Raises:
        OptionError: An adaptor is unknown or named twice, or a setting is unknown or has a value of the wrong type.
    """
    if not adaptors:
        raise OptionError(f"`adaptors` names none; known are {', '.join(ADAPTORS)}")
    if twice := [name for name in adaptors if adaptors.count(name) > 1]:
        raise OptionError(f"`adaptors` names {twice[0]} twice")
    for name in adaptors:
        adaptor_kind(name)
    for_all, of_grid = _by_adaptor(grid, adaptors, parameter="grid")
    rest, of_options = _by_adaptor(options, adaptors, parameter="options")
    if rest:
        raise OptionError(
            f"`options={next(iter(rest))!r}`: say whose option it is, as in {adaptors[0]}.{next(iter(rest))}=…"
        )
    if unknown := [name for name in for_all if name not in TRAINING_KEYS]:
        raise OptionError(
            f"`grid={unknown[0]!r}`: for all adaptors it can vary {', '.join(TRAINING_KEYS)}; an option of one adaptor "
            f"is named with it, as in {adaptors[0]}.{unknown[0]}=…"
        )
    found = []
    for name in adaptors:
        values = {**for_all, **of_grid[name]}
        if "lr" not in values:
            values = {"lr": [adaptor_kind(name).lr * factor for factor in RATE_FACTORS], **values}
        contender = Contender(adaptor=name, options=of_options[name], trials=tuple(expand_grid(values)))
        known = adaptor_kind(name).options
        parse_options(known, contender.options, adaptor=name)
        trial_options(name, known, contender.trials, training=training, options=contender.options)
        found.append(contender)
    return found


def _by_adaptor[ValueT](
    settings: Mapping[str, ValueT], adaptors: Sequence[str], *, parameter: str
) -> tuple[dict[str, ValueT], dict[str, dict[str, ValueT]]]:
    """Settings without an adaptor's name, and those of each adaptor."""
    for_all: dict[str, ValueT] = {}
    own: dict[str, dict[str, ValueT]] = {adaptor: {} for adaptor in adaptors}
    for key, value in settings.items():
        adaptor, dot, name = key.rpartition(".")
        if not dot:
            for_all[name] = value
        elif adaptor in own:
            own[adaptor][name] = value
        else:
            raise OptionError(
                f"`{parameter}={key!r}`: {adaptor} is not among the adaptors asked for: {', '.join(adaptors)}"
            )
    return for_all, own
