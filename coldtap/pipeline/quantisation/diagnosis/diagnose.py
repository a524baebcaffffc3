"""`coldtap diagnose` as one call: what quantisation takes from a backbone, and what compensation gives back.

Every seed calibrates on images of its own, so that the spread over seeds is that of the whole procedure. Integers run
on the float kernel, the reference: the fastest one is chosen by a clock, and each rounds in its own way.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coldtap.errors import OptionError, RunError, SourceError
from coldtap.pipeline.backbones.backbone import Backbone, load_backbone
from coldtap.pipeline.backbones.inputs import normalise
from coldtap.pipeline.backbones.integer.layers import QuantisedLayer
from coldtap.pipeline.backbones.integer.ranges import RANGE_METHODS, RangeMethod
from coldtap.pipeline.backbones.integer.scheme import SchemeByLayer
from coldtap.pipeline.backbones.taps import read_taps_of
from coldtap.pipeline.backbones.torch_state import exact_float32
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.images.sources import open_source
from coldtap.pipeline.quantisation.compensation.cwac import SiteFit, compensate_channels
from coldtap.pipeline.quantisation.compensation.linear_map import LinearMoments
from coldtap.pipeline.quantisation.compensation.qwt import compensate_blocks
from coldtap.pipeline.quantisation.compensation.site_table import left_float_lines, level_db, snr_db
from coldtap.pipeline.quantisation.diagnosis.near_diagonal import NearDiagonal, near_diagonal
from coldtap.pipeline.quantisation.diagnosis.picture import draw_diagnosis
from coldtap.pipeline.quantisation.diagnosis.result import (
    BlockDiagnosis,
    Diagnosis,
    SiteDiagnosis,
    Spread,
    TapDiagnosis,
)
from coldtap.pipeline.quantisation.ptq.calibration_images import (
    FEWEST_IMAGES,
    LARGEST_BATCH,
    N_FOLDS,
    CalibrationImages,
    read_calibration_images,
)
from coldtap.pipeline.quantisation.ptq.model import QuantisedModel, quantise, rows_of
from coldtap.pipeline.quantisation.ptq.sites import TARGETS, Target, UnitAtWork, units_at_work
from coldtap.pipeline.quantisation.quantize import Reporter, Silence
from coldtap.stores.compensation.channel_affine import ChannelAffine, ChannelMoments
from coldtap.stores.storage.atomic import TEMPORARY_SUFFIX, write_file
from coldtap.stores.storage.output_place import require_place

CSV, PICTURE, JSON = FILES = ("sites.csv", "diagnosis.png", "diagnosis.json")
CALIBRATED_PER_HELD_OUT = 4  # images
PASSES = 3  # through the units, per seed: CWAC, the full matrices, QwT


def diagnose(
    model: str | nn.Module,
    calibration: Any,
    out: str | Path,
    *,
    scheme: str = "w8a8",
    seeds: int = 3,
    images: int | None = None,
    checkpoint: str | Path | None = None,
    random_weights: bool = False,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    device: str = "auto",
    ranges: RangeMethod = "least-squares",
    reparameterise: bool = True,
    overrides: Sequence[str] = (),
    target: Target = "local",
    reporter: Reporter | None = None,
) -> Diagnosis:
    """Quantise and compensate a backbone with several seeds, and write a table and a picture of what that does.

    With a seed and a number of images, it calibrates on the very images that `quantize` takes. No artefact is written.

    Arguments are those of `quantize`, with these differences. `out` is a new folder, or one with an earlier diagnosis,
    which is replaced: `sites.csv`, `diagnosis.png` and `diagnosis.json`. `seeds` is how many, from 0 on. Of `images`,
    which calibrate, a quarter as many others are held out; None is 512 in all, or all where there are fewer, a fifth of
    them held out.

    Raises:
        ColdtapError: one of its kinds (`coldtap.errors`), always with what to do.
    """
    told, folder = reporter or Silence(), Path(out)
    _check(ranges, target, seeds, images)
    by_layer = SchemeByLayer.parse(scheme, overrides)
    _refuse_other_content(folder)
    backbone = load_backbone(
        model,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        random_weights=random_weights,
        device=device,
        preprocess=preprocess,
    )
    source = calibration if hasattr(calibration, "listing") else open_source(calibration, labels="optional")
    found: list[_OfSeed] = []
    for seed in range(seeds):
        read, held_out = _read_images(source, backbone.preprocess, images, seed)
        n_held_out = sum(map(len, held_out))
        told.note(f"seed {seed}: {read.n_images} images to calibrate on, {n_held_out} others held out")
        models = quantise(backbone, read.batches, by_layer, ranges=ranges, reparameterised=reparameterise, seed=seed)
        if not found:
            for line in left_float_lines(models.anatomy.left_float):
                told.note(line)
            told.begin(PASSES * seeds * len(models.anatomy.units))
        found.append(_diagnose_seed(backbone, models, read, held_out, target, told.advance))
    diagnosis = Diagnosis(
        architecture=backbone.architecture,
        scheme=scheme,
        settings={
            "model": model if isinstance(model, str) else None,
            "weights": backbone.weights,
            "preprocess": backbone.preprocess.to_dict(),
            "ranges": ranges,
            "reparameterised": reparameterise,
            "overrides": list(overrides),
            "target": target,
        },
        n_calibration=read.n_images,
        n_held_out=n_held_out,
        runs=[
            {"seed": seed, "images": one.images.digest, "unusable": one.images.n_unusable}
            for seed, one in enumerate(found)
        ],
        left_float=models.anatomy.left_float,
        sites=_sites(found),
        blocks=_blocks(found),
        taps=_taps(backbone.taps.names(), found),
    )
    write_file(folder / CSV, [diagnosis.to_csv().encode()])
    write_file(folder / PICTURE, [draw_diagnosis(diagnosis)])
    write_file(folder / JSON, [json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False).encode()])
    return diagnosis


def _check(ranges: str, target: str, seeds: int, images: int | None) -> None:
    for option, value, known in (("ranges", ranges, RANGE_METHODS), ("target", target, TARGETS)):
        if value not in known:
            raise OptionError(f"`{option}={value!r}`: choose one of {', '.join(known)}")
    if seeds < 1:
        raise OptionError(f"`{seeds=}`: give 1 or more")
    if images is not None and images < FEWEST_IMAGES:
        raise OptionError(f"`{images=}`: give at least {FEWEST_IMAGES} calibration images")


def _refuse_other_content(folder: Path) -> None:
    if os.path.isfile(folder):  # unlike Path's, no error where a name is too long: what follows says that better
        raise RunError(f"`out={str(folder)!r}` is a file: give a folder")
    require_place(folder / JSON, JSON)
    own = {*FILES, *(name + TEMPORARY_SUFFIX for name in FILES)}  # a killed run leaves these, and writing ends them
    other = sorted({path.name for path in folder.iterdir()} - own) if folder.exists() else []
    if other:
        raise RunError(
            f"`out={str(folder)!r}` holds {', '.join(other[:3])}, which is of no diagnosis: choose another folder"
        )


def _read_images(
    source: Any, preprocess: Preprocess, n_images: int | None, seed: int
) -> tuple[CalibrationImages, Sequence[Tensor]]:
    """Images to calibrate on, cut as `quantize` cuts them, with the digest of all; and batches of others."""
    wanted = None if n_images is None else n_images + n_images // CALIBRATED_PER_HELD_OUT
    fewest = n_images or FEWEST_IMAGES
    try:
        read = read_calibration_images(source, preprocess, n_images=wanted, seed=seed)
        n = n_images or read.n_images - read.n_images // (CALIBRATED_PER_HELD_OUT + 1)
        if n < fewest:
            raise SourceError(f"{source.name} has {read.n_images} that can be read: give more images")
    except SourceError as error:
        raise SourceError(
            f"a diagnosis takes {fewest} images to calibrate on and {fewest // CALIBRATED_PER_HELD_OUT} others: {error}"
        ) from error
    pixels = torch.cat(list(read.batches))
    return replace(read, batches=pixels[:n].split(min(LARGEST_BATCH, n // N_FOLDS))), pixels[n:].split(LARGEST_BATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfSeed:
    """What a seed gave; `taps` are levels in dB by tap without compensation, with CWAC and with QwT."""

    images: CalibrationImages
    cwac: Sequence[SiteFit]
    full: Sequence[NearDiagonal]
    qwt: Sequence[SiteFit]
    taps: Sequence[Sequence[float]]


def _diagnose_seed(
    backbone: Backbone,
    base: QuantisedModel,
    images: CalibrationImages,
    held_out: Sequence[Tensor],
    target: Target,
    advance: Callable[[int], None],
) -> _OfSeed:
    with_cwac, with_qwt = (replace(base, model=copy.deepcopy(base.model)) for _ in range(2))
    sites = base.anatomy.choose_sites(base.anatomy.sites)
    pixels = [batch.to(backbone.device) for batch in held_out]
    with torch.inference_mode(), exact_float32():
        cwac = compensate_channels(with_cwac, sites=sites, target=target, advance=advance)
        others = [normalise(batch, backbone.preprocess, torch.float32) for batch in pixels]
        full = _full_matrices(with_cwac, sites, others, target, advance)
        qwt = compensate_blocks(with_qwt, target=target, advance=advance)
        levels = _tap_levels(backbone, [models.model for models in (base, with_cwac, with_qwt)], pixels)
    return _OfSeed(images=images, cwac=cwac, full=full, qwt=qwt, taps=levels)


def _full_matrices(
    models: QuantisedModel,
    sites: Sequence[str],
    held_out: Sequence[Tensor],
    target: Target,
    advance: Callable[[int], None],
) -> list[NearDiagonal]:
    """The full matrix of each site, where CWAC was fitted too: behind a compensated prefix.

    It is fitted on the images of the models, which have CWAC, and measured on those held out.
    """
    n_fit = len(models.images)
    both = replace(models, images=[*models.images, *held_out])
    return [
        _full_matrix(work, site, n_fit)
        for work in units_at_work(both, target, advance)
        for site in both.anatomy.layers_of(work.unit)
        if site in sites
    ]


def _full_matrix(work: UnitAtWork, site: str, n_fit: int) -> NearDiagonal:
    """Of one site, whose own CWAC is off for as long; the first batches are for the fit."""
    layer = work.models.model.get_submodule(site)
    assert isinstance(layer, QuantisedLayer)
    assert layer.affine is not None
    affine = layer.affine
    layer.compensate(ChannelAffine.identity(len(affine.scale)))
    moments = (LinearMoments.of(rows_of(pair.got).cpu(), rows_of(pair.wanted).cpu()) for pair in work.pairs(site))
    fit, rest = reduce(add, islice(moments, n_fit)), reduce(add, moments)
    layer.compensate(affine)
    return near_diagonal(fit, rest)


def _tap_levels(backbone: Backbone, models: Sequence[nn.Module], batches: Sequence[Tensor]) -> list[list[float]]:
    """Signal to noise of each tap of each model against the backbone's, in dB."""
    quantised = [replace(backbone, module=model, taps=read_taps_of(model, None, 0)) for model in models]
    moments: list[list[ChannelMoments]] = [[] for _ in models]
    for pixels in batches:
        wanted = backbone(pixels)
        for i, one in enumerate(quantised):
            pairs = zip(one(pixels), wanted, strict=True)
            found = [ChannelMoments.of(rows_of(got).cpu(), rows_of(tap).cpu()) for got, tap in pairs]
            moments[i] = [a + b for a, b in zip(moments[i], found, strict=True)] if moments[i] else found
    return [[level_db(tap) for tap in of_model] for of_model in moments]


def _sites(found: Sequence[_OfSeed]) -> list[SiteDiagnosis]:
    return [
        SiteDiagnosis(
            name=fit.site,
            uncompensated_db=_spread(snr_db(one.cwac[i].signal, one.cwac[i].before) for one in found),
            cwac_db=_spread(snr_db(one.cwac[i].signal, one.cwac[i].after) for one in found),
            kept=_spread(one.cwac[i].kept for one in found),
            diagonal_gain_db=_spread(one.full[i].snr_db_diagonal - one.full[i].snr_db_uncompensated for one in found),
            full_gain_db=_spread(one.full[i].snr_db_full - one.full[i].snr_db_diagonal for one in found),
            off_diagonal_share=_spread(one.full[i].off_diagonal_share for one in found),
            off_diagonal_share_of_change=_spread(one.full[i].off_diagonal_share_of_change for one in found),
        )
        for i, fit in enumerate(found[0].cwac)
    ]


def _blocks(found: Sequence[_OfSeed]) -> list[BlockDiagnosis]:
    return [
        BlockDiagnosis(
            name=fit.site,
            uncompensated_db=_spread(snr_db(one.qwt[i].signal, one.qwt[i].before) for one in found),
            qwt_db=_spread(snr_db(one.qwt[i].signal, one.qwt[i].after) for one in found),
            kept=_spread(one.qwt[i].kept for one in found),
        )
        for i, fit in enumerate(found[0].qwt)
    ]


def _taps(names: Sequence[str], found: Sequence[_OfSeed]) -> list[TapDiagnosis]:
    return [
        TapDiagnosis(
            name=name,
            uncompensated_db=_spread(one.taps[0][i] for one in found),
            cwac_db=_spread(one.taps[1][i] for one in found),
            qwt_db=_spread(one.taps[2][i] for one in found),
        )
        for i, name in enumerate(names)
    ]


def _spread(values: Iterable[float]) -> Spread:
    return Spread(tuple(values))
