"""What a job that writes a store tells while it runs."""

from typing import Protocol

from coldtap.stores.writing.forecast import Forecast


class Reporter(Protocol):
    """Told what happens; the command line shows it."""

    def note(self, text: str) -> None:
        """A sentence that the user should read."""

    def forecast(self, forecast: Forecast) -> None:
        """What is left to do, before it starts."""

    def advance(self, n_rows: int) -> None:
        """Rows done since the last call."""


class Silence:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def forecast(self, forecast: Forecast) -> None:
        """Say nothing."""

    def advance(self, n_rows: int) -> None:
        """Say nothing."""
