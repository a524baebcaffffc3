"""Extraction of one block: decoded images in, encoded features out. Every way of running a job runs this function."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from coldtap.errors import SourceError
from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.pipeline.extract.encode import BlockEncoder, Flaw
from coldtap.pipeline.extract.gather import gather
from coldtap.pipeline.images.decode_ahead import DecodedBatch
from coldtap.stores.format.journal import Rejection
from coldtap.stores.writing.block import BlockBuffers


class UnusableRowError(SourceError):
    """A row that a job is told to fail on; `row` is its number in the store."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedBlock:
    """The features of a block, ready to be written.

    Attributes:
        buffers: stored numbers and escapes of each array, with leftovers in rows that are not there.
        ranges: smallest and largest value of each tap, by array.
        rejected: rows that could not be read, or whose features cannot be kept.
        digests: SHA-256 of the image of each row that is there.
    """

    buffers: BlockBuffers
    ranges: Mapping[str, list[list[float]]]
    rejected: Sequence[Rejection]
    digests: Mapping[int, str]


def extract_block(
    backbone: Backbone,
    block: int,
    batches: Iterable[DecodedBatch],
    out: BlockBuffers,
    *,
    fail_on_bad_image: bool = False,
) -> ExtractedBlock:
    """Run the backbone over the images of one block, gather and encode its taps.

    The result depends on the arguments alone, and what lies in `out` beforehand does not matter: it is memory to write
    into, as NumPy's `out` is.

    Args:
        backbone: the frozen model.
        block: the block's number.
        batches: the images of all its rows, in row order.
        out: room for one block of every array that is wanted, and how its numbers are kept.
        fail_on_bad_image: raise at the first row that cannot be used instead of rejecting it.

    Raises:
        UnusableRowError: a row cannot be used, where that is to be an error.
        StoreError: more escapes than int8 codes can bear.
    """
    rows = _BlockRows(block * next(iter(out.values())).spec.block_rows, fail=fail_on_bad_image)
    encoder = BlockEncoder(out, backbone.device)
    specs = [buffer.spec for buffer in out.values()]
    done = 0
    for batch in batches:
        places = range(done, done + len(batch.samples))
        # Images that could not be read stay in as zeros: so the shape of a batch, and with it the last bits of its
        # features, does not depend on its neighbours.
        flaws = {image: Flaw(reason=reason, tap=-1) for image, reason in batch.reasons.items()}
        taps = backbone(torch.from_numpy(batch.pixels))
        with torch.inference_mode():
            for part in gather(taps, specs):
                encoder.write(part, places, flaws)
        rows.sort_out(batch, done, flaws)
        done += len(places)
    return ExtractedBlock(buffers=out, ranges=encoder.ranges(), rejected=rows.rejected, digests=rows.digests)


@dataclass(slots=True)
class _BlockRows:
    """Which rows of a block are there; `first` is the number of its first row."""

    first: int
    fail: bool
    rejected: list[Rejection] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)

    def sort_out(self, batch: DecodedBatch, start: int, flaws: Mapping[int, Flaw]) -> None:
        """Take in a batch whose first image stands at `start` in the block."""
        for image in range(len(batch.samples)):
            row, flaw = self.first + start + image, flaws.get(image)
            if flaw is None:
                self.digests[row] = batch.digests[image]
            elif self.fail:
                raise UnusableRowError(row, flaw.reason)
            else:
                tap = flaw.tap if flaw.tap >= 0 else None
                self.rejected.append(Rejection(row=row, reason=flaw.reason, tap=tap))
