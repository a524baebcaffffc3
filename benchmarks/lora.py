"""LoRA on the backbone, by the protocol of `vtab`: the rival that needs the backbone in every step.

    python -m benchmarks.lora ../shared/data/downstream --work lora-out            # every set
    python -m benchmarks.lora DATA --work DIR --sets grocery --epochs 4            # a part of it

Low-rank terms of rank 8 on each block's query, key and value (peft; arXiv 2106.09685: 294,912 parameters on ViT-B/16,
the count that comparisons on VTAB print), and a head as the adaptors have: class token beside patch mean, the
backbone's own frozen norm, a linear map.
Pixels, weights, order of samples, batches, optimizer and schedule are those of training from a store. A fit at each
learning rate on train, one of them chosen by val after the last epoch, then a fit a seed on train and val together,
each of which reads test once. Killed and started again, it goes on with the fit that was not finished.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from benchmarks.machine import peak_bytes
from coldtap.adaptors.data.devices import seeded
from coldtap.adaptors.data.epoch_order import batch_bounds, epoch_draw
from coldtap.adaptors.networks.heads import ClassifierHead, FrozenNorm, Pool
from coldtap.adaptors.training.optimizer import learning_rate_at, make_optimizer
from coldtap.device import choose_device
from coldtap.errors import RunError
from coldtap.pipeline.backbones.backbone import Backbone, load_backbone
from coldtap.pipeline.backbones.inputs import normalise
from coldtap.pipeline.backbones.torch_state import exact_float32
from coldtap.pipeline.images.decode import decode_rgb
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.images.sources import open_source
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.storage.atomic import write_file

MODEL = "coldtap/vit-reference"
RANK = 8
POOL: Pool = "both"  # better than the patch mean on val of the three sets of design (docs/log.md)
BATCH_SIZE = 32
WEIGHT_DECAY = 0.05
WARMUP = 0.1
ORDER_SEED = 0
RATES = (1e-3, 4e-3, 1.6e-2)
SEEDS = (0, 1, 2)
EPOCHS = 8
TOLERANCE = 1e-4  # between the taps of a store and those of a fresh LoRA, whose terms are zero

type Fit = Literal["train", "train+val"]
type Rows = np.ndarray[Any, np.dtype[np.int64]]


class Lora(nn.Module):
    """A frozen backbone with trainable low-rank terms on its attention, and a head as LAST has it.

    The backbone stays in eval mode, and its own norm is left to the head, which applies it after pooling. `backbone` is
    changed in place.
    """

    def __init__(self, backbone: Backbone, *, n_classes: int, pool: Pool = POOL, rank: int = RANK) -> None:
        super().__init__()
        geometry, norm = backbone.geometries[backbone.depth], backbone.norm
        assert norm is not None, "LAST's head takes the backbone's final norm"
        self.preprocess = backbone.preprocess
        self.trunk: Any = inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"]), backbone.module
        )
        self.trunk.norm = nn.Identity()
        self.head = ClassifierHead(
            channels=geometry.channels,
            n_classes=n_classes,
            tokens=geometry.tokens,
            prefix_tokens=geometry.prefix_tokens,
            pool=pool,
            norm="backbone",
            backbone_norm=norm.kind,
            backbone_norm_eps=norm.eps,
        )
        assert isinstance(self.head.norm, FrozenNorm)
        for buffer, values in ((self.head.norm.weight, norm.weight), (self.head.norm.bias, norm.bias)):
            if values is not None:
                buffer.copy_(torch.from_numpy(values.copy()))

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """The last tap of pixels (batch, channel, height, width) uint8: (batch, token, channel)."""
        tokens: torch.Tensor = self.trunk.forward_features(normalise(pixels, self.preprocess, torch.float32))
        return tokens

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Classifies pixels (batch, channel, height, width) uint8; returns logits (batch, class)."""
        logits: torch.Tensor = self.head(self.tokens(pixels))
        return logits

    def n_trainable(self) -> int:
        """The parameters that are trained, the classifier's among them."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def build_lora(backbone: Backbone, *, n_classes: int, seed: int, pool: Pool = POOL) -> Lora:
    """A LoRA that starts as a linear probe on the last tap; its start is drawn from the seed, as an adaptor's is."""
    with seeded(seed, 0, backbone.device):
        return Lora(backbone, n_classes=n_classes, pool=pool).to(backbone.device).eval()


class Descent:
    """The steps of a training as coldtap makes them: AdamW with decay on matrices only, a warm-up and a cosine."""

    def __init__(self, model: nn.Module, *, lr: float, steps: int) -> None:
        # Frozen parameters never have a gradient, and AdamW passes over what has none.
        self._optimizer = make_optimizer(model, weight_decay=WEIGHT_DECAY)
        self._model, self._lr, self._steps, self._done = model, lr, steps, 0

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One step on a batch; returns its mean loss (nats)."""
        rate = learning_rate_at(self._done, steps=self._steps, peak=self._lr, warmup=WARMUP)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(self._model(inputs), targets)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._done += 1
        return loss.detach()


@dataclass(frozen=True, kw_only=True)
class Images:
    """Pixels (sample, channel, height, width) uint8 and targets (sample,) int64 of a split, in the order of a store."""

    pixels: torch.Tensor
    targets: torch.Tensor

    def __add__(self, other: "Images") -> "Images":
        pixels, targets = torch.cat([self.pixels, other.pixels]), torch.cat([self.targets, other.targets])
        return Images(pixels=pixels, targets=targets)

    def shuffled(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of an epoch in the order in which `FeatureBatches` gives the same samples."""
        order, _ = epoch_draw(len(self.targets), 1, seed=ORDER_SEED, epoch=epoch)
        for start, stop in batch_bounds(len(order), batch_size=BATCH_SIZE):
            chosen = torch.from_numpy(order[start:stop])
            yield self.pixels[chosen], self.targets[chosen]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Every image of a set, decoded once."""

    splits: dict[str, Images]
    n_classes: int
    fingerprint: str


@lru_cache(maxsize=1)  # the fits of a set follow each other
def read_dataset(path: Path, preprocess: Preprocess) -> Dataset:
    """Decodes a set as `cache_features` does, in the order in which its store has the rows."""
    source = open_source(path)
    listing = source.listing
    assert listing.targets is not None
    order = RowPlan.of(listing.ids, listing.splits, keep=["train", "val", "test"], views=0, seed=0, block_rows=1).order
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        splits = {
            split: Images(
                pixels=torch.from_numpy(
                    np.stack(list(pool.map(lambda i: preprocess.pixels(decode_rgb(source.read(i))), samples)))
                ),
                targets=torch.tensor([listing.targets[sample] for sample in samples]),
            )
            for split, samples in order.items()
        }
    return Dataset(splits=splits, n_classes=max(listing.targets) + 1, fingerprint=listing.fingerprint)


def fit_lora(
    dataset: Path,
    *,
    lr: float,
    seed: int,
    epochs: int,
    fit: Fit,
    out: Path,
    pool: Pool = POOL,
    device: str = "auto",
    model: str = MODEL,
) -> dict[str, Any]:
    """One fit, and its result in the file `out`; a finished fit of the same settings is only read.

    Args:
        dataset: A source with train, val and test.
        lr: Peak learning rate.
        seed: Of the start; the order of samples is the same for every seed.
        epochs: Passes over the images.
        fit: What is learned from: `train`, scored on val, or `train+val`, scored on test.
        out: Where the result is kept, as JSON.
        pool: What the head sees.
        device: auto, cpu, cuda or cuda:N.
        model: The backbone.

    Raises:
        RunError: The file holds the result of other settings.
    """
    settings = {"dataset": dataset.stem, "model": model, "rank": RANK, "pool": pool, "lr": lr, "seed": seed}
    settings |= {"epochs": epochs, "fit": fit, "batch_size": BATCH_SIZE, "weight_decay": WEIGHT_DECAY}
    settings |= {"warmup": WARMUP, "order_seed": ORDER_SEED}
    if out.exists():
        return _finished(out, settings)
    backbone = load_backbone(model, device=str(choose_device(device)))
    images = read_dataset(dataset, backbone.preprocess)
    probe = images.splits["train"].pixels[:BATCH_SIZE]
    expected = backbone(probe)[-1].clone()
    network = build_lora(backbone, n_classes=images.n_classes, seed=seed, pool=pool)
    require_same_taps(network, probe, expected)
    began = time.perf_counter()
    with exact_float32():
        scores = _learn(network, images, fit=fit, lr=lr, epochs=epochs, device=backbone.device)
    on_gpu = backbone.device.type == "cuda"
    result = {
        "settings": settings,
        "fingerprint": images.fingerprint,
        "weights": backbone.weights,
        **scores,
        "parameters": network.n_trainable(),
        "seconds": time.perf_counter() - began,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(),
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
    }
    write_file(out, [json.dumps(result, indent=1).encode()])
    return result


def require_same_taps(network: Lora, pixels: torch.Tensor, expected: torch.Tensor) -> None:
    """Sees that a fresh LoRA gives the last tap that a store holds, once both are normed and pooled.

    Raises:
        RunError: It does not: accuracies would not be comparable.
    """
    head = network.head
    with torch.inference_mode(), exact_float32():
        found = network.tokens(pixels.to(expected.device))
        difference = (head.norm(_patch_mean(found, head)) - head.norm(_patch_mean(expected, head))).abs().max().item()
    if not difference <= TOLERANCE:
        raise RunError(
            f"a fresh LoRA's pooled features differ by {difference:.2g} from the backbone's; at most {TOLERANCE}"
        )


def _patch_mean(tokens: torch.Tensor, head: ClassifierHead) -> torch.Tensor:
    return tokens[:, head.prefix_tokens :].mean(dim=1)


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(out.read_text())
    if result["settings"] != settings:
        names = [name for name in settings if result["settings"].get(name) != settings[name]]
        raise RunError(f"{out} holds a fit of another {', '.join(names)}: choose another --work")
    return result


def _learn(network: Lora, images: Dataset, *, fit: Fit, lr: float, epochs: int, device: torch.device) -> dict[str, Any]:
    """Trains; returns the score after the last epoch, 0 with a reason where the loss is no longer finite."""
    learned = images.splits["train"]
    if fit == "train+val":
        learned = learned + images.splits["val"]
    n_batches = len(batch_bounds(len(learned.targets), batch_size=BATCH_SIZE))
    descent = Descent(network, lr=lr, steps=epochs * n_batches)
    scored = "val" if fit == "train" else "test"
    losses = []
    for epoch in range(1, epochs + 1):
        total = 0.0
        for pixels, targets in learned.shuffled(epoch):
            total += float(descent.step(pixels.to(device), targets.to(device))) * len(targets)
        losses.append(total / len(learned.targets))
        if not math.isfinite(total):
            return {"scored": scored, "top1": 0.0, "losses": losses, "reason": f"loss {total} in epoch {epoch}"}
    return {
        "scored": scored,
        "top1": _accuracy(network, images.splits[scored], device),
        "losses": losses,
        "reason": None,
    }


def _accuracy(network: Lora, images: Images, device: torch.device) -> float:
    right = 0
    with torch.inference_mode():
        for pixels, targets in zip(images.pixels.split(BATCH_SIZE), images.targets.split(BATCH_SIZE), strict=True):
            right += int((network(pixels.to(device)).argmax(dim=1) == targets.to(device)).sum())
    return right / len(images.targets)


@dataclass(kw_only=True)
class Clock:
    """Says how far a table is, in fits."""

    total: int
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    seconds: list[float] = field(default_factory=list)

    def lap(self, seconds: float | None) -> str:
        """Counts a fit that took so long, None if it was only read; returns the time so far, and what is left."""
        self.done += 1
        self.seconds += [] if seconds is None else [seconds]
        rest = (self.total - self.done) * statistics.mean(self.seconds) / 60 if self.seconds else math.nan
        return f"{self.done}/{self.total}, {(time.monotonic() - self.began) / 60:.1f} min, about {rest:.0f} min left"


def lora_protocol(
    dataset: Path,
    *,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    epochs: int = EPOCHS,
    out: Path,
    pool: Pool = POOL,
    device: str = "auto",
    clock: Clock | None = None,
) -> dict[str, Any]:
    """A fit at each rate on train, the choice by val (the smaller rate among equals), a refit a seed, test once each.

    Args:
        dataset: A source with train, val and test.
        rates: Peak learning rates.
        seeds: Of the refits; the first is that of the fits that choose.
        epochs: Passes over the images, of every fit.
        out: A folder for this set's results.
        pool: What the head sees.
        device: auto, cpu, cuda or cuda:N.
        clock: Told of each fit, to print how far the table is.
    """

    def run(lr: float, seed: int, fit: Fit) -> dict[str, Any]:
        file = out / f"{fit.replace('+', '-')}-e{epochs}-{pool}-lr{lr:g}-s{seed}.json"
        began = None if file.exists() else time.monotonic()
        result = fit_lora(dataset, lr=lr, seed=seed, epochs=epochs, fit=fit, out=file, pool=pool, device=device)
        if clock is not None:
            lap = clock.lap(None if began is None else time.monotonic() - began)
            score = f"{result['scored']} {100 * result['top1']:.1f}" if fit == "train" else "test kept for the table"
            reason = f" ({result['reason']})" if result["reason"] else ""
            print(f"[{lap}] {dataset.stem} lr {lr:g} seed {seed} on {fit}: {score}{reason}", flush=True)
        return result

    val = {lr: run(lr, seeds[0], "train")["top1"] for lr in sorted(rates)}
    chosen = max(val, key=lambda lr: val[lr])
    refits = [run(chosen, seed, "train+val") for seed in seeds]
    return {
        "dataset": dataset.stem,
        "adaptor": "lora",
        "lr": chosen,
        "val": {f"{lr:g}": score for lr, score in val.items()},
        "test": [refit["top1"] for refit in refits],
        "parameters": refits[0]["parameters"],
        "seconds": statistics.mean(refit["seconds"] for refit in refits),
    }


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The test accuracies in percent, mean ± standard deviation over the seeds (n − 1), as Markdown."""
    lines = ["| set | LoRA | learning rate | seconds a fit |", "| --- | --: | --: | --: |"]
    for cell in cells:
        lines.append(f"| {cell['dataset']} | {_spread(cell['test'])} | {cell['lr']:g} | {cell['seconds']:.0f} |")
    means = [statistics.mean(seed) for seed in zip(*(cell["test"] for cell in cells), strict=True)]
    return "\n".join([*lines, f"| **mean** | **{_spread(means)}** | | |"])


def _spread(scores: Sequence[float]) -> str:
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return f"{100 * statistics.mean(scores):.1f} ± {100 * deviation:.1f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of Parquet files")
    parser.add_argument("--work", type=Path, default=Path("lora-out"))
    parser.add_argument("--sets", default="", help="names with commas; all Parquet files by default")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--pool", choices=("patch-mean", "prefix", "both", "all"), default=POOL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    there = sorted(path.stem for path in asked.data.glob("*.parquet"))
    names = asked.sets.split(",") if asked.sets else there
    if not names or set(names) - set(there):
        sys.exit(f"{asked.data} holds {there or 'no Parquet files'}; {sorted(set(names) - set(there))} was asked for")
    clock, cells = Clock(total=len(names) * (len(asked.rates) + len(asked.seeds))), []
    print(
        f"{len(names)} sets × ({len(asked.rates)} rates + {len(asked.seeds)} seeds) × {asked.epochs} epochs", flush=True
    )
    for name in names:
        cells.append(
            lora_protocol(
                asked.data / f"{name}.parquet",
                rates=asked.rates,
                seeds=asked.seeds,
                epochs=asked.epochs,
                out=asked.work / name,
                pool=asked.pool,
                device=asked.device,
                clock=clock,
            )
        )
        write_file(asked.work / "lora.json", [json.dumps(cells, indent=1).encode()])
    text = table(cells)
    write_file(asked.work / "lora.md", [f"{text}\n".encode()])
    print(f"\n{text}\n\nalso in {asked.work}/lora.md and lora.json")


if __name__ == "__main__":
    main()
