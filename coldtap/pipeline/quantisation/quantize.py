"""`coldtap quantize` as one call: a backbone and calibration images to an artefact."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from torch import nn

from coldtap.errors import ModelError, OptionError
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.backbones.integer.artefact import About, read_artefact, write_artefact
from coldtap.pipeline.backbones.integer.families import anatomy_of
from coldtap.pipeline.backbones.integer.ranges import RANGE_METHODS, RangeMethod
from coldtap.pipeline.backbones.integer.scheme import SchemeByLayer
from coldtap.pipeline.backbones.torch_state import exact_float32
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.quantisation.compensation.cwac import SiteFit, compensate_channels
from coldtap.pipeline.quantisation.compensation.qwt import RIDGES, compensate_blocks
from coldtap.pipeline.quantisation.compensation.site_table import left_float_lines
from coldtap.pipeline.quantisation.ptq.calibration_images import read_calibration_images
from coldtap.pipeline.quantisation.ptq.model import QuantisedModel, quantise
from coldtap.pipeline.quantisation.ptq.sites import TARGETS, Target
from coldtap.stores.compensation.channel_affine import RIDGE
from coldtap.stores.storage.output_place import require_place

type Compensation = Literal["none", "qwt", "cwac"]
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation.__value__)


class Reporter(Protocol):
    """Told what happens; the command line shows it."""

    def note(self, text: str) -> None:
        """Say a sentence that the user should read."""

    def begin(self, n_units: int) -> None:
        """Begin compensation; so many units will be advanced through."""

    def advance(self, n_units: int) -> None:
        """Count units done since the last call."""


class Silence:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def begin(self, n_units: int) -> None:
        """Say nothing."""

    def advance(self, n_units: int) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """What `quantize` made.

    Attributes:
        path: the artefact.
        digest: SHA-256 of it.
        n_bytes: its size.
        float_bytes: what the backbone's weights take in float32.
        n_layers: quantised layers.
        left_float: from the name of what stays float to the reason.
        n_images: calibration images.
        n_unusable: images that were passed over.
        fits: what the compensation does, site by site; empty without one.
    """

    path: Path
    digest: str
    n_bytes: int
    float_bytes: int
    n_layers: int
    left_float: Mapping[str, str]
    n_images: int
    n_unusable: int
    fits: Sequence[SiteFit]


def quantize(
    model: str | nn.Module,
    calibration: Any,
    out: str | Path,
    *,
    scheme: str = "w8a8",
    compensate: Compensation = "cwac",
    checkpoint: str | Path | None = None,
    random_weights: bool = False,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    device: str = "auto",
    images: int | None = None,
    ranges: RangeMethod = "least-squares",
    reparameterise: bool = True,
    overrides: Sequence[str] = (),
    sites: Sequence[str] | None = None,
    target: Target = "local",
    ridge: float | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> QuantizationReport:
    """Quantise a backbone, compensate it, and write it as one file for `cache_features(quantized=…)`.

    Args:
        model: a timm name, `coldtap/vit-reference`, or any module of a family that can be quantised.
        calibration: images: a path that `open_source` understands, a source, or any indexable of (image, target).
        out: the artefact; an older one is replaced, another file is not.
        scheme: bits of weights and activations, such as `w8a8`.
        compensate: `cwac` (two numbers per channel, folded), `qwt` (a matrix per block, run beside it) or `none`.
        checkpoint: local weights for a timm name.
        random_weights: no trained weights, for measurements.
        preprocess: overrides of the model's own configuration, or all of it.
        device: auto, cpu, cuda or cuda:N.
        images: calibration images; None is 512, or all where there are fewer.
        ranges: `least-squares` or `percentile`.
        reparameterise: give the channels behind a layer norm one range first (RepQ-ViT).
        overrides: `PATTERN=SCHEME` or `PATTERN=float` by layer name; of those that match the last counts. The first
            layer has w8a8 unless one of them matches it.
        sites: patterns of layers that CWAC goes after; None for `attn.proj` and `mlp.fc2`, or every convolution.
        target: what a site should give: `local` or `true`.
        ridge: of the compensation; None is the default of CWAC, and the best of a few on images held out for QwT.
        seed: chooses images and remembered tokens.
        reporter: told what happens.

    Raises:
        ColdtapError: one of its kinds (`coldtap.errors`), always with what to do.
    """
    told = reporter or Silence()
    _check(compensate, ranges, target, ridge, sites, seed)
    by_layer, path = SchemeByLayer.parse(scheme, overrides), Path(out)
    _require_place(path)
    backbone = load_backbone(
        model,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        random_weights=random_weights,
        device=device,
        preprocess=preprocess,
    )
    anatomy_of(backbone.module)  # another family is refused before images are decoded
    calibrating = read_calibration_images(calibration, backbone.preprocess, n_images=images, seed=seed)
    if calibrating.n_unusable:
        told.note(f"{calibrating.n_unusable} calibration images cannot be read and were passed over")
    told.note(f"calibrating on {calibrating.n_images} images")
    models = quantise(backbone, calibrating.batches, by_layer, ranges=ranges, reparameterised=reparameterise, seed=seed)
    for line in left_float_lines(models.anatomy.left_float):
        told.note(line)
    # On the simulation that the layers begin with: a kernel that is chosen by its speed would give other last bits, and
    # at four bits another fit, from one run to the next.
    with exact_float32():
        fits = _compensate(models, compensate, sites, target, ridge, told)
    about = About(
        model=model if isinstance(model, str) else None,
        architecture=backbone.architecture,
        backbone=backbone.weights,
        preprocess=backbone.preprocess.to_dict(),
        scheme=scheme,
        compensation=compensate,
        settings={
            "ranges": ranges,
            "reparameterised": reparameterise,
            "overrides": list(overrides),
            "sites": None if sites is None else list(sites),
            "target": target,
            "ridge": ridge,
        },
        calibration={"digest": calibrating.digest, "images": calibrating.n_images, "seed": seed},
        left_float=models.anatomy.left_float,
    )
    digest = write_artefact(path, models.model, about)
    return QuantizationReport(
        path=path,
        digest=digest,
        n_bytes=path.stat().st_size,
        float_bytes=sum(value.numel() * value.element_size() for value in backbone.module.state_dict().values()),
        n_layers=len(models.anatomy.layers),
        left_float=models.anatomy.left_float,
        n_images=calibrating.n_images,
        n_unusable=calibrating.n_unusable,
        fits=fits,
    )


def _check(
    compensate: str, ranges: str, target: str, ridge: float | None, sites: Sequence[str] | None, seed: int
) -> None:
    for option, value, known in (
        ("compensate", compensate, COMPENSATIONS),
        ("ranges", ranges, RANGE_METHODS),
        ("target", target, TARGETS),
    ):
        if value not in known:
            raise OptionError(f"`{option}={value!r}`: choose one of {', '.join(known)}")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise OptionError(f"`{ridge=}`: give a finite number, 0 or more")
    if sites is not None and compensate != "cwac":
        raise OptionError(f"`sites` is of `compensate='cwac'`; {compensate} was asked for")
    if seed < 0:
        raise OptionError(f"`{seed=}`: give 0 or more")


def _require_place(path: Path) -> None:
    """Refuse, before any work, a place where no artefact can be written, or where another file would be lost."""
    require_place(path, "backbone.safetensors")
    if path.exists():
        try:
            read_artefact(path)
        except ModelError as error:
            raise OptionError(f"`out` would replace another file ({error}): give another path, or remove it") from None


def _compensate(
    models: QuantisedModel,
    kind: Compensation,
    sites: Sequence[str] | None,
    target: Target,
    ridge: float | None,
    told: Reporter,
) -> list[SiteFit]:
    if kind == "none":
        return []
    told.begin(len(models.anatomy.units))
    if kind == "cwac":
        chosen = models.anatomy.choose_sites(models.anatomy.sites if sites is None else sites)
        ridge = RIDGE if ridge is None else ridge
        return compensate_channels(models, sites=chosen, target=target, ridge=ridge, advance=told.advance)
    ridges = RIDGES if ridge is None else (ridge,)
    return compensate_blocks(models, target=target, ridges=ridges, advance=told.advance)
