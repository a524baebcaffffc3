"""Tasks in worker processes, each of which has its share of the cores; a stop reaches all of them."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, connection, get_context, parent_process
from multiprocessing.synchronize import Event

from coldtap.errors import InterruptedRunError, MachineError
from coldtap.stores.writing.stopping import STOPPED, sigterm_interrupts

_stopped: Event  # of a worker: whether the parent has told all of them to stop


def in_processes[TaskT, ResultT](
    work: Callable[[TaskT], ResultT], tasks: Sequence[TaskT], *, jobs: int
) -> Generator[ResultT]:
    """Yields the results of tasks as they come; tasks begin in their order.

    Args:
        work: A function of an importable module; a stop is a KeyboardInterrupt in it.
        tasks: Its arguments.
        jobs: Processes at a time.

    Raises:
        MachineError: A process has died.
    """
    context = get_context("spawn")
    stopped = context.Event()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads, stopped))
    waiting, running = deque(tasks), set[Future[ResultT]]()
    try:
        while waiting or running:
            # No more than there are processes: what a pool has queued for its workers cannot be taken back.
            while waiting and len(running) < jobs:
                running.add(pool.submit(_run, work, waiting.popleft()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise MachineError(
            "a worker process has died, perhaps for want of memory; what was finished is kept: run the same command "
            "again, with fewer `jobs`"
        ) from error
    except BaseException:
        stopped.set()
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int, stopped: Event) -> None:
    """Makes a worker ready."""
    global _stopped
    import torch

    _stopped = stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C the parent tells, with SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # an idle worker holds the lock of the queue, for all of them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed, so that it writes no run folder beside the next call's workers."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run[TaskT, ResultT](work: Callable[[TaskT], ResultT], task: TaskT) -> ResultT:
    with sigterm_interrupts():
        if _stopped.is_set():
            raise InterruptedRunError(STOPPED)
        return work(task)
