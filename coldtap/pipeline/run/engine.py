"""From a plan to features: the loaded backbone and all that runs it, the one door from a plan to torch and timm.

A plan and its job import nothing of this; `coldtap.pipeline.job` opens the door when the plan needs a backbone.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import timm
import torch

from coldtap.pipeline.backbones.backbone import Backbone, load_from_options
from coldtap.pipeline.backbones.batch_size import choose_batch_size
from coldtap.pipeline.extract.calibrate import calibrate
from coldtap.pipeline.images.decode_ahead import Decoder
from coldtap.pipeline.images.sources.parquet import ParquetSource
from coldtap.pipeline.plan.backbone_description import BackboneDescription
from coldtap.pipeline.plan.options import ExtractorOptions
from coldtap.pipeline.plan.plan import JobPlan
from coldtap.pipeline.run.assignment import Assignment
from coldtap.pipeline.run.block_run import BlockRun
from coldtap.pipeline.run.in_process import BlockRunner
from coldtap.pipeline.run.same_threads import batch_sizes, threads_with_the_same_features
from coldtap.stores.format.journal import JournalLine
from coldtap.stores.writing.block import SpareBuffers
from coldtap.stores.writing.calibration import Calibration
from coldtap.version import __version__


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded backbone, ready to extract."""

    backbone: Backbone

    @classmethod
    def load(cls, options: ExtractorOptions) -> "Engine":
        """Load a backbone onto its device.

        Raises:
            ModelError: it, its weights or its taps cannot be used.
            MachineError: there is no such device.
        """
        return cls(load_from_options(options))

    def describe(self) -> BackboneDescription:
        """What a plan has to know of the backbone."""
        return self.backbone.describe()

    @property
    def kernel(self) -> tuple[str, str] | None:
        """The name of a quantised backbone's kernel, and why it was taken."""
        choice = self.backbone.kernel
        return None if choice is None else (choice.kernel.name, choice.why)

    def choose_batch_size(self) -> int:
        """Images per forward pass where nobody says."""
        return choose_batch_size(self.backbone)

    def environment(self, batch_size: int) -> dict[str, Any]:
        """Where features are made: device, library versions, batch size, and of a quantised backbone the kernel."""
        device = self.backbone.device
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "coldtap": __version__,
            "batch_size": batch_size,
            **({"kernel": self.kernel[0]} if self.kernel else {}),
        }

    def calibrate(self, decoder: Decoder, plan: JobPlan) -> Calibration:
        """Run the first rows of a job, for scales and for the forecast."""
        return calibrate(self.backbone, decoder, plan.specs, plan.rows, plan.bound)

    def run_here(self, run: BlockRun, blocks: Sequence[int]) -> Generator[JournalLine]:
        """Do blocks in this process."""
        with ThreadPoolExecutor(1, "device") as device:
            runner = BlockRunner(
                backbone=self.backbone,
                decoder=run.decoder,
                writer=run.writer,
                buffers=SpareBuffers(run.writer.new_buffers),
                environment=run.environment,
                fail_on_bad_image=run.fail_on_bad_image,
                device=device,
                stop=run.stop,
            )
            yield from runner.run_blocks(blocks, run.reporter.advance)

    def run_on_workers(
        self, run: BlockRun, blocks: Sequence[int], n_workers: int, description: bytes
    ) -> Generator[JournalLine]:
        """Do blocks in worker processes, which share the threads that this one would have used.

        Args:
            run: what the run is given.
            blocks: their numbers.
            n_workers: how many processes.
            description: the job, as `JobDescription.dumps` gives it.
        """
        from coldtap.pipeline.run.dask import run_on_workers  # dask and its libraries take a second to import

        decoder, writer = run.decoder, run.writer
        source = decoder.source
        assignment = Assignment(
            description=description,
            storage=writer.storage,
            recipe=writer.recipe,
            environment=run.environment,
            batch_size=decoder.batch_size,
            decode_threads=max(1, decoder.n_threads // n_workers),
            torch_threads=self._threads_per_worker(run, n_workers),
            fail_on_bad_image=run.fail_on_bad_image,
            spool=source.share_spool() if isinstance(source, ParquetSource) else None,
        )
        yield from run_on_workers(
            assignment, writer.plan, blocks, n_workers, advance=run.reporter.advance, stop=run.stop
        )

    def _threads_per_worker(self, run: BlockRun, n_workers: int) -> int:
        """A fair share of the torch threads, where it leaves every bit as it is."""
        own = torch.get_num_threads()
        sizes = batch_sizes(run.writer.plan, run.decoder.batch_size)
        n_threads = threads_with_the_same_features(self.backbone, sizes, max(1, own // n_workers))
        if n_threads * n_workers > own > 1:
            run.reporter.note(
                f"each of {n_workers} workers runs {n_threads} torch threads on cores for {own}: with fewer the "
                "features would differ in their last bits; fewer `workers` may be as fast"
            )
        return n_threads
