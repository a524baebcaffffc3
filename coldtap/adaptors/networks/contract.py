"""What an adaptor is: what it needs from a store, options and shapes in, logits out.

An adaptor is one file with a dataclass of options (whose `is_random` says whether a step draws random numbers), a
`plan` (which array and taps it reads, and its options with every automatic choice made), a `build` (an `nn.Module` from
shapes alone, so that a run folder can be loaded without its store), a closed form of its trainable parameters, and an
`AdaptorKind` that names them. Its module maps features to logits (batch, class), or with `pool=tokens` to (batch,
patch, class):

    layers  (batch, tap, token, channel)       the taps of `FeatureSpec.taps`, in that order
    sum     (batch, token, channel)
    pooled  (batch, tap, prefix + 1, channel)  the last position is the mean of the patch tokens

`networks/testing.py` has the tests that every adaptor must pass.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from coldtap.adaptors.networks.heads import FrozenNorm, NormKind
from coldtap.errors import MissingFeaturesError
from coldtap.stores import FinalNorm, Store, StoredArray
from coldtap.stores.format.gathers import GATHERS, GatherName
from coldtap.stores.format.geometry import Geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """What a module must know of the backbone's final norm before its numbers are there."""

    kind: NormKind
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """Which numbers of a store an adaptor reads, and their shape; `predict` gathers the same from a backbone."""

    array: str
    gather: GatherName
    taps: tuple[int, ...]
    depth: int
    geometry: Geometry
    final_norm: NormSpec | None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one sample's features, without the batch axis."""
        return GATHERS[self.gather].row_shape(self.geometry, len(self.taps))

    def to_dict(self) -> dict[str, Any]:
        """Return the specification as JSON, for `run.json`."""
        norm = None if self.final_norm is None else dataclasses.asdict(self.final_norm)
        fields = {"array": self.array, "gather": self.gather, "taps": list(self.taps), "depth": self.depth}
        return {**fields, "geometry": self.geometry.to_dict(), "final_norm": norm}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "FeatureSpec":
        """Parse what `to_dict` gave; a missing or unknown key is a KeyError or TypeError."""
        norm = record["final_norm"]
        parsed = {
            "taps": tuple(record["taps"]),
            "geometry": Geometry.from_dict(record["geometry"]),
            "final_norm": None if norm is None else NormSpec(**norm),
        }
        return cls(**{**record, **parsed})


class Build[OptionsT](Protocol):
    """Makes an adaptor's module from shapes and planned options."""

    def __call__(self, spec: FeatureSpec, options: OptionsT, *, n_classes: int) -> nn.Module:
        """Return a module that maps features of `spec` to logits (batch, class)."""


class Count[OptionsT](Protocol):
    """The closed form of an adaptor's trainable parameters."""

    def __call__(self, spec: FeatureSpec, options: OptionsT, *, n_classes: int) -> int:
        """Return the trainable parameters of the module that `build` makes of the same arguments."""


@runtime_checkable
class Penalised(Protocol):
    """A module that adds a term of its own to the loss."""

    def penalty(self) -> torch.Tensor:
        """Return what a step adds to the mean loss (nats)."""


@runtime_checkable
class EpochAware(Protocol):
    """A module that changes as training goes on; what it changes must be in its state dict."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare for an epoch, from 1 to `epochs`, before its first step; not again when it is gone on with."""


def any_gather(_: object) -> tuple[GatherName, ...]:
    """Return all gathers: for an adaptor that does not say which it reads."""
    return tuple(GATHERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptorKind[OptionsT]:
    """One adaptor: its options, what it reads, how it is built, and its default peak learning rate.

    `paper` names the source of the method. `cannot_stack` says why `torch.func.vmap` cannot run the network over
    stacked parameters, where it cannot: such trials run one after the other on each batch. `gathers` says from options
    which gathers a store made for the adaptor alone must hold, so that no more is cached than is read; `plan` may be
    content with others that are there.
    """

    name: str
    paper: str
    options: type[OptionsT]
    plan: Callable[[Store, OptionsT], tuple[FeatureSpec, OptionsT]]
    build: Build[OptionsT]
    count: Count[OptionsT]
    lr: float
    cannot_stack: str = ""
    gathers: Callable[[OptionsT], tuple[GatherName, ...]] = any_gather


def arrays_of(store: Store, gather: GatherName) -> list[StoredArray]:
    """Return a store's arrays of one gather."""
    return [array for array in store.arrays.values() if array.gather == gather]


def describe_gathers(store: Store) -> str:
    """Say which gathers a store holds, for messages: `sum, pooled`."""
    return ", ".join(gather for gather in GATHERS if arrays_of(store, gather)) or "no features"


def refuse_stage_network(store: Store, *, adaptor: str) -> None:
    """Refuse a store whose taps are stages, whichever of them it keeps.

    Raises:
        MissingFeaturesError: The backbone is a stage network, such as Swin, ConvNeXt or ResNet.
    """
    taps = store.recipe.extractor.taps
    if len({tap.geometry for tap in taps}) > 1 or any(tap.name.startswith("stage") for tap in taps):
        raise MissingFeaturesError(
            f"{adaptor} needs taps of one geometry, z0 … zN; {store.storage} holds the stages of a stage network "
            f"({store.recipe.extractor.architecture}): use `adaptor='linear'`, or a ViT backbone"
        )


def spec_of(store: Store, array: StoredArray, taps: tuple[int, ...]) -> FeatureSpec:
    """Describe some taps of a stored array."""
    return FeatureSpec(
        array=array.name,
        gather=array.gather,
        taps=taps,
        depth=store.depth,
        geometry=array.geometry,
        final_norm=_final_norm(store.norm, array),
    )


def _final_norm(norm: FinalNorm | None, array: StoredArray) -> NormSpec | None:
    """The backbone's final norm, where it is a norm over this array's channels."""
    if norm is None or any(
        values is not None and values.shape != (array.geometry.channels,) for values in (norm.weight, norm.bias)
    ):
        return None
    return NormSpec(kind=norm.kind, eps=norm.eps)


def copy_final_norm(module: nn.Module, norm: FinalNorm | None) -> None:
    """Copy the store's final norm into every frozen norm of a freshly built adaptor."""
    for part in module.modules():
        if isinstance(part, FrozenNorm) and norm is not None:
            for target, values in ((part.weight, norm.weight), (part.bias, norm.bias)):
                if values is not None:
                    target.copy_(torch.from_numpy(values.copy()))
