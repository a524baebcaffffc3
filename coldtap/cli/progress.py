"""What a caching job shows: a bar on a terminal, a plain line every ten seconds elsewhere; all on stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from coldtap.cli.sizes import show_bytes, show_seconds
from coldtap.pipeline.forecast import Forecast

PLAIN_LINE_EVERY_S = 10.0


class JobProgress:
    """Notes, the forecast and the rows done, on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._forecast: Forecast | None = None
        self._done = 0
        self._began = self._last = time.monotonic()

    def __enter__(self) -> "JobProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Print a sentence."""
        self._console.print(text, markup=False)

    def forecast(self, forecast: Forecast) -> None:
        """Print what is left to do, and start the bar."""
        self._forecast = forecast
        self._began = self._last = time.monotonic()
        self.note(
            f"forecast: {forecast.n_rows} rows, {show_bytes(forecast.n_bytes)}, about "
            f"{show_seconds(forecast.seconds)}; {show_bytes(forecast.free_bytes)} free"
        )
        if self._console.is_terminal and forecast.n_rows:
            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} rows  {task.fields[rate]}  {task.fields[size]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=forecast.n_rows, rate="", size="")
            self._bar.start()

    def advance(self, n_rows: int) -> None:
        """Count rows, and show them."""
        assert self._forecast is not None
        self._done += n_rows
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        size = show_bytes(self._forecast.n_bytes * self._done / self._forecast.n_rows)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:.0f} images/s", size=size)
        elif now - self._last >= PLAIN_LINE_EVERY_S or self._done == self._forecast.n_rows:
            self._last = now
            left = show_seconds((self._forecast.n_rows - self._done) / rate)
            done = f"{self._done}/{self._forecast.n_rows} rows"
            print(f"{done}  {rate:.0f} images/s  {size}  {left} left", file=sys.stderr, flush=True)
