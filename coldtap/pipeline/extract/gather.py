"""How taps become stored tensors: each tap kept, their running sum, or their pooled tokens.

Sums accumulate in float32. Every tap that is used is checked for non-finite values, row by row, on the
device that has it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from coldtap.stores.format.gathers import GatherName
from coldtap.stores.format.geometry import Geometry


class FeatureSpec(Protocol):
    """Which features are wanted: an array's specification and an adaptor's are such ones."""

    @property
    def gather(self) -> GatherName:
        """How taps become one tensor."""

    @property
    def geometry(self) -> Geometry:
        """That the taps share."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Indices of the taps; of `sum` the one k of z0 + … + zk."""


@dataclass(slots=True, kw_only=True)
class Gathered[S: FeatureSpec]:
    """One tap of wanted features for a batch.

    Attributes:
        spec: what they were wanted for.
        tap: index of the tap; of `sum` k.
        position: the tap's place on the tap axis; None where there is no such axis (`sum`).
        values: (batch, token, channel) float, on the backbone's device.
        low, high: (batch,) the smallest and largest value of each image; NaN where one is NaN.
    """

    spec: S
    tap: int
    position: int | None
    values: Tensor
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)

    def __post_init__(self) -> None:
        flat = self.values.flatten(1)
        # An eighth of the time of torch.aminmax along an axis, with equal results, NaN included.
        self.low, self.high = flat.amin(dim=1), flat.amax(dim=1)


def gather[S: FeatureSpec](taps: Sequence[Tensor], specs: Sequence[S]) -> Iterator[Gathered[S]]:
    """Yield all features that are wanted of a batch, from every tap of the backbone, (batch, token, channel) each."""
    for name, gathered in GATHERED.items():
        if some := [spec for spec in specs if spec.gather == name]:
            yield from gathered(taps, some)


def _layers[S: FeatureSpec](taps: Sequence[Tensor], specs: Sequence[S]) -> Iterator[Gathered[S]]:
    for spec in specs:
        for position, tap in enumerate(spec.taps):
            yield Gathered(spec=spec, tap=tap, position=position, values=taps[tap])


def _pooled[S: FeatureSpec](taps: Sequence[Tensor], specs: Sequence[S]) -> Iterator[Gathered[S]]:
    for spec in specs:
        for position, tap in enumerate(spec.taps):
            values = pooled(taps[tap], spec.geometry.prefix_tokens)
            yield Gathered(spec=spec, tap=tap, position=position, values=values)


def _sums[S: FeatureSpec](taps: Sequence[Tensor], specs: Sequence[S]) -> Iterator[Gathered[S]]:
    """One running sum for all that is wanted; what is yielded is valid until the next is asked for."""
    by_last = {spec.taps[0]: spec for spec in specs}
    total = taps[0].float().clone()
    for k in range(max(by_last) + 1):
        if k > 0:
            total += taps[k]
        if k in by_last:
            yield Gathered(spec=by_last[k], tap=k, position=None, values=total)


def pooled(tap: Tensor, prefix_tokens: int) -> Tensor:
    """Return prefix tokens and the mean of the patch tokens: (batch, prefix + 1, channel) float32."""
    values = tap.float()
    return torch.cat([values[:, :prefix_tokens], values[:, prefix_tokens:].mean(dim=1, keepdim=True)], dim=1)


type _Gathering = Callable[[Sequence[Tensor], Sequence[Any]], Iterator[Gathered[Any]]]
# How each gather of `coldtap.stores.format.gathers` is computed. Sums come last: they write to one tensor in turn.
GATHERED: Mapping[GatherName, _Gathering] = {"layers": _layers, "pooled": _pooled, "sum": _sums}
