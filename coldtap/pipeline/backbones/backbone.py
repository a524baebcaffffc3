"""A frozen backbone: what it is, what it gives, and by what it is known."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coldtap.device import choose_device
from coldtap.errors import ColdtapError, ModelError, OptionError
from coldtap.pipeline.backbones.final_norm import final_norm
from coldtap.pipeline.backbones.inputs import normalise, preprocess_of_model
from coldtap.pipeline.backbones.integer.artefact import Artefact, read_artefact
from coldtap.pipeline.backbones.integer.kernel_choice import KernelChoice, choose_kernel
from coldtap.pipeline.backbones.integer.layers import quantised_layers
from coldtap.pipeline.backbones.integer.load import build_quantised
from coldtap.pipeline.backbones.integer.run_on import run_on
from coldtap.pipeline.backbones.reference import ARCHITECTURE as REFERENCE
from coldtap.pipeline.backbones.taps import TapReader, geometries_of, read_taps_of
from coldtap.pipeline.backbones.torch_state import exact_float32
from coldtap.pipeline.backbones.weights import create_timm_model, weights_digest
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.plan.backbone_description import BackboneDescription
from coldtap.pipeline.plan.options import ExtractorOptions
from coldtap.stores.format.recipe import differing_fields


@dataclass(frozen=True, kw_only=True)
class Backbone(BackboneDescription):
    """A described backbone that runs: a model in eval mode on its device, with its taps.

    Attributes:
        module: the model itself.
        taps: reads (batch, token, channel) tensors out of a forward pass.
        device: that has the model.
        kernel: that a quantised backbone runs on, and why.
    """

    module: nn.Module
    taps: TapReader
    device: torch.device
    kernel: KernelChoice | None = None

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """Run a forward pass and return all taps.

        Args:
            pixels: (batch, channel, height, width) uint8, resized and cropped, on any device.

        Returns:
            (batch, token, channel) per tap, in the backbone's precision, on its device.
        """
        with torch.inference_mode(), exact_float32():
            images = normalise(pixels.to(self.device), self.preprocess, getattr(torch, self.precision))
            return self.taps(images)


def load_backbone(model: str | nn.Module | None = None, **options: Any) -> Backbone:
    """Load a backbone as `load_from_options` does, with fields of `ExtractorOptions` by name."""
    return load_from_options(ExtractorOptions(model=model, **options))


def load_from_options(options: ExtractorOptions) -> Backbone:
    """Load a backbone for extraction onto its device.

    Raises:
        ModelError: the model, its weights or its taps cannot be used.
        MachineError: a GPU is asked for where there is none.
        OptionError: an option has no such value, or does not go with another.
    """
    precision, preprocess, quantised = options.precision, options.preprocess, options.quantised
    place = choose_device(options.device)
    artefact = None
    if quantised is not None:
        _refuse_beside_artefact(options)
        artefact = read_artefact(quantised)
        module = build_quantised(artefact, quantised, options.model)
        architecture, digest = artefact.about.architecture, artefact.about.backbone
        how = _artefact_preprocess(artefact, quantised, module, preprocess)
    else:
        if options.kernel != "auto":
            raise OptionError(f"`kernel={options.kernel!r}` is of a quantised backbone: give one with `quantized`")
        asked = REFERENCE if options.model is None else options.model
        module = _float_module(asked, options.checkpoint, options.random_weights, preprocess)
        architecture, digest = _architecture(module, asked), weights_digest(module)
        how = preprocess if isinstance(preprocess, Preprocess) else _timm_preprocess(module, dict(preprocess or {}))
    # Taken before the module is cast, so that the stored norm is the float32 one.
    norm = final_norm(module)
    module = module.requires_grad_(False).to(place, getattr(torch, precision))
    choice = None
    if artefact is not None:
        layers = quantised_layers(module).values()
        n_convolutions = sum(layer.window is not None for layer in layers)
        choice = choose_kernel(options.kernel, place, convolutions=2 * n_convolutions > len(layers))
        run_on(module, choice.kernel)
    reader = read_taps_of(module, options.tap_names, options.prefix_tokens)
    blank = torch.zeros(1, len(how.mean), how.height, how.width, dtype=getattr(torch, precision), device=place)
    with torch.inference_mode():
        try:
            geometries = geometries_of(reader, blank)
        except ColdtapError:
            raise
        except Exception as error:  # whatever a model raises on an input that it was not made for
            raise ModelError(
                f"{architecture} cannot give its taps for {how.height} × {how.width} pixels "
                f"({type(error).__name__}: {error}): choose another `input_size` or model"
            ) from error
    return Backbone(
        architecture=architecture,
        weights=digest,
        precision=precision,
        preprocess=how,
        tap_names=tuple(reader.names()),
        geometries=geometries,
        stages=reader.stages,
        norm=norm,
        quantisation=None if artefact is None else artefact.identity(),
        module=module,
        taps=reader,
        device=place,
        kernel=choice,
    )


def _refuse_beside_artefact(options: ExtractorOptions) -> None:
    if options.checkpoint is not None or options.random_weights:
        raise OptionError("`quantized` brings its weights: leave out `checkpoint` and `random_weights`")
    if options.precision != "float32":
        raise OptionError(f"`precision={options.precision!r}`: what a quantised backbone keeps in float is float32")
    if options.tap_names is not None:
        raise OptionError("a quantised backbone has the taps of its family: leave out tap_names")


def _artefact_preprocess(
    artefact: Artefact, path: Path, module: nn.Module, preprocess: Preprocess | Mapping[str, Any] | None
) -> Preprocess:
    """The preprocessing of the calibration; the ranges hold for no other."""
    how = artefact.preprocess
    asked = preprocess if isinstance(preprocess, Preprocess) else _override(how, module, preprocess or {})
    if differ := differing_fields(how.to_dict(), asked.to_dict()):
        raise OptionError(
            f"{path} was calibrated with another preprocessing than is asked for (calibrated → asked: "
            f"{'; '.join(differ)}): leave the options of the preprocessing out, or quantise with them"
        )
    return how


def _override(how: Preprocess, module: nn.Module, overrides: Mapping[str, Any]) -> Preprocess:
    """A preprocessing with parts replaced, as they may be for a timm model."""
    parts = how.to_dict()
    size = (parts.pop("height"), parts.pop("width"))
    given = {name: value for name, value in overrides.items() if value is not None}
    return preprocess_of_model(module, {"input_size": size, **parts, **given})


def _float_module(
    model: str | nn.Module,
    checkpoint: Path | None,
    random_weights: bool,
    preprocess: Preprocess | Mapping[str, Any] | None,
) -> nn.Module:
    if isinstance(model, str):
        size = (
            (preprocess.height, preprocess.width)
            if isinstance(preprocess, Preprocess)
            else _sides((preprocess or {}).get("input_size"))
        )
        return create_timm_model(model, checkpoint=checkpoint, random_weights=random_weights, input_size=size)
    if checkpoint is not None or random_weights:
        raise OptionError("a module from Python comes with its weights: leave out checkpoint and random_weights")
    return copy.deepcopy(model).eval()  # the caller's own keeps its mode, dtype and device


def _sides(input_size: Any) -> tuple[int, int] | None:
    """(height, width) of an input size given as a side, (height, width) or (channel, height, width)."""
    if input_size is None:
        return None
    return (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]


def _architecture(module: nn.Module, asked: str | nn.Module) -> str:
    if isinstance(asked, str) and asked.startswith("coldtap/"):
        return asked
    configured = (getattr(module, "pretrained_cfg", None) or {}).get("architecture")
    return str(configured or type(module).__name__)


def _timm_preprocess(module: nn.Module, overrides: Mapping[str, Any]) -> Preprocess:
    if getattr(module, "pretrained_cfg", None) is None and not overrides:
        raise ModelError(
            f"{type(module).__name__} carries no preprocessing: give `preprocess=Preprocess(...)` with its input size"
        )
    return preprocess_of_model(module, overrides)
