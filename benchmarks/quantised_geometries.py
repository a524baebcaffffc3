"""Larger geometries with random weights: the signal-to-noise ratio of every tap, in place of accuracy."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quantised_budget import METHODS, RANGES, REPARAMETERISED, SITES, TARGET, Budget, Place
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.backbones.inputs import normalise
from coldtap.pipeline.backbones.integer.kernel_choice import choose_kernel
from coldtap.pipeline.backbones.integer.layers import quantised_layers
from coldtap.pipeline.backbones.integer.scheme import SchemeByLayer
from coldtap.pipeline.backbones.taps import read_taps_of
from coldtap.pipeline.backbones.torch_state import exact_float32
from coldtap.pipeline.quantisation.compensation.cwac import compensate_channels, rows_of
from coldtap.pipeline.quantisation.compensation.qwt import compensate_blocks
from coldtap.pipeline.quantisation.compensation.site_table import level_db
from coldtap.pipeline.quantisation.ptq.calibration_images import N_FOLDS, read_calibration_images
from coldtap.pipeline.quantisation.ptq.model import QuantisedModel, quantise
from coldtap.stores.compensation.channel_affine import ChannelMoments

N_HELD_OUT = 16
LARGEST_BATCH = 8
SOURCE = "grocery"  # photographs, the largest of the sets
BRANCH_END = 0.2  # weight of the norm that ends a residual branch


@dataclass(frozen=True, kw_only=True)
class GeometryTask:
    """A model with random weights, its calibration images, and a scheme."""

    place: Place
    budget: Budget
    model: str
    n_images: int
    scheme: str

    @property
    def cell(self) -> str:
        """Name of its file."""
        return f"snr-{self.model}-{self.scheme}"


def run_geometry(task: GeometryTask) -> str:
    """Fills a cell; one that is done is left as it is."""
    if task.place.read(task.cell, task.budget) is None:
        began = time.perf_counter()
        found = _snr_by_method(task)
        task.place.write(task.cell, task.budget, {**found, "seconds": time.perf_counter() - began})
    return task.cell


def _snr_by_method(task: GeometryTask) -> dict[str, Any]:
    """Decibels by method and tap, on images that nothing was fitted on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = load_backbone(task.model, random_weights=True, device="cpu")
    source = task.place.dataset(SOURCE if SOURCE in task.budget.sets else task.budget.sets[0])
    read = read_calibration_images(source, backbone.preprocess, n_images=task.n_images + N_HELD_OUT, seed=0)
    pixels = torch.cat(list(read.batches))
    settle_batch_norms(backbone.module, normalise(pixels[N_HELD_OUT:], backbone.preprocess, torch.float32))
    size = min(LARGEST_BATCH, task.n_images // N_FOLDS)
    by_layer = SchemeByLayer.parse(task.scheme, ())
    base = quantise(
        backbone,
        pixels[N_HELD_OUT:].split(size),
        by_layer,
        ranges=RANGES,
        reparameterised=REPARAMETERISED,
        seed=0,
    )
    kernel = choose_kernel("int", backbone.device).kernel
    for layer in quantised_layers(base.model).values():
        layer.use(kernel)
    held_out = normalise(pixels[:N_HELD_OUT], backbone.preprocess, torch.float32).split(LARGEST_BATCH)
    wanted = _taps(base.float_model, held_out)
    taps_db: dict[str, list[float]] = {}
    for method in METHODS:
        models = replace(base, model=copy.deepcopy(base.model))
        _compensate(models, method)
        found = _taps(models.model, held_out)
        taps_db[method] = [
            level_db(ChannelMoments.of(rows_of(got), rows_of(tap))) for tap, got in zip(wanted, found, strict=True)
        ]
    return {"n_images": task.n_images, "n_held_out": N_HELD_OUT, "taps_db": taps_db}


def settle_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of images, and the last of each residual branch a small weight.

    timm begins with zero there, and nothing of the branch would be left to quantise. With one, fifty random layers
    amplify any error until nothing of the signal is left (2 dB at eight bits).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        if not norm.weight.any():
            nn.init.constant_(norm.weight, BRANCH_END)
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.inference_mode():
        for batch in images.split(LARGEST_BATCH):
            model(batch)
    for norm in norms:
        norm.eval()


def _taps(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Every tap of all images, (image, token, channel)."""
    reader = read_taps_of(model, None, 0)
    with torch.inference_mode(), exact_float32():
        return [torch.cat(of_tap) for of_tap in zip(*(reader(batch) for batch in batches), strict=True)]


def _compensate(models: QuantisedModel, method: str) -> None:
    if method == "cwac":
        sites = models.anatomy.choose_sites(models.anatomy.sites if SITES is None else SITES)
        compensate_channels(models, sites=sites, target=TARGET)
    elif method == "qwt":
        compensate_blocks(models, target=TARGET)
