"""What a job tells: while it runs, through a reporter, and at its end, as a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from coldtap.pipeline.forecast import Forecast


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """How a job ended.

    Attributes:
        store: the store's path.
        status: `written`; `unchanged` where it was complete already; `relabelled` where only targets were new;
            `forecast` after a dry run.
        digest: SHA-256 of the manifest; None after a dry run.
        n_rows: rows that are there.
        n_rejected: rows that are not.
        forecast: what was left to do when the job began; None where there was nothing.
    """

    store: Path
    status: Literal["written", "unchanged", "relabelled", "forecast"]
    digest: str | None
    n_rows: int
    n_rejected: int
    forecast: Forecast | None
