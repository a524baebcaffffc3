"""SIGTERM as a Ctrl-C, for work that stops in order on the latter."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from coldtap.stores.errors import InterruptedRunError

STOPPED = "stopped; what was finished is kept: run the same command to go on"


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
