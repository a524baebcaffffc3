"""Batches read ahead by one thread into a ring of buffers: memory does not depend on the store's size."""

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from coldtap.adaptors.data.restore import Restorer, StoredBuffer
from coldtap.stores.reading.array import OutlyingValues

type Rows = np.ndarray[Any, np.dtype[np.int64]]
type Item = tuple[StoredBuffer, int, OutlyingValues]  # a buffer, the rows in it, and what its codes do not hold

PREFETCH = 2  # batches read ahead: one being filled while one waits
ANNOUNCED = 4  # batches beyond those that the kernel is told of: a disk sees many requests at once


class RowSource(Protocol):
    """Where stored rows come from: the disk, or RAM on their way to a GPU."""

    def buffer(self, n_rows: int, *, pinned: bool) -> StoredBuffer:
        """Return room for some rows."""

    def read(self, out: np.ndarray[Any, Any], rows: Rows) -> OutlyingValues:
        """Read rows into a part of a buffer."""

    def will_need(self, rows: Rows) -> None:
        """Prepare for the rows that are read next."""


class ReadAhead:
    """Reads batches while the caller computes, and restores each on the device when it is asked for."""

    def __init__(self, source: RowSource, restorer: Restorer, device: torch.device, batch_size: int) -> None:
        self._source, self._restorer, self._device, self._batch_size = source, restorer, device, batch_size
        self._on_gpu = device.type == "cuda"

    def features(self, batches: Iterable[Rows]) -> Generator[torch.Tensor]:
        """Yield float32 features of each batch of row numbers, valid until the next is asked for.

        An error of the reading thread is raised here. Leaving early ends the thread.
        """
        free: queue.SimpleQueue[StoredBuffer | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        for _ in range(PREFETCH + 1):
            free.put(self._source.buffer(self._batch_size, pinned=self._on_gpu))

        def read_ahead() -> None:
            try:
                for rows in self._announced(batches):
                    buffer = free.get()
                    if buffer is None:
                        return
                    ready.put((buffer, len(rows), self._source.read(buffer.array[: len(rows)], rows)))
                ready.put(None)
            except BaseException as error:
                ready.put(error)

        thread = threading.Thread(target=read_ahead, name="coldtap-read-ahead", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                buffer, n_rows, outlying = item
                yield from self._restored(buffer.tensor[:n_rows], outlying)
                free.put(buffer)
        finally:
            # An epoch that is left early must not leave the thread waiting for a buffer, nor a batch unread.
            free.put(None)
            thread.join()

    def _announced(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        """The batches, each after the source was told of some that follow it."""
        coming: deque[Rows] = deque()
        for rows in batches:
            self._source.will_need(rows)
            coming.append(rows)
            if len(coming) > ANNOUNCED:
                yield coming.popleft()
        yield from coming

    def _restored(self, stored: torch.Tensor, outlying: OutlyingValues) -> Iterator[torch.Tensor]:
        """Yield one batch; when it goes on, the buffer of `stored` may be written again."""
        if not self._on_gpu:
            yield self._restorer.rows(stored, outlying)
            return
        on_device = stored.to(self._device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        yield self._restorer.rows(on_device, outlying)
        # The copy waits for whatever the device was asked before it: only now may the buffer take another batch.
        copied.synchronize()
