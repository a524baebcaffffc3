"""Site by site: what the float model gives and what the quantised one gives, behind a prefix that is compensated.

Units come in order. When one comes, all before it are compensated; when the next is asked for, both streams move on
through it. So a fit sees the input that its site will have (fitting all sites on an uncompensated stream is another,
worse algorithm).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from coldtap.pipeline.backbones.integer.families import Unit
from coldtap.pipeline.quantisation.ptq.calibration_images import N_FOLDS
from coldtap.pipeline.quantisation.ptq.model import QuantisedModel

type Target = Literal["local", "true"]
TARGETS: tuple[Target, ...] = get_args(Target.__value__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One batch at one site.

    Attributes:
        fold: 0 to 3; the images of a fold are in no other.
        input: of the unit, in the quantised stream.
        wanted: the float output.
        got: the quantised output, of the same shape.
    """

    fold: int
    input: Tensor
    wanted: Tensor
    got: Tensor


class UnitAtWork:
    """A unit whose prefix is compensated."""

    def __init__(self, unit: Unit, models: QuantisedModel, inputs: list[Tensor], targets: list[Tensor]) -> None:
        self.unit = unit
        self.models = models
        self._inputs = inputs
        self._targets = targets

    def pairs(self, site: str | None = None) -> Iterator[Pair]:
        """Yield float and quantised output of a layer of the unit, or of the whole unit, a batch at a time."""
        for i, (x, of_float) in enumerate(zip(self._inputs, self._targets, strict=True)):
            yield Pair(
                fold=i % N_FOLDS,
                input=x,
                wanted=_output(self.unit, self.models.float_model, of_float, site),
                got=_output(self.unit, self.models.model, x, site),
            )


def units_at_work(
    models: QuantisedModel, target: Target, advance: Callable[[int], None] = lambda n_units: None
) -> Iterator[UnitAtWork]:
    """Yield each unit in turn; what one gives is of no use once the next is asked for.

    Args:
        models: the quantised one is compensated by the caller as units come.
        target: what a site should give: `local`, the float unit on the quantised stream (QwT's code), or `true`, the
            float unit on the float stream.
        advance: called with 1 when the streams have moved on through a unit.
    """
    with torch.inference_mode():
        quantised = list(models.images)
        exact = quantised if target == "local" else list(models.images)
        for unit in models.anatomy.units:
            yield UnitAtWork(unit, models, quantised, exact)
            # In place: activations of all calibration images are the memory that compensation takes.
            for i, x in enumerate(quantised):
                if target == "true":
                    exact[i] = unit.run(models.float_model, exact[i])
                quantised[i] = unit.run(models.model, x)
            advance(1)


class _Reached(Exception):  # not an error
    """A forward pass came to the layer that was waited for."""


def _output(unit: Unit, model: nn.Module, x: Tensor, site: str | None) -> Tensor:
    if site is None:
        return unit.run(model, x)
    found: list[Tensor] = []

    def stop(_: nn.Module, __: Any, output: Tensor) -> None:
        found.append(output)
        raise _Reached

    handle = model.get_submodule(site).register_forward_hook(stop)
    try:
        unit.run(model, x)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError(f"{site} is no part of {unit.name}")
