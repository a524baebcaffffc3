"""Converting one block: rows of the old store, read and encoded a few at a time, then written as any block is."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coldtap.errors import InterruptedRunError
from coldtap.stores.convert.rows import Origin, Rows, origin_of
from coldtap.stores.format.codes import Encoded, Escapes, Floats
from coldtap.stores.format.journal import JournalLine, Rejection
from coldtap.stores.reading.array import StoredArray
from coldtap.stores.reading.store import Store
from coldtap.stores.storage.threads import usable_cores
from coldtap.stores.writing.block import ArrayBuffer, BlockBuffers, SpareBuffers
from coldtap.stores.writing.writer import StoreWriter

PIECE_BYTES = 1 << 21  # float32 values that stay in the cache while they are encoded
MAX_BLOCKS_AT_ONCE = 4  # each holds up to 256 MB


def blocks_at_once() -> int:
    """Return how many blocks are converted at a time, a thread each."""
    return min(usable_cores(), MAX_BLOCKS_AT_ONCE)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """All that the blocks of one conversion share.

    Attributes:
        source: the old store; it reads in the thread that asks.
        writer: the new store in the making.
        buffers: of blocks that are written, for the next ones.
        same_numbers: stored numbers are copied with their scales, not made again.
        environment: for the journal.
        advance: called with the rows of each block that is done.
        stop: set when the work must end; blocks at hand are then dropped.
    """

    source: Store
    writer: StoreWriter
    buffers: SpareBuffers
    same_numbers: bool
    environment: Mapping[str, Any]
    advance: Callable[[int], None] = lambda n_rows: None
    stop: threading.Event = field(default_factory=threading.Event)


def convert_block(job: Conversion, block: int) -> JournalLine:
    """Read, encode and write one block.

    Raises:
        CorruptStoreError: the old store is damaged; the message names store, array and row.
        InterruptedRunError: the work was stopped.
        MachineError: the disk is full or refuses.
    """
    origin = origin_of(job.source, job.writer.plan, block)
    buffers = job.buffers.take()
    first = block * job.writer.plan.block_rows - origin.shift
    flaws: dict[int, Rejection] = {}
    for name, buffer in buffers.items():
        for rows in _pieces(origin.rows, buffer):
            if job.stop.is_set():
                raise InterruptedRunError("stopped")
            for row, reason, tap in fill(job.source.arrays[name], buffer, rows, first, job.same_numbers):
                number = row + origin.shift
                flaws.setdefault(number, Rejection(row=number, reason=reason, tap=tap))
    line = _write(job, block, buffers, origin, flaws)
    job.buffers.give_back(buffers)
    job.advance(len(job.writer.plan.block(block)))
    return line


def _write(
    job: Conversion, block: int, buffers: BlockBuffers, origin: Origin, flaws: Mapping[int, Rejection]
) -> JournalLine:
    return job.writer.write_block(
        block,
        buffers,
        rejected=sorted([*origin.rejected, *flaws.values()], key=lambda rejection: rejection.row),
        source_sha256={row: digest for row, digest in origin.source_sha256.items() if row not in flaws},
        ranges=origin.ranges,
        environment=job.environment,
    )


def _pieces(rows: Rows, buffer: ArrayBuffer) -> Iterator[Rows]:
    """Runs of rows that follow each other, none larger than a few MB of float32."""
    n_values = buffer.spec.bytes_per_row // buffer.spec.dtype.itemsize
    n_rows = max(1, PIECE_BYTES // (4 * n_values))
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield from (run[start : start + n_rows] for start in range(0, len(run), n_rows))


def fill(
    array: StoredArray, buffer: ArrayBuffer, rows: Rows, first: int, same_numbers: bool
) -> list[tuple[int, str, int]]:
    """Put rows of an array into the buffer of its conversion.

    Args:
        array: of the old store.
        buffer: of the new one.
        rows: numbers in the old store, ascending and consecutive.
        first: the old number of the row that stands first in the buffer.
        same_numbers: copy the codes.

    Returns:
        Rows that cannot be kept, the reason and the tap.
    """
    places = (rows - first).tolist()
    if same_numbers and array.spec.kept_as.is_coded:
        buffer.put_codes(read_codes(array, rows), places)
        return []
    values = read_values(array, rows)
    flaws = [*_overflows(buffer, values, rows)]
    # A row that overflows gets no chunk; what stands in the buffer does not matter.
    with np.errstate(over="ignore"):
        buffer.put(values, places)
    return flaws


def read_values(array: StoredArray, rows: Rows) -> Floats:
    """Values (row, tap, token, channel) of an array; a `sum` has one tap."""
    values = np.empty((len(rows), *array.row_shape), np.float32)
    array.read_into(values, rows)
    return values.reshape(len(rows), len(array.taps), *array.row_shape[-2:])


def read_codes(array: StoredArray, rows: Rows) -> Encoded:
    """Codes and escapes of an int8 array as they are stored; rows are counted from the first of `rows`."""
    codes = np.empty((len(rows), *array.row_shape), np.int8)
    outlying = array.read_stored_into(codes, rows)
    by_tap = codes.reshape(len(rows), len(array.taps), *array.row_shape[-2:])
    position = np.stack(np.unravel_index(outlying.position, by_tap.shape), axis=1).astype(np.uint32)
    return Encoded(codes=by_tap, escapes=Escapes(position=position, value=outlying.value))


def _overflows(buffer: ArrayBuffer, values: Floats, rows: Rows) -> Iterator[tuple[int, str, int]]:
    """Rows with a value that the tier does not reach at its scale, as extraction rejects them."""
    spec = buffer.spec
    limits = np.array([spec.kept_as.limit(exponent) for exponent in buffer.numbers.exponents])
    if np.isinf(limits).all():
        return
    by_tap = values.reshape(*values.shape[:2], -1)
    largest = np.maximum(by_tap.max(axis=2), -by_tap.min(axis=2))
    for at, place in np.argwhere(largest > limits).tolist():
        where = f"{spec.gather} at tap {spec.taps[place]}"
        yield int(rows[at]), f"{largest[at, place]:.3g} in {where} overflows the {spec.tier} tier", spec.taps[place]
