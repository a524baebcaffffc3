"""An extraction on its way: a planned job with the backbone that does it, in this process or on workers."""

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import timm
import torch

from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.pipeline.extract.calibrate import calibrate
from coldtap.pipeline.images.decode_ahead import Decoder
from coldtap.pipeline.images.sources.parquet import ParquetSource
from coldtap.pipeline.plan.options import RunOptions
from coldtap.pipeline.plan.plan import JobPlan
from coldtap.pipeline.run.assignment import Assignment
from coldtap.pipeline.run.in_process import BlockRunner
from coldtap.pipeline.run.rejections import Rejections
from coldtap.pipeline.run.same_threads import batch_sizes, threads_with_the_same_features
from coldtap.stores.format.journal import JournalLine
from coldtap.stores.reading.journal_lines import read_line
from coldtap.stores.storage.contract import Storage
from coldtap.stores.writing.calibration import Calibration
from coldtap.stores.writing.job import Making
from coldtap.stores.writing.reporting import Reporter
from coldtap.stores.writing.writer import StoreWriter
from coldtap.version import __version__


def environment_of(backbone: Backbone, batch_size: int) -> dict[str, Any]:
    """Return where features are made: device, library versions, batch size, and of a quantised backbone the kernel."""
    device, choice = backbone.device, backbone.kernel
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "coldtap": __version__,
        "batch_size": batch_size,
        **({"kernel": choice.kernel.name} if choice else {}),
    }


@dataclass(frozen=True, kw_only=True)
class Extraction(Making):
    """A planned job with all that does it; `description` is what workers are told."""

    plan: JobPlan
    backbone: Backbone
    decoder: Decoder
    running: RunOptions
    description: bytes
    rejections: Rejections

    def calibrate(self, storage: Storage) -> Calibration:
        """Run the first rows, for scales and for the forecast."""
        return calibrate(self.backbone, self.decoder, self.specs, self.rows, self.plan.bound)

    def make(self, writer: StoreWriter, todo: Sequence[int], reporter: Reporter, stop: threading.Event) -> None:
        """Do blocks, here or on workers, until too much is rejected; blocks that are there already count too."""
        for block in sorted(set(range(self.rows.n_blocks)) - set(todo)):
            if line := read_line(writer.storage, block):
                self.rejections.count(line)
        n_workers = min(self.running.workers, len(todo))
        run = self._run_here if n_workers <= 1 else self._run_on_workers
        with closing(run(writer, todo, reporter, stop)) as lines:
            for line in lines:
                self.rejections.count(line)

    def finish(self, writer: StoreWriter) -> str:
        """Write the tables and the manifest."""
        return writer.finish(self.plan.source.listing.ids, self.plan.source.where, self.plan.targets())

    def _run_here(
        self, writer: StoreWriter, todo: Sequence[int], reporter: Reporter, stop: threading.Event
    ) -> Generator[JournalLine]:
        runner = BlockRunner(
            backbone=self.backbone,
            decoder=self.decoder,
            writer=writer,
            environment=self.recorded["environment"],
            fail_on_bad_image=self.running.fails_on_bad_image,
            stop=stop,
        )
        return runner.run_blocks(todo, reporter.advance)

    def _run_on_workers(
        self, writer: StoreWriter, todo: Sequence[int], reporter: Reporter, stop: threading.Event
    ) -> Generator[JournalLine]:
        from coldtap.pipeline.run.dask import run_on_workers  # dask and its libraries take a second to import

        n_workers = min(self.running.workers, len(todo))
        source = self.plan.source
        assignment = Assignment(
            description=self.description,
            storage=writer.storage,
            recipe=self.recipe,
            environment=self.recorded["environment"],
            batch_size=self.decoder.batch_size,
            decode_threads=max(1, self.decoder.n_threads // n_workers),
            torch_threads=self._threads_per_worker(n_workers, reporter),
            fail_on_bad_image=self.running.fails_on_bad_image,
            spool=source.share_spool() if isinstance(source, ParquetSource) else None,
        )
        return run_on_workers(assignment, self.rows, todo, n_workers, advance=reporter.advance, stop=stop)

    def _threads_per_worker(self, n_workers: int, reporter: Reporter) -> int:
        """Return a fair share of the torch threads, where it leaves every bit as it is."""
        own = torch.get_num_threads()
        sizes = batch_sizes(self.rows, self.decoder.batch_size)
        n_threads = threads_with_the_same_features(self.backbone, sizes, max(1, own // n_workers))
        if n_threads * n_workers > own > 1:
            reporter.note(
                f"each of {n_workers} workers runs {n_threads} torch threads on cores for {own}: with fewer the "
                "features would differ in their last bits; fewer `workers` may be as fast"
            )
        return n_threads
