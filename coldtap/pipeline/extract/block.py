"""Extraction of one block: rows in, a journal line out. Every way of running a job runs this function."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import torch

from coldtap.errors import InterruptedRunError, SourceError
from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.pipeline.extract.encode import BlockEncoder, Flaw
from coldtap.pipeline.extract.gather import gather
from coldtap.pipeline.images.decode_ahead import DecodedBatch, Decoder
from coldtap.stores.format.journal import JournalLine, Rejection
from coldtap.stores.writing.block import BlockBuffers
from coldtap.stores.writing.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """All that the blocks of one job share.

    Attributes:
        backbone: the frozen model.
        decoder: images to pixels.
        writer: the store in the making.
        environment: where the job runs, for the journal.
        fail_on_bad_image: raise at the first bad image instead of rejecting its row.
        advance: called with the number of rows done, after each batch.
        device: the one thread that runs the backbone, block after block, while other blocks decode or write.
        stop: set when the job must end; blocks in flight are then dropped at their next batch.
        spare_buffers: those of blocks that are written; fresh memory costs more than the copies into it.
    """

    backbone: Backbone
    decoder: Decoder
    device: Executor
    writer: StoreWriter
    environment: Mapping[str, Any]
    fail_on_bad_image: bool = False
    advance: Callable[[int], None] = lambda n_rows: None
    stop: threading.Event = field(default_factory=threading.Event)
    spare_buffers: deque[BlockBuffers] = field(default_factory=deque)

    def take_buffers(self) -> BlockBuffers:
        """Buffers for one block, with whatever an earlier one left in them."""
        try:
            return self.spare_buffers.pop()
        except IndexError:
            return self.writer.new_buffers()


def extract_block(job: Extraction, block: int) -> JournalLine:
    """Decode, run the backbone, gather, encode and write one block.

    Raises:
        SourceError: a bad image, where the job is told to fail on one.
        InterruptedRunError: the job was stopped.
        MachineError: the disk is full or refuses.
    """
    # Decoding starts at once; the features wait for the device.
    batches = job.decoder.batches(job.writer.plan.block(block))
    found = job.device.submit(_features, job, batches).result()
    line = job.writer.write_block(
        block,
        found.buffers,
        rejected=found.rejected,
        source_sha256=found.digests,
        ranges=found.ranges,
        environment=job.environment,
    )
    job.spare_buffers.append(found.buffers)
    return line


@dataclass(frozen=True, slots=True, kw_only=True)
class _Features:
    """What the device gives for a block, ready to be written."""

    buffers: BlockBuffers
    ranges: dict[str, list[list[float]]]
    rejected: list[Rejection]
    digests: dict[int, str]


def _features(job: Extraction, batches: Iterator[DecodedBatch]) -> _Features:
    buffers = job.take_buffers()
    encoder = BlockEncoder(buffers, job.backbone.device)
    rejected: list[Rejection] = []
    digests: dict[int, str] = {}
    for batch in batches:
        if job.stop.is_set():
            raise InterruptedRunError("stopped")
        flaws = _extract_batch(job, batch, encoder)
        _sort_out(job, batch, flaws, digests, rejected)
        job.advance(len(batch.rows))
    return _Features(buffers=buffers, ranges=encoder.ranges(), rejected=rejected, digests=digests)


def _extract_batch(job: Extraction, batch: DecodedBatch, encoder: BlockEncoder) -> dict[int, Flaw]:
    """Features of a batch into the block's buffers; images that could not be read stay in as zeros.

    So the shape of a batch, and with it the last bits of its features, does not depend on its neighbours.
    """
    flaws = {image: Flaw(reason=reason, tap=-1) for image, reason in batch.reasons.items()}
    places = [row.number % job.writer.plan.block_rows for row in batch.rows]
    taps = job.backbone(torch.from_numpy(batch.pixels))
    with torch.inference_mode():
        for part in gather(taps, job.writer.specs):
            encoder.write(part, places, flaws)
    return flaws


def _sort_out(
    job: Extraction,
    batch: DecodedBatch,
    flaws: Mapping[int, Flaw],
    digests: dict[int, str],
    rejected: list[Rejection],
) -> None:
    for image, row in enumerate(batch.rows):
        flaw = flaws.get(image)
        if flaw is None:
            digests[row.number] = batch.digests[image]
            continue
        if job.fail_on_bad_image:
            where = job.decoder.source.where(row.sample)
            raise SourceError(
                f"{where} cannot be used: {flaw.reason} (`on_bad_image='fail'`); finished blocks are kept"
            )
        rejected.append(Rejection(row=row.number, reason=flaw.reason, tap=flaw.tap if flaw.tap >= 0 else None))
