"""What training costs from the store, with the backbone in every step, and by LoRA: memory and time, measured together.

    python -m benchmarks.comparison --geometry reference            # the embedded backbone, real images
    python -m benchmarks.comparison --geometry vit-b --work DIR     # ViT-B/16 of random weights, images of noise

Every contestant has a process of its own and the same batches of 32, loss, optimizer and schedule. Memory is the peak
of the resident size above what the process held when all imports were done and a first tiny step had been made; on
CUDA it is torch's own peak. A map of the store counts as resident although the kernel takes its pages back whenever
it wants them, so what the process holds for itself (anonymous memory) stands beside it. Images are held decoded,
3 bytes a pixel, for those that run the backbone. Rounds rotate the order of the contestants; seconds are medians,
for an epoch of 1,000 images. Where the backbone is ViT-B, few batches are measured for those that run it, and scaled.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.features import real_images
from benchmarks.lora import BATCH_SIZE, Descent, build_lora
from benchmarks.machine import describe_machine, machine_line, own_process, peak_bytes, resident_bytes
from benchmarks.pictures import N_CLASSES, Pictures
from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.data.devices import seeded
from coldtap.adaptors.data.epoch_order import batch_bounds, epoch_draw
from coldtap.adaptors.networks.contract import FeatureSpec, copy_final_norm
from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.device import choose_device
from coldtap.pipeline.backbones.backbone import Backbone, load_backbone
from coldtap.pipeline.extract.gather import gather
from coldtap.pipeline.images.decode import decode_rgb
from coldtap.stores import open_store

type Records = list[dict[str, Any]]
type Way = Literal["backbone", "disk", "memory"]

EPOCH_IMAGES = 1000  # the images of a VTAB-1K task
EPOCHS = 15
SAMPLING_S = 0.005
WAYS = {
    "backbone": "backbone, every step",
    "disk": "store, streamed",
    "memory": "store, resident",
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What is trained, and where its features come from."""

    adaptor: str
    way: Way


CONTESTANTS = (
    Contestant(adaptor="lora", way="backbone"),
    *(Contestant(adaptor=name, way=way) for name in ("last", "mist") for way in ("backbone", "disk", "memory")),
    Contestant(adaptor="linear", way="disk"),
)
LORA = CONTESTANTS[0]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A backbone, and how much is measured of it.

    `steps` a round are made where the backbone runs, an epoch of the `n_images` in the store where it does not.
    """

    geometry: str
    model: str
    random_weights: bool
    n_images: int
    steps: int
    rounds: int
    contestants: tuple[Contestant, ...] = CONTESTANTS


PLANS = {
    "reference": Plan(
        geometry="reference", model="coldtap/vit-reference", random_weights=False, n_images=800, steps=25, rounds=3
    ),
    "vit-b": Plan(geometry="vit-b", model="vit_base_patch16_224", random_weights=True, n_images=256, steps=2, rounds=3),
}
QUICK = replace(
    PLANS["reference"],
    n_images=64,
    steps=1,
    rounds=1,
    contestants=(LORA, Contestant(adaptor="mist", way="backbone"), Contestant(adaptor="mist", way="disk")),
)


def measure_comparison(*, quick: bool, plans: Sequence[Plan] | None = None, epochs: int = EPOCHS) -> Records:
    """A record for each geometry and contestant, with its memory and time against LoRA's."""
    return [record for plan in plans or ([QUICK] if quick else PLANS.values()) for record in _measure(plan, epochs)]


def _measure(plan: Plan, epochs: int) -> Records:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        with own_process(OMP_WAIT_POLICY="PASSIVE") as process:
            extraction_s = process.submit(make_store, store, plan).result() * EPOCH_IMAGES / plan.n_images
        rounds = []
        for turn in range(plan.rounds):
            first = turn % len(plan.contestants)
            order = plan.contestants[first:] + plan.contestants[:first]
            rounds.append({contestant: _train(contestant, plan, store) for contestant in order})
    return [_record(c, plan, rounds, epochs=epochs, extraction_s=extraction_s) for c in plan.contestants]


def _train(contestant: Contestant, plan: Plan, store: Path) -> dict[str, Any]:
    with own_process(OMP_WAIT_POLICY="PASSIVE") as process:
        result: dict[str, Any] = process.submit(train, contestant, plan, store).result()
    memory = f"{result['memory_bytes'] / 1e6:,.0f} MB ({result['own_bytes'] / 1e6:,.0f} of its own)"
    what = f"{plan.geometry}, {contestant.adaptor}, {WAYS[contestant.way]}"
    print(f"{what}: {memory}, {result['epoch_s']:.2f} s an epoch", file=sys.stderr, flush=True)
    return result


def _record(
    contestant: Contestant,
    plan: Plan,
    rounds: Sequence[dict[Contestant, dict[str, Any]]],
    *,
    epochs: int,
    extraction_s: float,
) -> dict[str, Any]:
    def median(name: str) -> float:
        return statistics.median(of_round[contestant][name] for of_round in rounds)

    def ratios(name: str) -> list[float]:
        return [of_round[contestant][name] / of_round[LORA][name] for of_round in rounds]

    extracted = 0.0 if contestant.way == "backbone" else extraction_s
    return {
        "geometry": plan.geometry,
        "model": plan.model,
        "adaptor": contestant.adaptor,
        "way": contestant.way,
        "images_measured": _steps(contestant, plan) * BATCH_SIZE,
        "parameters": rounds[0][contestant]["parameters"],
        "memory_bytes": median("memory_bytes"),
        "memory_ratio": statistics.median(ratios("memory_bytes")),
        "own_bytes": median("own_bytes"),
        "own_ratio": statistics.median(ratios("own_bytes")),
        "epoch_s": median("epoch_s"),
        "time_ratio": statistics.median(ratios("epoch_s")),
        "time_ratio_least": min(ratios("epoch_s")),
        "time_ratio_greatest": max(ratios("epoch_s")),
        "extraction_s": extracted,
        "epochs": epochs,
        "end_s": extracted + epochs * median("epoch_s"),
    }


def _steps(contestant: Contestant, plan: Plan) -> int:
    return plan.steps if contestant.way == "backbone" else plan.n_images // BATCH_SIZE


# What follows runs in the processes that are measured.


def make_store(store: Path, plan: Plan) -> float:
    """Extracts the images of a plan; returns the seconds that it took."""
    from coldtap import cache_features

    images = Pictures(_images(plan), plan.n_images)
    began = time.perf_counter()
    cache_features({"train": images}, store, model=plan.model, random_weights=plan.random_weights, split=["train"])
    return time.perf_counter() - began


def _images(plan: Plan) -> Sequence[Any]:
    if plan.geometry == "reference":
        return real_images(plan.n_images)
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (plan.n_images, 224, 224, 3), np.uint8))


class Course:
    """The training of one contestant: it starts when it is made, and goes on for as many steps as it is asked."""

    def __init__(self, contestant: Contestant, plan: Plan, store: Path) -> None:
        self._device = choose_device("auto")
        self._take_a_step()
        _forget_peak()
        self._held_before = self._held()
        self._sampler = _AnonymousPeak()
        model: torch.nn.Module
        if contestant.way == "backbone":
            backbone = load_backbone(plan.model, random_weights=plan.random_weights, device=str(self._device))
            pixels = Pixels(backbone, plan)
        if contestant.adaptor == "lora":
            model = build_lora(backbone, n_classes=N_CLASSES, seed=0)
            self._batches = pixels.batches()
        else:
            opened, kind = open_store(store), adaptor_kind(contestant.adaptor)
            spec, options = kind.plan(opened, kind.options())
            with seeded(0, 0, self._device):
                model = kind.build(spec, options, n_classes=N_CLASSES).to(self._device)
            copy_final_norm(model, opened.norm)
            if contestant.way == "backbone":
                self._batches = pixels.features(spec)
            else:
                resident = contestant.way == "memory"
                self._batches = _stored(
                    FeatureBatches(opened, spec, "train", batch_size=BATCH_SIZE, resident=resident, device=self._device)
                )
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._descent = Descent(model, lr=1e-3, steps=10_000)

    def run(self, steps: int) -> float:
        """Makes some steps; returns the seconds that they took."""
        began = time.perf_counter()
        for inputs, targets in islice(self._batches, steps):
            self._descent.step(inputs, targets)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def memory(self) -> dict[str, int]:
        """The peak so far above the imports, and the part of it that is the process's own."""
        if self._device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self._device) - self._held_before
            return {"memory_bytes": held, "own_bytes": held}
        return {"memory_bytes": peak_bytes() - self._held_before, "own_bytes": self._sampler.stop()}

    def _held(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        return resident_bytes()

    def _take_a_step(self) -> None:
        """Makes torch load what it loads at the first step only."""
        model = torch.nn.Linear(2, 2, device=self._device)
        inputs, targets = torch.zeros(2, 2, device=self._device), torch.zeros(2, dtype=torch.int64, device=self._device)
        Descent(model, lr=1e-3, steps=1).step(inputs, targets)


class Pixels:
    """A backbone, and the images of a plan, decoded once: (image, channel, height, width) uint8."""

    def __init__(self, backbone: Backbone, plan: Plan) -> None:
        self._backbone = backbone
        n_images = min(plan.n_images, plan.steps * BATCH_SIZE)
        chosen = _images(plan)[:n_images]
        self._pixels = torch.from_numpy(np.stack([backbone.preprocess.pixels(decode_rgb(image)) for image in chosen]))

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pixels (batch, channel, height, width) uint8 and targets (batch,) on the device, without end."""
        device = self._backbone.device
        for epoch in count(1):
            order, _ = epoch_draw(len(self._pixels), 1, seed=0, epoch=epoch)
            for start, stop in batch_bounds(len(order), batch_size=BATCH_SIZE):
                chosen = torch.from_numpy(order[start:stop])
                yield self._pixels[chosen].to(device), (chosen % N_CLASSES).to(device)

    def features(self, spec: FeatureSpec) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same as the features that an adaptor reads: (batch, *row shape) float32."""
        for pixels, targets in self.batches():
            parts = [part.values for part in gather(self._backbone(pixels), [spec])]
            # A copy, since what comes out of inference mode cannot be kept for a backward pass.
            yield parts[0].clone() if spec.gather == "sum" else torch.stack(parts, dim=1), targets


def _stored(batches: FeatureBatches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for epoch in count(1):
        for batch in batches.shuffled(seed=0, epoch=epoch):
            yield batch.features, batch.targets


class _AnonymousPeak:
    """The largest anonymous memory of this process above what it is now, looked at every few milliseconds.

    The kernel keeps a peak of the whole resident size alone, with the maps of files in it.
    """

    def __init__(self) -> None:
        self._before = self._peak = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING_S):
            self._peak = max(self._peak, _anonymous_bytes())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak - self._before


def _anonymous_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resident_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _forget_peak() -> None:
    """Lets the peak of the resident size begin anew where that can be: imports can reach above what they leave."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def train(contestant: Contestant, plan: Plan, store: Path) -> dict[str, Any]:
    """Memory, and the seconds of an epoch of `EPOCH_IMAGES`, the first steps left out."""
    course, steps = Course(contestant, plan, store), _steps(contestant, plan)
    # An epoch from the store holds each checksum against its bytes once; a step of the backbone warms it up.
    course.run(1 if contestant.way == "backbone" else steps)
    seconds = course.run(steps)
    epoch_s = seconds * EPOCH_IMAGES / (steps * BATCH_SIZE)
    return {"parameters": course.parameters, "epoch_s": epoch_s, **course.memory()}


# What follows shows the records.


def comparison_table(records: Records) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Training against LoRA (= 1)", title_justify="left", title_style="bold")
    left = ("backbone", "adaptor", "features from")
    right = ("parameters", "memory,\nMB", "ratio", "own,\nMB", "ratio", "epoch,\ns", "ratio", "least to\ngreatest")
    for position, column in enumerate((*left, *right, "to the\nend, s")):
        table.add_column(column, justify="left" if position < len(left) else "right")
    for record in records:
        table.add_row(
            record["geometry"],
            record["adaptor"],
            WAYS[record["way"]],
            f"{record['parameters']:,}",
            f"{record['memory_bytes'] / 1e6:,.0f}",
            f"{record['memory_ratio']:.3f}",
            f"{record['own_bytes'] / 1e6:,.0f}",
            f"{record['own_ratio']:.3f}",
            f"{record['epoch_s']:.2f}",
            f"{record['time_ratio']:.3f}",
            f"{record['time_ratio_least']:.3f} – {record['time_ratio_greatest']:.3f}",
            f"{record['end_s']:,.0f}",
        )
    return table


def draw_comparison(records: Records, path: Path) -> None:
    """Bars against LoRA, a row a geometry: memory and the time of an epoch."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    geometries = list(dict.fromkeys(record["geometry"] for record in records))
    figure, panels = plt.subplots(
        len(geometries), 2, figsize=(11, 3.2 * len(geometries)), layout="constrained", squeeze=False, sharey="row"
    )
    colours = {"backbone": "#888888", "disk": "#2a7fb8", "memory": "#8fc1e3"}
    for row, geometry in zip(panels, geometries, strict=True):
        of_geometry = [record for record in records if record["geometry"] == geometry][::-1]
        names = [f"{record['adaptor']}, {WAYS[record['way']]}" for record in of_geometry]
        for panel, key, title in zip(row, ("own_ratio", "time_ratio"), ("own memory", "epoch"), strict=True):
            values = [record[key] for record in of_geometry]
            bars = panel.barh(names, values, color=[colours[record["way"]] for record in of_geometry])
            panel.bar_label(bars, [f"{value:.3f}" for value in values], fontsize=8, padding=3)
            panel.set_xlim(0, 1.18 * max(values))
            panel.set_title(f"{geometry}: {title}, LoRA = 1", fontsize=10)
            panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=tuple(PLANS), action="append", help="repeatable; both by default")
    parser.add_argument("--images", type=int, help="in the store; at least 32")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the time to the end")
    parser.add_argument("--work", type=Path, default=Path("comparison-out"), help="for comparison.json and .png")
    asked = parser.parse_args(arguments)
    if asked.images is not None and asked.images < BATCH_SIZE:
        parser.error(f"--images {asked.images}: at least one batch of {BATCH_SIZE}")
    machine = describe_machine()
    print(machine_line(machine), flush=True)
    images = None if asked.images is None else asked.images // BATCH_SIZE * BATCH_SIZE
    changed = {"n_images": images, "rounds": asked.rounds}
    changed = {name: value for name, value in changed.items() if value is not None}
    plans = [replace(PLANS[name], **changed) for name in asked.geometry or PLANS]
    records = measure_comparison(quick=False, plans=plans, epochs=asked.epochs)
    Console(width=140, highlight=False).print(comparison_table(records))
    asked.work.mkdir(parents=True, exist_ok=True)
    (asked.work / "comparison.json").write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    draw_comparison(records, asked.work / "comparison.png")
    print(f"also in {asked.work}/comparison.json and comparison.png; load at the end {describe_machine()['load']}")


if __name__ == "__main__":
    main()
