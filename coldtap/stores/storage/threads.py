"""Threads that read and decode, and what a forked process must make anew.

It has none of its parent's threads, and a lock that one of them held would stay locked for ever.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol
from weakref import WeakSet

MOST_THREADS = 8


class Renewable(Protocol):
    """Holds locks, caches or threads."""

    def renew(self) -> None:
        """Begin anew, with free locks, nothing cached and no threads."""


_in_use: WeakSet[Renewable] = WeakSet()


def renew_after_fork(thing: Renewable) -> None:
    """Have a thing renewed in every process that is forked from this one."""
    _in_use.add(thing)


def _renew_all() -> None:
    for thing in _in_use:
        thing.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


class Threads:
    """A pool of reading threads, made when first needed."""

    def __init__(self, n_threads: int | None = None) -> None:
        """Make no thread yet; None is one a core that this process may use, up to 8."""
        self.n_threads = n_threads or min(usable_cores(), MOST_THREADS)
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew, without threads."""
        self._pool: ThreadPoolExecutor | None = None
        self._turn = threading.Lock()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin some work in a thread."""
        with self._turn:
            if self._pool is None:
                # The caller is a reading thread too.
                self._pool = ThreadPoolExecutor(max(self.n_threads - 1, 1), thread_name_prefix="coldtap-read")
        return self._pool.submit(work, *arguments)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def few_at_once[T, R](work: Callable[[T], R], items: Iterable[T], n_at_once: int, stop: threading.Event) -> Iterator[R]:
    """Results as they are there, of so many items at a time; memory does not grow with the number of items.

    An error, or leaving the iteration, sets `stop`, which the work at hand should heed.
    """
    left = iter(items)
    with ThreadPoolExecutor(n_at_once, thread_name_prefix="coldtap-work") as pool:
        running: set[Future[R]] = set()
        try:
            while True:
                while len(running) < n_at_once and (item := next(left, _NO_MORE)) is not _NO_MORE:
                    running.add(pool.submit(work, item))  # type: ignore[arg-type] # it is no _NO_MORE
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            stop.set()


_NO_MORE = object()
