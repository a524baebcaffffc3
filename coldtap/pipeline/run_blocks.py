"""Running the blocks of a job in one process: decoding, the device and writing overlap."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from coldtap.pipeline.extract import Extraction, extract_block
from coldtap.stores.journal import JournalLine

# One block decodes, one has the device, one is written.
BLOCKS_IN_FLIGHT = 3


def run_blocks(job: Extraction, blocks: Sequence[int]) -> Iterator[JournalLine]:
    """Journal lines of blocks as they finish; a few at a time, so that memory does not grow with the dataset.

    An error in one block, or leaving the iteration, stops the others at their next batch.
    """
    left = iter(blocks)
    with ThreadPoolExecutor(BLOCKS_IN_FLIGHT, thread_name_prefix="block") as pool:
        running: set[Future[JournalLine]] = set()
        try:
            while True:
                while len(running) < BLOCKS_IN_FLIGHT and (block := next(left, None)) is not None:
                    running.add(pool.submit(extract_block, job, block))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            job.stop.set()
