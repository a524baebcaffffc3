"""Running the blocks of a job in one process: decoding, the device and writing overlap."""

from collections.abc import Iterator, Sequence
from functools import partial

from coldtap.pipeline.extract.block import Extraction, extract_block
from coldtap.stores.format.journal import JournalLine
from coldtap.stores.storage.threads import few_at_once

# One block decodes, one has the device, one is written.
BLOCKS_IN_FLIGHT = 3


def run_blocks(job: Extraction, blocks: Sequence[int]) -> Iterator[JournalLine]:
    """Journal lines of blocks as they finish; a few at a time, so that memory does not grow with the dataset.

    An error in one block, or leaving the iteration, stops the others at their next batch.
    """
    yield from few_at_once(partial(extract_block, job), blocks, BLOCKS_IN_FLIGHT, job.stop)
