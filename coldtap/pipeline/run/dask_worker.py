"""A job in a worker process of dask.distributed: made ready once, then block after block."""

import threading
from typing import Any

from distributed import WorkerPlugin, get_worker

from coldtap.pipeline.run.assignment import Assignment
from coldtap.pipeline.run.in_process import BlockRunner
from coldtap.stores.format.journal import JournalLine


class AssignedJob(WorkerPlugin):
    """Brings a job to every worker, to those too that are started in place of dead ones.

    A worker makes the assignment ready at its first block, where an error reaches the user.
    """

    idempotent = True

    def __init__(self, name: str, assignment: Assignment) -> None:
        self.name = name
        self._assignment = assignment

    def setup(self, worker: Any) -> None:
        """Keep the job until the first block: this thread is the one that answers the scheduler."""
        _jobs[self.name] = _Job(self._assignment)

    def teardown(self, worker: Any) -> None:
        """Stop the blocks in flight at their next batch: the worker closes."""
        if job := _jobs.pop(self.name, None):
            job.stop.set()


class _Job:
    """An assignment, and what was made of it."""

    def __init__(self, assignment: Assignment) -> None:
        self.stop = threading.Event()
        self._assignment = assignment
        self._turn = threading.Lock()
        self._runner: BlockRunner | None = None

    def runner(self) -> BlockRunner:
        with self._turn:
            if self._runner is None:
                self._runner = self._assignment.make_ready(self.stop)
            return self._runner


_jobs: dict[str, _Job] = {}


def block_of_job(name: str, block: int) -> JournalLine:
    """Do one block of a job that this worker was assigned, and log its progress as (block, rows done).

    Raises:
        ColdtapError: as `BlockRunner.run_block`.
    """
    worker, n_done = get_worker(), 0

    def advance(n_rows: int) -> None:
        nonlocal n_done
        n_done += n_rows
        worker.log_event(name, [block, n_done])

    return _jobs[name].runner().run_block(block, advance)
