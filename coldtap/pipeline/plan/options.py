"""What the user asks of a job, grouped as a recipe is: extractor, rows, encoding; and how the job is to run.

`cache_features` says what each option means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from coldtap.errors import OptionError
from coldtap.extras import require_extra
from coldtap.pipeline.images.preprocess import Augmentation, Preprocess
from coldtap.pipeline.images.sources import Listing
from coldtap.stores.format.codes import ErrorBound
from coldtap.stores.format.encoding import Encoding
from coldtap.stores.format.rows import SPLITS, RowPlan
from coldtap.stores.format.rows_part import RowsPart
from coldtap.stores.format.tiers import Layout, TierName

if TYPE_CHECKING:
    from torch import nn

type Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision.__value__)


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """How an image becomes features: arguments of `cache_features`, where `quantised` is `quantized`."""

    model: "str | nn.Module | None" = None
    checkpoint: Path | None = None
    random_weights: bool = False
    preprocess: Preprocess | Mapping[str, Any] | None = None
    tap_names: Sequence[str] | None = None
    prefix_tokens: int = 0
    precision: Precision = "float32"
    device: str = "auto"
    quantised: Path | None = None
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise OptionError(f"`precision={self.precision!r}`: choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Which images stand where: arguments of `cache_features`."""

    split: tuple[str, ...] | None = None
    views: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.views < 0:
            raise OptionError(f"`views={self.views}`: give 0 or more augmented views of each training image")
        if unknown := sorted(set(self.split or ()) - set(SPLITS)):
            raise OptionError(f"`split={unknown[0]!r}`: choose among {', '.join(SPLITS)}")

    def plan(self, listing: Listing, splits: Sequence[str], block_rows: int) -> RowPlan:
        """Number the rows, given the split of each sample of a listing.

        Raises:
            OptionError: a split that no sample has.
        """
        kept = self.split or set(splits)
        return RowPlan.of(
            listing.ids,
            splits,
            keep=[name for name in SPLITS if name in kept],
            views=self.views,
            seed=self.seed,
            block_rows=block_rows,
        )

    def to_recipe(self, listing: Listing, rows: RowPlan) -> RowsPart:
        """Return the rows part of a recipe."""
        return RowsPart(
            listing=listing.fingerprint,
            splits={name: len(samples) for name, samples in rows.order.items()},
            val="cut from train" if listing.val_is_cut else "given",
            order=rows.order_digest(listing.ids),
            seed=self.seed,
            views=self.views,
            augmentation=self.augmentation.to_dict() if self.views else None,
        )


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """Which features are kept, and how their numbers are: arguments of `cache_features`, `bound` its two."""

    taps: str = "all"
    gather: tuple[str, ...] | None = None
    sum_at: str | None = None
    tier: TierName = "float16"
    layout: Layout | None = None
    bound: ErrorBound | None = None

    def __post_init__(self) -> None:
        self.choose()

    def choose(self) -> Encoding:
        """Fill in what is left open.

        Raises:
            OptionError: an unknown tier or layout, or a bound for a tier that has none.
        """
        return Encoding.choose(self.tier, self.layout, self.bound)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a job runs: arguments of `cache_features` of which none is part of a recipe."""

    batch_size: int | None = None
    decode_threads: int | None = None
    workers: int = 1
    on_bad_image: Literal["reject", "fail"] = "reject"
    max_rejected: float = 0.01
    allow_mixed: bool = False
    dry_run: bool = False

    @property
    def fails_on_bad_image(self) -> bool:
        """Whether the first bad image ends the job."""
        return self.on_bad_image == "fail"

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"`batch_size={self.batch_size}`: give at least 1 image")
        if self.decode_threads is not None and self.decode_threads < 1:
            raise OptionError(f"`decode_threads={self.decode_threads}`: give at least 1")
        if self.workers < 1:
            raise OptionError(f"`workers={self.workers}`: give at least 1 process")
        if self.workers > 1:
            require_extra("cluster", for_=f"`workers={self.workers}`")
        if not 0 <= self.max_rejected <= 1:
            raise OptionError(f"`max_rejected={self.max_rejected}`: give a share from 0 to 1")
        if self.on_bad_image not in ("reject", "fail"):
            raise OptionError(f"`on_bad_image={self.on_bad_image!r}`: choose reject or fail")
