"""Blocks on worker processes of this machine, by dask.distributed; imported only where there are workers.

The processes speak over loopback with keys of their own, so that no other user of the machine can send them work.
"""

import logging
import queue
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, LocalCluster
from distributed.security import Security

from coldtap.errors import InterruptedRunError, MachineError
from coldtap.pipeline.run.assignment import Assignment
from coldtap.pipeline.run.dask_worker import AssignedJob, block_of_job
from coldtap.pipeline.run.in_process import BLOCKS_IN_FLIGHT
from coldtap.stores.format.journal import JournalLine
from coldtap.stores.format.rows import RowPlan

# A block whose worker died is done again; after this many deaths it is the block, or the machine.
DEATHS_OF_A_BLOCK = 3
LOOK_FOR_SIGNALS_EVERY_S = 0.2
WITHOUT_WORKERS_S = 120.0

SETTINGS: dict[str, Any] = {
    "distributed.scheduler.allowed-failures": DEATHS_OF_A_BLOCK - 1,
    # One writer owns a block: it is given to another worker only when its process is dead.
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.worker-ttl": None,
    "distributed.worker.multiprocessing-method": "spawn",
    # Its defaults would make every allocation of a buffer a system call.
    "distributed.nanny.pre-spawn-environ": {},
    "distributed.diagnostics.nvml": False,
}


def run_on_workers(
    assignment: Assignment,
    plan: RowPlan,
    blocks: Sequence[int],
    n_workers: int,
    *,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> Generator[JournalLine]:
    """Yield journal lines of blocks as they finish; a few per worker at a time.

    Leaving the iteration stops the blocks in flight at their next batch, and ends the processes.

    Raises:
        InterruptedRunError: `stop` was set.
        MachineError: the processes cannot start, or die too often.
        ColdtapError: as `BlockRunner.run_block`.
    """
    name = f"coldtap-{assignment.recipe.address[:16]}"
    progress = _Progress(plan, advance)
    with _cluster(n_workers) as cluster, Client(cluster, set_as_default=False) as client:
        if stop.is_set():
            raise InterruptedRunError("stopped")
        client.subscribe_topic(name, progress.hear)
        client.register_plugin(AssignedJob(name, assignment), name=name)
        for line in _Blocks(client, cluster, name, n_workers, stop).run(blocks):
            progress.finish(line.block)
            yield line


class _Blocks:
    """Gives out blocks, and collects their lines."""

    def __init__(self, client: Client, cluster: LocalCluster, name: str, n_workers: int, stop: threading.Event) -> None:
        self._client = client
        assert cluster.scheduler is not None
        self._workers = cluster.scheduler.workers  # those that are alive now; the scheduler keeps it so
        self._name = name
        self._n_in_flight = n_workers * (BLOCKS_IN_FLIGHT + 1)  # one waits at each worker
        self._stop = stop
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(self, blocks: Sequence[int]) -> Iterator[JournalLine]:
        left = iter(blocks)
        running: dict[int, Future[JournalLine]] = {}  # dask forgets a task when nobody holds its future
        while True:
            while len(running) < self._n_in_flight and (block := next(left, None)) is not None:
                future = self._client.submit(block_of_job, self._name, block, key=f"{self._name}-{block}")
                future.add_done_callback(lambda _, ended=block: self._ended.put(ended))
                running[block] = future
            if not running:
                return
            block = self._wait()
            yield _line_of(running.pop(block), block)

    def _wait(self) -> int:
        without_workers = time.monotonic()
        while True:
            if self._stop.is_set():
                raise InterruptedRunError("stopped")
            try:
                return self._ended.get(timeout=LOOK_FOR_SIGNALS_EVERY_S)
            except queue.Empty:
                now = time.monotonic()
                if self._workers:
                    without_workers = now
                elif now - without_workers > WITHOUT_WORKERS_S:
                    raise MachineError("all worker processes died and none could be started again") from None


def _line_of(future: "Future[JournalLine]", block: int) -> JournalLine:
    try:
        line: JournalLine = future.result()
    except KilledWorker:
        raise MachineError(
            f"worker processes died {DEATHS_OF_A_BLOCK} times while they had block {block}: most often the system "
            "ended them because memory ran out (`dmesg` tells); run the same command with fewer `workers` or a smaller "
            "`batch_size`, finished blocks are kept"
        ) from None
    return line


class _Progress:
    """Rows done, told by batch; a block that is begun again does not count twice."""

    def __init__(self, plan: RowPlan, advance: Callable[[int], None]) -> None:
        self._plan = plan
        self._advance = advance
        self._turn = threading.Lock()
        self._done: Counter[int] = Counter()

    def hear(self, event: tuple[float, Any]) -> None:
        """Hear a worker's message: block, rows of it done."""
        block, n_rows = event[1]
        self._reach(block, n_rows)

    def finish(self, block: int) -> None:
        """Note that all rows of a block are done."""
        self._reach(block, len(self._plan.block(block)))

    def _reach(self, block: int, n_rows: int) -> None:
        with self._turn:
            more = n_rows - self._done[block]
            if more > 0:
                self._done[block] = n_rows
                self._advance(more)


@contextmanager
def _cluster(n_workers: int) -> Iterator[LocalCluster]:
    """Worker processes, started by `spawn`, that end with this process however it ends."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="coldtap-workers-", ignore_cleanup_errors=True))
        stack.enter_context(dask.config.set({**SETTINGS, "temporary-directory": folder}))
        # Threads and processes inherit the mask: a Ctrl-C in a terminal goes to all of them and is for this one.
        starter = stack.enter_context(ThreadPoolExecutor(1, initializer=_ignore_ctrl_c))
        try:
            cluster = starter.submit(_start, n_workers).result()
        except (RuntimeError, OSError) as error:
            raise MachineError(
                f"{n_workers} worker processes cannot be started ({type(error).__name__}: {error}). A script that "
                "calls cache_features(workers=…) must do so below `if __name__ == '__main__':`"
            ) from error
        stack.enter_context(cluster)
        yield cluster


def _ignore_ctrl_c() -> None:
    resource_tracker.ensure_running()  # it would unblock the signal in the thread that starts it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _start(n_workers: int) -> LocalCluster:
    return LocalCluster(
        n_workers=n_workers,
        threads_per_worker=BLOCKS_IN_FLIGHT,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # dask opens a server all the same, and two jobs would want its one port
        scheduler_kwargs={"dashboard": False},
        silence_logs=logging.CRITICAL + 1,  # a client that leaves while blocks run is "critical", with a traceback
        security=Security.temporary(),
        memory_limit=None,  # blocks in flight bound it; dask would pause, spill and kill by guesses
        death_timeout=60,
    )
