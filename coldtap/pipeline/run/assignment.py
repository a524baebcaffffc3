"""What a worker process is told of a job, and how it makes ready for its blocks."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from coldtap.pipeline.backbones.backbone import load_from_options
from coldtap.pipeline.images.sources.parquet import ParquetSource
from coldtap.pipeline.images.sources.spool import SharedSpool
from coldtap.pipeline.plan.description import JobDescription
from coldtap.pipeline.plan.plan import plan_job
from coldtap.pipeline.run.in_process import BlockRunner
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.reading.recipe_file import require_same_recipe
from coldtap.stores.storage.contract import Storage
from coldtap.stores.writing.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A job on a store that was begun: its recipe and the metadata of its arrays are there.

    Attributes:
        description: the job, as `JobDescription.dumps` gives it.
        storage: where it writes; the process that gives out the blocks holds its lock.
        recipe: what the plan of every worker must come to.
        environment: for the journal.
        batch_size: images per forward pass.
        decode_threads: of each worker.
        torch_threads: of each worker.
        fail_on_bad_image: raise at the first bad image instead of rejecting its row.
        spool: the images of a Parquet source, which need not be copied once per worker.
    """

    description: bytes
    storage: Storage
    recipe: Recipe
    environment: Mapping[str, Any]
    batch_size: int
    decode_threads: int
    torch_threads: int
    fail_on_bad_image: bool
    spool: SharedSpool | None

    def make_ready(self, stop: threading.Event) -> BlockRunner:
        """Load the backbone, list the source and open the store; takes seconds, once per process.

        Raises:
            OptionError: source or model cannot be made anew in this process.
            RecipeMismatchError: images or weights have changed since the job was planned.
        """
        torch.set_num_threads(self.torch_threads)
        description = JobDescription.loads(self.description)
        source = description.open_source()
        if isinstance(source, ParquetSource) and self.spool is not None:
            source.use_spool(self.spool)
        backbone = load_from_options(description.extractor)
        splits = source.listing.splits
        plan = plan_job(source, backbone, splits=splits, rows=description.rows, encoding=description.encoding)
        require_same_recipe(self.storage, self.recipe, plan.recipe)
        return BlockRunner(
            backbone=backbone,
            decoder=plan.decoder(self.batch_size, self.decode_threads),
            writer=StoreWriter.join(self.storage, plan.recipe, plan.specs, plan.rows),
            environment=self.environment,
            fail_on_bad_image=self.fail_on_bad_image,
            stop=stop,
        )
