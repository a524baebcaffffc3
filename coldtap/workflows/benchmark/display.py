"""What a benchmark shows while it runs: the caller, such as the command line, draws it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from coldtap.adaptors.training.state import TrialState
from coldtap.stores.writing.reporting import Reporter, Silence


class EpochReporter(Protocol):
    """Told of the epochs of cell after cell; `title` names the cell."""

    title: str

    def __call__(self, trials: Sequence[TrialState], *, epoch: int, epochs: int, seconds: float) -> None:
        """Show the states of all trials after an epoch of `epochs`."""

    def note(self, text: str) -> None:
        """Show a sentence."""


class Display(Protocol):
    """Shows the long parts of a benchmark; each context is entered when its part begins."""

    def caching(self) -> AbstractContextManager[Reporter]:
        """Show the extraction of one dataset."""

    def training(self) -> AbstractContextManager[EpochReporter]:
        """Show the epochs of all cells that are trained in this process."""


class NoEpochs:
    """An epoch reporter that says nothing."""

    title = ""

    def __call__(self, trials: Sequence[TrialState], *, epoch: int, epochs: int, seconds: float) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


class NoDisplay:
    """A display that shows nothing."""

    def caching(self) -> AbstractContextManager[Reporter]:
        """Show nothing."""
        return nullcontext(Silence())

    def training(self) -> AbstractContextManager[EpochReporter]:
        """Show nothing."""
        return nullcontext(NoEpochs())
