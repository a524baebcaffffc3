"""Extraction with a quantised backbone against the same backbone in float32 and bfloat16, and where its time goes.

Whole extraction is `cache_features` with its defaults, decoding and a store on disk included, timed from the forecast
to the end; the backbone alone is a forward pass over pixels in memory. onnxruntime runs the exported
QuantizeLinear/DequantizeLinear graph, in whole extraction in the place of a backbone from Python. Contestants take
turns, each in a process of its own; ratios to float32 are taken within a round. W8A8, CWAC folded in, the kernel that
`auto` chooses. Weights are random: speed does not depend on them.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from torch import nn

from benchmarks.extraction import Clock
from benchmarks.machine import own_process, paused
from benchmarks.pictures import Pictures, decoded_images, encoded_images

FLOAT, HALF, INTEGER, ORT = "float32", "bfloat16", "w8a8", "onnxruntime w8a8"
CONTESTANTS = (FLOAT, HALF, INTEGER, ORT)
GOAL = 2.0
HOW = {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}
QUANTISING = "quantising activations"
# What the rest of a profile is summed into; what is none of it is "other".
GROUPS = {
    "integer products": ("onednn::qlinear_pointwise", "onednn::qconv2d_pointwise", "aten::_int_mm"),
    "attention products": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::bmm", "aten::_softmax"),
    "layer norms": ("aten::native_layer_norm",),
    "sums of the residual stream": ("aten::add",),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A geometry, how many images extraction takes, how many a forward pass, and rounds."""

    name: str
    model: str
    side: int
    n_images: int
    batch_size: int
    rounds: int


CASES = (
    Case(name="ViT-S/16, 224 pixels", model="vit_small_patch16_224", side=224, n_images=96, batch_size=8, rounds=3),
    Case(name="ViT-B/16, 224 pixels", model="vit_base_patch16_224", side=224, n_images=48, batch_size=4, rounds=3),
)
QUICK = Case(name="reference backbone", model="coldtap/vit-reference", side=32, n_images=40, batch_size=16, rounds=1)


def measure_integers(*, quick: bool) -> list[dict[str, Any]]:
    """Records of whole extraction, of the backbone alone, and of a profile, for each case."""
    return [record for case in ([QUICK] if quick else CASES) for record in _measure(case)]


def _measure(case: Case) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        maker = stack.enter_context(own_process())
        maker.submit(make_files, case, folder).result()
        processes = {name: stack.enter_context(own_process(OMP_WAIT_POLICY="PASSIVE")) for name in CONTESTANTS}
        alone = _rounds(case, processes, backbone_speed, folder)
        whole = _rounds(case, processes, whole_speed, folder)
        records = [
            *_records(case, "backbone alone", alone),
            *_records(case, "whole extraction", whole),
            {
                "measured": "profile",
                "case": case.name,
                "shares": processes[INTEGER].submit(profile, case, folder).result(),
            },
        ]
        kernel = processes[INTEGER].submit(kernel_used, case, folder).result()
        return [{**record, "kernel": kernel} for record in records]


def _rounds(case: Case, processes: dict[str, Executor], measure: Any, folder: Path) -> list[dict[str, float]]:
    """Images a second of each contestant by round; who is first changes with every round."""
    found, names = [], tuple(processes)
    for turn in range(case.rounds):
        start = turn % len(names)
        speeds = {}
        for name in names[start:] + names[:start]:
            with paused(*(other for key, other in processes.items() if key != name)):
                speeds[name] = processes[name].submit(measure, case, name, folder).result()
        found.append(speeds)
    return found


def _records(case: Case, measured: str, rounds: list[dict[str, float]]) -> list[dict[str, Any]]:
    records = []
    for name in rounds[0]:
        ratios = [speeds[name] / speeds[FLOAT] for speeds in rounds]
        records.append(
            {
                "measured": measured,
                "case": case.name,
                "contestant": name,
                "rounds": len(rounds),
                "images_per_s": statistics.median(speeds[name] for speeds in rounds),
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_greatest": max(ratios),
                "goal": GOAL if name == INTEGER and measured == "whole extraction" else None,
            }
        )
    return records


def integers_tables(records: Iterable[dict[str, Any]]) -> Group:
    """Speeds, and where the time of the quantised backbone goes."""
    speeds = Table(
        box=SIMPLE_HEAD, title="A quantised backbone against float32", title_justify="left", title_style="bold"
    )
    for column in ("geometry", "measured", "contestant", "images/s", "× float32", "least to greatest", "goal"):
        speeds.add_column(column, justify="left" if column in ("geometry", "measured", "contestant") else "right")
    shares = Table(box=SIMPLE_HEAD, title="Where its time goes", title_justify="left", title_style="bold")
    shares.add_column("geometry")
    shares.add_column("share of the forward pass, kernel")
    for record in records:
        if record["measured"] == "profile":
            parts = ", ".join(f"{name} {share:.0%}" for name, share in record["shares"].items())
            shares.add_row(record["case"], f"{parts}; kernel {record['kernel']}")
            continue
        speeds.add_row(
            record["case"],
            record["measured"],
            record["contestant"],
            f"{record['images_per_s']:.1f}",
            f"{record['ratio']:.2f}",
            f"{record['ratio_least']:.2f} – {record['ratio_greatest']:.2f}",
            "" if record["goal"] is None else f"≥ {record['goal']}",
        )
    return Group(speeds, shares)


# What follows runs in the processes that are measured.


def make_files(case: Case, folder: Path) -> None:
    """The artefact and its ONNX export."""
    from coldtap.pipeline.quantisation.onnx.export import export_backbone
    from coldtap.pipeline.quantisation.quantize import quantize

    images = decoded_images(max(case.side, 32), case.side)
    quantize(
        case.model,
        {"train": Pictures(images, 16)},
        folder / "q.safetensors",
        random_weights=not case.model.startswith("coldtap/"),
        preprocess=HOW,
        images=16,
        ranges="percentile",
    )
    export_backbone(folder / "q.safetensors", folder / "q.onnx")


@cache
def _backbone(case: Case, name: str, folder: Path) -> Any:
    from coldtap.pipeline.backbones.backbone import load_backbone

    if name == INTEGER:
        return load_backbone(quantised=folder / "q.safetensors")
    random = not case.model.startswith("coldtap/")
    return load_backbone(case.model, random_weights=random, preprocess=HOW, precision=name)  # type: ignore[arg-type]


@cache
def _session(folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    return onnxruntime.InferenceSession(folder / "q.onnx", options, providers=["CPUExecutionProvider"])


class OnnxTaps(nn.Module):
    """An exported backbone as a module whose submodules give the taps, for `cache_features`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder  # not the session, which cannot be copied
        self.taps = nn.ModuleList(nn.Identity() for _ in _session(folder).get_outputs())

    def forward(self, images: torch.Tensor) -> None:
        """Images (batch, channel, height, width) on the scale of pixels, 0 … 255."""
        pixels = images.round().to(torch.uint8).numpy()
        for tap, values in zip(self.taps, _session(self.folder).run(None, {"pixels": pixels}), strict=True):
            tap(torch.from_numpy(values))


def backbone_speed(case: Case, name: str, folder: Path) -> float:
    """Images a second of forward passes over pixels in memory, all taps given."""
    pixels = torch.randint(0, 256, (case.batch_size, 3, case.side, case.side), dtype=torch.uint8)
    if name == ORT:
        session, array = _session(folder), pixels.numpy()

        def run() -> Any:
            return session.run(None, {"pixels": array})
    else:
        backbone = _backbone(case, name, folder)

        def run() -> Any:
            return backbone(pixels)

    run()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return case.batch_size / statistics.median(times)


def whole_speed(case: Case, name: str, folder: Path) -> float:
    """Images a second of `cache_features` into a temporary store."""
    from coldtap import cache_features

    images = encoded_images(max(case.side + 32, 32))
    if name == INTEGER:
        options: dict[str, Any] = {"quantized": folder / "q.safetensors"}
    elif name == ORT:
        module = OnnxTaps(folder)
        names = [f"taps.{i}" for i in range(len(module.taps))]
        # The file normalises by itself.
        how = replace(_backbone(case, INTEGER, folder).preprocess, mean=(0.0,) * 3, std=(1 / 255,) * 3)
        options = {"model": module, "tap_names": names, "prefix_tokens": 1, "preprocess": how}
    else:
        random = not case.model.startswith("coldtap/")
        options = {"model": case.model, "random_weights": random, "preprocess": HOW, "precision": name}
    clock = Clock()
    with tempfile.TemporaryDirectory() as store:
        cache_features(
            {"train": Pictures(images, case.n_images), "val": Pictures(images, 10)},
            Path(store) / "store",
            split=["train"],
            reporter=clock,
            **options,
        )
        return case.n_images / (time.perf_counter() - clock.wall)


def profile(case: Case, folder: Path) -> dict[str, float]:
    """Share of each group of operators in a forward pass of the quantised backbone, largest first."""
    from coldtap.pipeline.backbones.integer.ranges import ActivationRange

    backbone, quantise = _backbone(case, INTEGER, folder), ActivationRange.quantise

    def marked(*arguments: Any) -> torch.Tensor:
        with torch.profiler.record_function(QUANTISING):
            return quantise(*arguments)

    pixels = torch.randint(0, 256, (case.batch_size, 3, case.side, case.side), dtype=torch.uint8)
    backbone(pixels)
    ActivationRange.quantise = marked  # type: ignore[assignment, method-assign]
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            backbone(pixels)
    finally:
        ActivationRange.quantise = quantise  # type: ignore[method-assign]
    times = dict.fromkeys((QUANTISING, *GROUPS, "other"), 0.0)
    for event in found.events():
        times[_group_of(event)] += event.self_cpu_time_total
    whole = sum(times.values())
    return {group: spent / whole for group, spent in sorted(times.items(), key=lambda item: -item[1])}


def _group_of(event: Any) -> str:
    above = event
    while above is not None:
        if above.name == QUANTISING:
            return QUANTISING
        above = above.cpu_parent
    return next((group for group, names in GROUPS.items() if event.name in names), "other")


def kernel_used(case: Case, folder: Path) -> str:
    """The kernel that `auto` chose, and why."""
    choice = _backbone(case, INTEGER, folder).kernel
    return f"{choice.kernel.name} ({choice.why})"
