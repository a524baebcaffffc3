"""Tasks in worker processes, each of which has its share of the cores; a stop reaches all of them."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context

from coldtap.stores.errors import MachineError


def in_processes[TaskT, ResultT](
    work: Callable[[TaskT], ResultT], tasks: Sequence[TaskT], *, jobs: int
) -> Iterator[ResultT]:
    """Yields the results of tasks as they come; tasks begin in their order.

    Args:
        work: A function of an importable module, which sees SIGTERM as a stop.
        tasks: Its arguments.
        jobs: Processes at a time.

    Raises:
        MachineError: A process has died.
    """
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(max(1, (os.cpu_count() or 1) // jobs),),
    )
    waiting, running = deque(tasks), set[Future[ResultT]]()
    try:
        while waiting or running:
            # No more than there are processes: what a pool has queued for its workers cannot be taken back.
            while waiting and len(running) < jobs:
                running.add(pool.submit(work, waiting.popleft()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise MachineError(
            "a worker process has died, perhaps for want of memory; what was finished is kept: run the same command "
            "again, with fewer --jobs"
        ) from error
    except BaseException:
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C the parent tells, with SIGTERM
    torch.set_num_threads(threads)
