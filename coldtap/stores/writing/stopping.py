"""Ctrl-C and SIGTERM: as a request to stop between two batches, or SIGTERM as a Ctrl-C for work that stops in order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from coldtap.errors import InterruptedRunError

STOPPED = "stopped; what was finished is kept: run the same command to go on"


class StopRequest:
    """Set by the first signal; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signal: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        self.event.set()

    def error(self, message: str) -> InterruptedRunError:
        """Return the error to end with: exit code 130 after Ctrl-C, 143 after SIGTERM."""
        error = InterruptedRunError(message)
        error.exit_code = 128 + (self.signal or signal.SIGINT)
        return error


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Listen for SIGINT and SIGTERM in the main thread; elsewhere the caller's own handling stays."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt; what stops for it exits with 143 instead of 130."""
    received = False

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as stop:
        if not received:
            raise
        error = stop if isinstance(stop, InterruptedRunError) else InterruptedRunError(STOPPED)
        error.exit_code = 128 + signal.SIGTERM
        raise error from None
    finally:
        signal.signal(signal.SIGTERM, before)
