"""The base quantiser: from a float backbone and calibration images to a model of integer layers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from coldtap.errors import ModelError, OptionError
from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.pipeline.backbones.inputs import normalise
from coldtap.pipeline.backbones.integer.families import Anatomy, anatomy_of, fold_norms, require_same_taps
from coldtap.pipeline.backbones.integer.layers import QuantisedLayer
from coldtap.pipeline.backbones.integer.ranges import RangeMethod, SampledRows, activation_range
from coldtap.pipeline.backbones.integer.scheme import SchemeByLayer
from coldtap.pipeline.backbones.taps import read_taps_of
from coldtap.pipeline.backbones.torch_state import exact_float32
from coldtap.pipeline.quantisation.ptq.reparameterise import reparameterise


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedModel:
    """A quantised model beside the float one that it was made of.

    Attributes:
        model: with `QuantisedLayer`s in the place of linears and convolutions.
        float_model: its norms folded, and reparameterised where the quantised one is: the backbone's function.
        anatomy: of both; its layers are those that are quantised.
        images: calibration images, normalised, in batches (batch, channel, height, width), on the models' device.
    """

    model: nn.Module
    float_model: nn.Module
    anatomy: Anatomy
    images: Sequence[Tensor]


def quantise(
    backbone: Backbone,
    batches: Sequence[Tensor],
    scheme: SchemeByLayer,
    *,
    ranges: RangeMethod,
    reparameterised: bool,
    seed: int,
) -> QuantisedModel:
    """Quantise a backbone's weights, and find the ranges of its activations.

    Args:
        backbone: in float32; it is not changed.
        batches: calibration images, uint8 (batch, channel, height, width) each.
        scheme: bits by layer.
        ranges: how ranges are chosen.
        reparameterised: rewrite norms and their readers first (RepQ-ViT).
        seed: chooses the tokens that are remembered for ranges.

    Raises:
        ModelError: the backbone is of no family that can be quantised.
        OptionError: nothing is left to quantise, or an override is of no layer.
    """
    if backbone.precision != "float32":
        raise OptionError(f"a backbone is quantised from float32; this one is in {backbone.precision}")
    float_model = copy.deepcopy(backbone.module)
    fold_norms(float_model)
    anatomy = anatomy_of(float_model)
    scheme.require_layers(anatomy.layers)
    with torch.inference_mode(), exact_float32():
        images = [normalise(batch.to(backbone.device), backbone.preprocess, torch.float32) for batch in batches]
        _require_same_function(backbone, float_model, anatomy, images[0][:1])
        schemes = {layer: found for layer in anatomy.layers if (found := scheme.of(layer)) is not None}
        if not schemes:
            raise OptionError("the overrides leave every layer in float: there is nothing to quantise")
        seen = _watch(float_model, list(schemes), images, seed)
    layers: dict[str, QuantisedLayer] = {}
    readers = {layer: norm for norm, layer in anatomy.norms_before.items()} if reparameterised else {}
    for name, bits in schemes.items():
        layer: Any = float_model.get_submodule(name)
        rows, low, high = seen[name].rows(), seen[name].low, seen[name].high
        if name in readers:
            norm: Any = float_model.get_submodule(readers[name])
            rows = reparameterise(norm, layer, rows, bits.largest_activation)
            low, high = float(rows.min()), float(rows.max())
        range_ = activation_range(rows, low, high, ranges, bits.largest_activation)
        layers[name] = QuantisedLayer.of(layer, bits, range_, ranges)
    model = copy.deepcopy(float_model)
    for name, quantised in layers.items():
        model.set_submodule(name, quantised)
    left = {layer: "as asked" for layer in anatomy.layers if layer not in schemes}
    return QuantisedModel(
        model=model,
        float_model=float_model,
        anatomy=replace(anatomy, layers=list(schemes), left_float={**anatomy.left_float, **left}),
        images=images,
    )


def _require_same_function(backbone: Backbone, folded: nn.Module, anatomy: Anatomy, image: Tensor) -> None:
    """Refuse a backbone whose taps the folded model, or its units one after another, do not give."""
    what = f"{backbone.architecture} taken apart into its blocks"
    taps = backbone.taps(image)
    require_same_taps(taps, read_taps_of(folded, None, 0)(image), what)
    last = anatomy.output(folded, image)
    last = last if last.ndim == 3 else last.flatten(2).transpose(1, 2)
    if last.shape != taps[-1].shape:
        raise ModelError(f"{what} does not end in its last tap: this variant cannot be quantised yet; extract in float")
    require_same_taps(taps[-1:], [last], what)


def _watch(model: nn.Module, layers: Sequence[str], images: Sequence[Tensor], seed: int) -> dict[str, SampledRows]:
    """What each layer reads over the images, by its name."""
    seen = {name: SampledRows(len(images), seed) for name in layers}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name].see(rows_of(inputs[0]))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        reader = read_taps_of(model, None, 0)
        for batch in images:
            reader(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def rows_of(values: Tensor) -> Tensor:
    """View (…, channel) or (batch, channel, height, width) as (row, channel)."""
    last = values.movedim(1, -1) if values.ndim == 4 else values
    return last.reshape(-1, last.shape[-1])
