"""The options that adaptors share, and the parts that are built from them: LSA stacks and heads."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.adaptors.networks.heads import ClassifierHead, HeadNorm, NormAt, Pool, head_parameters
from coldtap.adaptors.networks.lsa.attention import Init, LowRankAttention, lsa_parameters
from coldtap.adaptors.networks.options import require_at_least, require_positive, require_probability
from coldtap.errors import OptionError

type NormChoice = Literal["auto", "backbone", "new", "none"]


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options of every adaptor: what the classifier sees. `norm=auto` is settled when the store is known."""

    pool: Pool = "patch-mean"
    norm: NormChoice = "auto"
    norm_at: NormAt = "after"

    @property
    def is_random(self) -> bool:
        """Return whether a step draws random numbers."""
        return False


@dataclass(frozen=True, kw_only=True)
class LsaOptions(HeadOptions):
    """Options of every adaptor that stacks LSA modules."""

    rank: int = 4
    heads: int = 1
    init: Init = "zero-up"
    lsa_norm: bool = True
    bias: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_at_least(1, rank=self.rank, heads=self.heads)
        require_probability(dropout=self.dropout, drop_path=self.drop_path)
        require_positive(scale=self.scale)
        if self.rank % self.heads:
            raise OptionError(f"rank={self.rank} must be divisible by heads={self.heads}")

    @property
    def is_random(self) -> bool:
        """Return whether a step draws random numbers."""
        return self.dropout > 0 or self.drop_path > 0


def settle_head[OptionsT: HeadOptions](options: OptionsT, spec: FeatureSpec, *, prefer_backbone: bool) -> OptionsT:
    """Check the head's options against the features, and settle `norm=auto`.

    Args:
        options: The adaptor's options.
        spec: The features that it will read.
        prefer_backbone: Whether the pooled tokens are such as the backbone's own final norm was trained for.

    Raises:
        OptionError: A prefix token is pooled that the backbone does not have, or a norm is asked for that the store
            does not have or that needs tokens which the features no longer hold.
    """
    if options.pool in ("prefix", "both") and spec.geometry.prefix_tokens == 0:
        raise OptionError(f"pool={options.pool}: the backbone has no prefix token: use pool=patch-mean")
    norm = options.norm
    if norm == "auto":
        norm = "backbone" if prefer_backbone and spec.final_norm is not None else "new"
    if norm == "backbone" and spec.final_norm is None:
        raise OptionError(
            f"norm=backbone: the store has no final norm of {spec.geometry.channels} channels: use norm=new or none"
        )
    return dataclasses.replace(options, norm=norm)


def build_head(spec: FeatureSpec, options: HeadOptions, *, n_classes: int) -> ClassifierHead:
    """Build the head from shapes and settled options."""
    final = spec.final_norm
    return ClassifierHead(
        channels=spec.geometry.channels,
        n_classes=n_classes,
        tokens=spec.geometry.tokens,
        prefix_tokens=spec.geometry.prefix_tokens,
        pool=options.pool,
        norm=settled_norm(options),
        norm_at=options.norm_at,
        backbone_norm=final.kind if final else "layer_norm",
        backbone_norm_eps=final.eps if final else 1e-6,
    )


def count_head(spec: FeatureSpec, options: HeadOptions, *, n_classes: int) -> int:
    """Return the trainable parameters of the head that `build_head` makes."""
    return head_parameters(
        channels=spec.geometry.channels, n_classes=n_classes, pool=options.pool, norm=settled_norm(options)
    )


def settled_norm(options: HeadOptions) -> HeadNorm:
    """Return the head's norm from options that `settle_head` has settled."""
    assert options.norm != "auto", "the options were not planned"
    return options.norm


def lsa_stack(options: LsaOptions, *, channels: int, depth: int) -> nn.Sequential:
    """Build `depth` LSA modules in a row."""
    return nn.Sequential(
        *(
            LowRankAttention(
                channels=channels,
                rank=options.rank,
                heads=options.heads,
                init=options.init,
                norm=options.lsa_norm,
                bias=options.bias,
                dropout=options.dropout,
                drop_path=options.drop_path,
                scale=options.scale,
            )
            for _ in range(depth)
        )
    )


def count_stack(options: LsaOptions, *, channels: int, depth: int) -> int:
    """Return the parameters of the stack that `lsa_stack` builds."""
    one = lsa_parameters(channels=channels, rank=options.rank, norm=options.lsa_norm, bias=options.bias)
    return depth * one
