"""What a job is, in values that travel: every process that is told them does the same blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from coldtap.errors import OptionError
from coldtap.pipeline.backbones.backbone import Backbone, Precision, load_backbone
from coldtap.pipeline.images.preprocess import Augmentation, Preprocess
from coldtap.pipeline.images.sources import Source, open_source
from coldtap.pipeline.plan.plan import JobPlan, plan_job
from coldtap.stores.format.arrays import Layout, Tier
from coldtap.stores.format.codes import ErrorBound


@dataclass(frozen=True, kw_only=True)
class JobDescription:
    """The arguments of `cache_features` that decide a store's bytes; `source` may also be an opened one."""

    source: Any
    model: str | nn.Module | None
    checkpoint: Path | None
    random_weights: bool
    preprocess: Preprocess | Mapping[str, Any] | None
    tap_names: Sequence[str] | None
    prefix_tokens: int
    precision: Precision
    device: str
    taps: str
    gather: Sequence[str] | None
    sum_at: str | None
    tier: Tier
    layout: Layout | None
    bound: ErrorBound | None
    split: Sequence[str] | None
    views: int
    augmentation: Augmentation | None
    seed: int
    quantised: Path | None
    kernel: str

    def dumps(self) -> bytes:
        """Pickle it, with the classes that only `__main__` has.

        Raises:
            OptionError: a source or a module from Python cannot be pickled.
        """
        import cloudpickle  # type: ignore[import-untyped] # of the extra `cluster`

        try:
            return bytes(cloudpickle.dumps(self))
        except Exception as error:  # whatever the pickling of a caller's object raises
            raise OptionError(
                f"--workers sends source and model to other processes, and one of them cannot be pickled "
                f"({type(error).__name__}: {error}): mend that, or use --workers 1"
            ) from error

    @classmethod
    def loads(cls, pickled: bytes) -> Self:
        """The description of `dumps`.

        Raises:
            OptionError: the source or the module cannot be made anew in this process.
        """
        import cloudpickle

        try:
            description = cloudpickle.loads(pickled)
        except Exception as error:
            raise OptionError(
                f"a worker process cannot make source or model anew ({type(error).__name__}: {error}): "
                "define their classes in a module that can be imported, or use --workers 1"
            ) from error
        assert isinstance(description, cls)
        return description

    def open_source(self) -> Source:
        """List the images.

        Raises:
            SourceError: they cannot be used.
        """
        if hasattr(self.source, "listing") and hasattr(self.source, "read"):
            opened: Source = self.source
            return opened
        return open_source(self.source, seed=self.seed)

    def load_backbone(self) -> Backbone:
        """Load the backbone onto its device.

        Raises:
            ModelError: it, its weights or its taps cannot be used.
            MachineError: there is no such device.
        """
        return load_backbone(
            self.model,
            checkpoint=self.checkpoint,
            random_weights=self.random_weights,
            precision=self.precision,
            device=self.device,
            preprocess=self.preprocess,
            taps=self.tap_names,
            prefix_tokens=self.prefix_tokens,
            quantised=self.quantised,
            kernel=self.kernel,
        )

    def plan(self, source: Source, backbone: Backbone, splits: Sequence[str]) -> JobPlan:
        """Plan the job, given the split of each sample.

        Raises:
            OptionError: a choice that the source or the backbone does not allow.
            ModelError: a tap that the backbone does not have.
        """
        return plan_job(
            source,
            backbone,
            splits=splits,
            taps=self.taps,
            gather=self.gather,
            sum_at=self.sum_at,
            tier=self.tier,
            layout=self.layout,
            bound=self.bound,
            split=self.split,
            views=self.views,
            augmentation=self.augmentation,
            seed=self.seed,
        )
