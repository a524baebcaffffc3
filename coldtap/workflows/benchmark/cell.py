"""One cell of a benchmark: an adaptor on the store of a dataset, by the benchmark's protocol."""

import math
from dataclasses import dataclass
from pathlib import Path

from coldtap.adaptors.networks.contract import arrays_of, describe_gathers, refuse_stage_network
from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.networks.options import parse_options, require_at_least
from coldtap.adaptors.results import Cell
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.adaptors.training.protocol import PROTOCOLS, run_protocol
from coldtap.device import choose_device
from coldtap.errors import ColdtapError, InterruptedRunError, MissingFeaturesError, OptionError
from coldtap.stores import open_store
from coldtap.stores.format.gathers import GATHERS
from coldtap.workflows.benchmark.contenders import Contender
from coldtap.workflows.benchmark.display import EpochReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for every cell.

    Raises:
        OptionError: No such protocol, or no seed.
        MachineError: No such device.
    """

    protocol: str
    seeds: int
    training: TrainingOptions
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise OptionError(f"`protocol={self.protocol!r}`: it must be one of {', '.join(PROTOCOLS)}")
        require_at_least(1, seeds=self.seeds)
        choose_device(self.device)

    def trainings(self, contender: Contender) -> int:
        """Return how often an adaptor is trained on a dataset."""
        n_settings = len(contender.trials)
        return n_settings + self.seeds if self.protocol == "vtab" else n_settings * self.seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class CellTask:
    """What is to be done for a cell."""

    dataset: str
    contender: Contender
    store: Path
    out: Path
    rules: Rules

    @property
    def adaptor(self) -> str:
        """Name of the adaptor."""
        return self.contender.adaptor

    def numbers_read(self) -> int:
        """Numbers of all samples in all trainings of an epoch; 0 where the store lacks what the adaptor needs.

        Stands for the time that cells take, of one adaptor in proportion and of two by their order.
        """
        kind = adaptor_kind(self.adaptor)
        try:
            store = open_store(self.store)
            spec, _ = kind.plan(store, parse_options(kind.options, self.contender.options, adaptor=self.adaptor))
        except ColdtapError:  # said where the cell is trained
            return 0
        samples = sum(n for split, n in store.splits.items() if split != "test")
        return math.prod(spec.row_shape) * samples * self.rules.trainings(self.contender)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A cell, and the exit code of what stood in its way, else 0."""

    cell: Cell
    exit_code: int = 0


def failed_cell(dataset: str, adaptor: str, error: ColdtapError) -> Done:
    """Returns a cell without a result."""
    reason = " ".join(str(error).split())
    return Done(cell=Cell(dataset=dataset, adaptor=adaptor, failure=reason), exit_code=error.exit_code)


def _advised(task: CellTask, error: MissingFeaturesError) -> MissingFeaturesError:
    """Says what to do about a store that an earlier call cached for other adaptors."""
    store = open_store(task.store)
    lacking = [gather for gather in GATHERS if gather in task.contender.gathers and not arrays_of(store, gather)]
    try:
        refuse_stage_network(store, adaptor=task.adaptor)
    except MissingFeaturesError:  # no store of this backbone has a sum
        return error
    if not lacking:
        return error
    return MissingFeaturesError(
        f"{task.adaptor} needs {', '.join(lacking)}; {store.storage} was cached for other adaptors and holds "
        f"{describe_gathers(store)}: delete it and its runs ({task.out.parent}) and run the same command again, or "
        "choose another `out`"
    )


def train_cell(task: CellTask, epochs: EpochReporter | None = None) -> Done:
    """Trains and tests; what was done before is only read. An error is the cell's, a stop everyone's.

    Raises:
        InterruptedRunError: Ctrl-C; what was done is kept.
    """
    rules = task.rules
    try:
        result = run_protocol(
            task.store,
            task.adaptor,
            task.contender.trials,
            protocol=rules.protocol,
            out=task.out,
            seeds=rules.seeds,
            training=rules.training,
            settings=task.contender.options,
            device=rules.device,
            progress=epochs,
            note=epochs.note if epochs else None,
        )
    except InterruptedRunError:
        raise
    except MissingFeaturesError as error:
        return failed_cell(task.dataset, task.adaptor, _advised(task, error))
    except ColdtapError as error:
        return failed_cell(task.dataset, task.adaptor, error)
    cell = Cell(
        dataset=task.dataset,
        adaptor=task.adaptor,
        metric=result.metric,
        test=result.test,
        val=result.val,
        setting=result.setting,
        parameters=result.parameters,
        bytes_per_sample=result.bytes_per_sample,
        seconds=result.seconds,
    )
    return Done(cell=cell)
