"""What long work shows: a bar on a terminal, a plain line every ten seconds elsewhere; all on stderr."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from coldtap.cli.epoch_lines import EpochLines
from coldtap.cli.errors import in_flags
from coldtap.cli.output import say
from coldtap.stores.writing.forecast import Forecast
from coldtap.text import printable, show_bytes, show_seconds

PLAIN_LINE_EVERY_S = 10.0

type Show = Callable[[int, float], str]  # what is done, and how much of it per second


class WorkProgress:
    """How far some work is, on stderr; it may be told from any thread."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._turn = threading.Lock()
        self._total = self._done = 0
        self._show: Show = lambda done, rate: ""
        self._last_line = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Print a sentence."""
        self._console.print(printable(in_flags(text)), markup=False)

    def start(self, total: int, show: Show, *, last_line: bool = True) -> None:
        """Start the bar.

        Args:
            total: of what `advance` counts.
            show: what is done, in words.
            last_line: say so when all is done, however short it took.
        """
        self._total, self._show, self._last_line = total, show, last_line
        self._began = self._last = time.monotonic()
        if self._console.is_terminal and total:
            columns = BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total, text=show(0, 0))
            self._bar.start()

    def advance(self, n: int) -> None:
        """Count, and show it."""
        with self._turn:
            self._done += n
            now = time.monotonic()
            rate = self._done / max(now - self._began, 1e-9)
            text = self._show(self._done, rate)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=self._done, text=text)
            elif now - self._last >= PLAIN_LINE_EVERY_S or (self._last_line and self._done == self._total):
                self._last = now
                left = show_seconds((self._total - self._done) / max(rate, 1e-9))
                say(f"{text}  {left} left", err=True)


class JobProgress(WorkProgress):
    """Notes, the forecast and the rows done of a job that writes a store."""

    def __init__(self, unit: str = "images") -> None:
        """Rates are given in `unit` per second."""
        super().__init__()
        self._unit = unit

    def forecast(self, forecast: Forecast) -> None:
        """Print what is left to do, and start the bar."""
        free = "" if forecast.free_bytes is None else f"; {show_bytes(forecast.free_bytes)} free"
        self.note(
            f"forecast: {forecast.n_rows} rows, {show_bytes(forecast.n_bytes)}, about "
            f"{show_seconds(forecast.seconds)}{free}"
        )

        def show(done: int, rate: float) -> str:
            size = show_bytes(forecast.n_bytes * done / forecast.n_rows)
            return f"{done}/{forecast.n_rows} rows  {rate:.0f} {self._unit}/s  {size}"

        self.start(forecast.n_rows, show)


class UnitProgress(WorkProgress):
    """Notes, and the blocks of a backbone that are compensated."""

    def begin(self, n_units: int) -> None:
        """Start the bar."""
        self.start(n_units, lambda done, rate: f"{done}/{n_units} parts of the backbone", last_line=False)


class BenchmarkDisplay:
    """The parts of a benchmark, as the commands of their own show them."""

    def caching(self) -> JobProgress:
        """Show the extraction of one dataset."""
        return JobProgress()

    def training(self) -> EpochLines:
        """Show the epochs of cell after cell."""
        return EpochLines()
