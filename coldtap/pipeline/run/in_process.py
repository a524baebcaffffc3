"""Running the blocks of a job in one process: decoding, the device and writing overlap."""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from coldtap.errors import InterruptedRunError, SourceError
from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.pipeline.extract.block import ExtractedBlock, UnusableRowError, extract_block
from coldtap.pipeline.images.decode_ahead import DecodedBatch, Decoder, Sample
from coldtap.stores.format.journal import JournalLine
from coldtap.stores.storage.threads import few_at_once
from coldtap.stores.writing.block import SpareBuffers
from coldtap.stores.writing.writer import StoreWriter

# One block decodes, one has the device, one is written.
BLOCKS_IN_FLIGHT = 3


@dataclass(kw_only=True)
class BlockRunner:
    """Does blocks of one job in this process, several at a time.

    One thread runs the backbone, block after block, while other blocks decode or write; memory of blocks that are
    written is kept for the next ones.

    Attributes:
        environment: where the job runs, for the journal.
        fail_on_bad_image: raise at the first bad image instead of rejecting its row.
        stop: set when the job must end; blocks in flight are then dropped at their next batch.
    """

    backbone: Backbone
    decoder: Decoder
    writer: StoreWriter
    environment: Mapping[str, Any]
    fail_on_bad_image: bool
    stop: threading.Event

    def __post_init__(self) -> None:
        self._buffers = SpareBuffers(self.writer.new_buffers)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")

    def run_block(self, block: int, advance: Callable[[int], None]) -> JournalLine:
        """Decode, extract and write one block.

        Args:
            block: its number.
            advance: called with the number of rows done, after each batch.

        Raises:
            SourceError: a bad image, where the job is told to fail on one.
            InterruptedRunError: the job was stopped.
            MachineError: the disk is full or refuses.
        """
        # Decoding starts at once; the features wait for the device.
        batches = self.decoder.batches([Sample(row.sample, row.view) for row in self.writer.plan.block(block)])
        found = self._device.submit(self._extract, block, self._watched(batches, advance)).result()
        line = self.writer.write_block(
            block,
            found.buffers,
            rejected=found.rejected,
            source_sha256=found.digests,
            ranges=found.ranges,
            environment=self.environment,
        )
        self._buffers.give_back(found.buffers)
        return line

    def run_blocks(self, blocks: Sequence[int], advance: Callable[[int], None]) -> Generator[JournalLine]:
        """Yield journal lines of blocks as they finish; a few at a time, so that memory does not grow with the dataset.

        An error in one block, or leaving the iteration, stops the others at their next batch.
        """
        with self._device:
            yield from few_at_once(lambda block: self.run_block(block, advance), blocks, BLOCKS_IN_FLIGHT, self.stop)

    def _extract(self, block: int, batches: Iterable[DecodedBatch]) -> ExtractedBlock:
        out = self._buffers.take()
        try:
            return extract_block(self.backbone, block, batches, out, fail_on_bad_image=self.fail_on_bad_image)
        except UnusableRowError as error:
            plan = self.writer.plan
            where = self.decoder.source.where(plan.block(block)[error.row % plan.block_rows].sample)
            raise SourceError(
                f"{where} cannot be used: {error} (`on_bad_image='fail'`); finished blocks are kept"
            ) from None

    def _watched(self, batches: Iterable[DecodedBatch], advance: Callable[[int], None]) -> Iterator[DecodedBatch]:
        """Yield the batches until the job must end, and tell when each is done."""
        for batch in batches:
            if self.stop.is_set():
                raise InterruptedRunError("stopped")
            yield batch
            advance(len(batch.samples))
