"""What is asked of a trial: how it is trained, and the adaptor's own options."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coldtap.adaptors.data.epoch_order import SHUFFLES
from coldtap.adaptors.networks.options import require_at_least, require_positive, require_probability
from coldtap.adaptors.runs.settings import Fit, Keep
from coldtap.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a trial is trained; all but the batches and their order may differ among trials that share a pass.

    `lr` None is the adaptor's own default; `order_seed` None is the seed. `compensation` names that of the store which
    features go through; None leaves them as they are.
    """

    epochs: int = 100
    lr: float | None = None
    batch_size: int = 32
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.0
    patience: int | None = None
    seed: int = 0
    order_seed: int | None = None
    shuffle: str = "uniform"
    target: str = "label"
    fit: Fit = "train"
    keep: Keep = "best"
    compensation: str | None = None

    def __post_init__(self) -> None:
        require_at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        require_at_least(0, seed=self.seed, order_seed=self.order_seed or 0)
        require_probability(warmup=self.warmup, label_smoothing=self.label_smoothing)
        if self.lr is not None:
            require_positive(lr=self.lr)
        if not 0 <= self.weight_decay < float("inf"):
            raise OptionError(f"weight_decay={self.weight_decay}: it must be 0 or more, and finite")
        if self.patience is not None:
            require_at_least(1, patience=self.patience)
        if self.shuffle not in SHUFFLES:
            raise OptionError(f"shuffle={self.shuffle}: it must be one of {', '.join(SHUFFLES)}")
        if self.fit == "train+val" and (self.keep != "last" or self.patience is not None):
            raise OptionError(
                "fit=train+val leaves no val to choose or to stop by: it goes with keep=last, no patience"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOptions:
    """One trial as it is asked for: an adaptor, its own options (text, or as they are), and how it is trained.

    `varied` holds the values by which it differs from the others of its grid, without the seed: trials of one setting
    share it.
    """

    adaptor: str
    training: TrainingOptions
    options: Mapping[str, object] = field(default_factory=dict)
    varied: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique among the trials of a grid, and fit for a folder: `lr=0.001,rank=4,seed=0`."""
        return ",".join(f"{key}={value}" for key, value in {**self.varied, "seed": self.training.seed}.items())
