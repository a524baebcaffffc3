"""Train, continue or evaluate the reference backbone `coldtap/vit-reference`.

    python scripts/pretrain_reference.py DATA.parquet OUT.safetensors                  the pilot's recipe
    python scripts/pretrain_reference.py DATA.parquet OUT.safetensors --init FILE ...  go on from weights
    python scripts/pretrain_reference.py FOLDER --evaluate FILE                        the figure to raise

DATA.parquet holds 32 x 32 images with the columns `image` (encoded bytes), `label` and `split` (`train`, `test`);
FOLDER holds Parquet sets with the same columns and a `val` split. The defaults are the recipe of the first
backbone (AdamW, one cycle, label smoothing, a random shift a batch and a random flip an image). The other options
are stronger augmentation, each image with its own draw, and an auxiliary objective.

A checkpoint OUT.checkpoint is written after every epoch (temporary name, then rename); the same command goes on from
it after any death and ends in the same weights as an undisturbed run, a finished run says so, and other settings are
refused. OUT itself (float16) appears when the last epoch is done.
"""

import argparse
import dataclasses
import hashlib
import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coldtap.pipeline.backbones.reference import LAYOUT, PRETRAINED_CFG

MEAN = STD = 0.5  # of images in [0, 1], as PRETRAINED_CFG says
HOG_BINS, HOG_CELL = 9, 8  # 9 orientations in each of 4 x 4 cells of 8 x 8 pixels
PROBE_C = 0.1  # the probe's inverse regularisation, one value for every set and tap, never chosen by score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides the weights, besides the images and the machine."""

    epochs: int = 12
    batch_size: int = 128
    seed: int = 0
    lr: float = 1.2e-3
    warmup: float = 0.15
    weight_decay: float = 0.05
    smoothing: float = 0.1
    precision: str = "bfloat16"
    crop: float = 0.0
    jitter: float = 0.0
    grey: float = 0.0
    invert: float = 0.0
    cutout: float = 0.0
    mixup: float = 0.0
    patch_drop: float = 0.0
    hog: float = 0.0
    init: str = ""


OPTION_HELP = {
    "lr": "peak learning rate of the one cycle",
    "warmup": "fraction of all steps before the peak",
    "smoothing": "label smoothing",
    "precision": "of the autocast: bfloat16, or float32 for none",
    "crop": "smallest area of a random resized crop, as a fraction; 0 shifts the whole batch by up to 4 pixels",
    "jitter": "strength of brightness, contrast and saturation jitter",
    "grey": "probability of a greyscale image",
    "invert": "probability of inverted intensities",
    "cutout": "probability of a grey 12 x 12 square",
    "mixup": "alpha of mixup, one coefficient a pair; 0 for none",
    "patch_drop": "fraction of the patch tokens left out in training",
    "hog": "weight of the auxiliary objective (see `hog`); 0 for none",
    "init": "weights to start from; recorded by digest",
}


def load_images(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read one split as uint8 images (n, 3, height, width) of one size, and labels (n,)."""
    table = pq.read_table(path, columns=["image", "label"], filters=[("split", "==", split)])
    pixels = [np.asarray(Image.open(io.BytesIO(b.as_py())).convert("RGB")) for b in table["image"]]
    labels = torch.tensor(table["label"].to_pylist(), dtype=torch.long)
    if not pixels:
        return torch.empty(0, 3, 32, 32, dtype=torch.uint8), labels
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), labels


def normalise(images: Tensor) -> Tensor:
    """Map pixel values 0 … 255 to what the backbone expects, (value / 255 - MEAN) / STD."""
    return (images.float() / 255 - MEAN) / STD


# Augmentation. Every draw is made on the CPU, so that a run on another device sees the same images.


def chosen(n: int, probability: float, like: Tensor) -> Tensor:
    """Draw n booleans, shaped (n, 1, 1, 1) and placed like `like`."""
    return (torch.rand(n) < probability)[:, None, None, None].to(like.device)


def shift_batch(images: Tensor) -> Tensor:
    """Shift a whole batch by one draw of up to 4 pixels each way."""
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2,)).tolist()
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


def resized_crop(images: Tensor, smallest_area: float) -> Tensor:
    """Cut out of each image a rectangle of random area, shape and place, and resize it back."""
    n = len(images)
    area = smallest_area + (1 - smallest_area) * torch.rand(n)
    ratio = torch.exp((torch.rand(n) * 2 - 1) * np.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (torch.rand(n) * 2 - 1) * (1 - width), (torch.rand(n) * 2 - 1) * (1 - height)
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def colour(images: Tensor, settings: Settings) -> Tensor:
    """Jitter, grey and invert normalised images (n, 3, height, width), each with its own draw."""
    n = len(images)
    if settings.jitter:
        low, high = 1 - settings.jitter, 1 + settings.jitter
        bright, contrast, saturation = (low + (high - low) * torch.rand(3, n))[:, :, None, None, None].to(images.device)
        images = (images + 1) * bright - 1
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * contrast + mean
        grey = images.mean(1, keepdim=True)
        images = ((images - grey) * saturation + grey).clamp(-1, 1)
    if settings.grey:
        images = torch.where(chosen(n, settings.grey, images), images.mean(1, keepdim=True), images)
    if settings.invert:
        images = torch.where(chosen(n, settings.invert, images), -images, images)
    return images


def cutout(images: Tensor, probability: float, side: int = 12) -> Tensor:
    """Grey one square of some images, its centre anywhere in the image."""
    n, _, height, width = images.shape
    rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    top = torch.randint(0, height, (n, 1, 1)) - side // 2
    left = torch.randint(0, width, (n, 1, 1)) - side // 2
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    inside &= torch.rand(n, 1, 1) < probability
    return images.masked_fill(inside[:, None].to(images.device), 0.0)


def augment(images: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Augment uint8 images; return the images as seen by the backbone, and before their colours were touched."""
    plain = normalise(images)
    plain = resized_crop(plain, settings.crop) if settings.crop else shift_batch(plain)
    plain = torch.where(chosen(len(plain), 0.5, plain), plain.flip(3), plain)
    seen = colour(plain, settings)
    return (cutout(seen, settings.cutout) if settings.cutout else seen), plain


def hog(images: Tensor) -> Tensor:
    """Describe each image by its histograms of gradient orientations, normalised by their neighbourhood.

    The auxiliary objective is to give these from the pooled features: it keeps in them the layout of shapes, which
    class labels alone let go. MaskFeat (https://arxiv.org/abs/2112.09133) regresses such histograms a masked patch;
    here they are regressed for the whole image, of colours that the backbone does not see.

    Args:
        images: Normalised images (n, 3, 32, 32).

    Returns:
        Descriptors (n, 16 * HOG_BINS), non-negative, of unit order.
    """
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dx = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
    dy = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    strength = (dx.square() + dy.square()).sqrt()
    angle = torch.remainder(torch.atan2(dy, dx), torch.pi) / torch.pi * HOG_BINS
    away = (angle - torch.arange(HOG_BINS, device=images.device)[None, :, None, None]).abs()
    away = torch.minimum(away, HOG_BINS - away)  # orientations are a circle
    cells = F.avg_pool2d(strength * (1 - away).clamp(min=0), HOG_CELL)
    norm = F.avg_pool2d(cells.square().sum(1, keepdim=True), 3, stride=1, padding=1).sqrt()
    return (cells / (3 * norm + 0.01)).flatten(1)


# Training.


def pool(features: Tensor) -> Tensor:
    """Put class token and patch mean side by side: (n, 1 + patches, channels) to (n, 2 * channels)."""
    return torch.cat([features[:, 0], features[:, 1:].mean(1)], 1)


class Trainee(nn.Module):
    """The backbone and the head of the auxiliary objective, which is thrown away in the end."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.backbone = VisionTransformer(**LAYOUT, patch_drop_rate=settings.patch_drop)
        if settings.hog:
            self.hog_head = nn.Linear(2 * LAYOUT["embed_dim"], 16 * HOG_BINS)

    def loss(self, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
        """Return the loss of uint8 images (n, 3, 32, 32) with labels (n,)."""
        seen, plain = augment(images, settings)
        device = seen.device
        pairs, keep = torch.arange(len(seen), device=device), torch.ones(len(seen), device=device)
        if settings.mixup:
            # The larger share stays with the image itself, so that the HOG of the pair is its own and its mate's.
            keep = torch.from_numpy(
                np.random.default_rng(int(torch.randint(2**31, ()))).beta(settings.mixup, settings.mixup, len(seen))
            ).float()
            keep = torch.maximum(keep, 1 - keep).to(device)
            pairs = torch.randperm(len(seen)).to(device)
            seen = seen * keep[:, None, None, None] + seen[pairs] * (1 - keep)[:, None, None, None]
        with autocast(device, settings.precision):
            features = self.backbone.forward_features(seen)
            logits = self.backbone.forward_head(features).float()
            described = self.hog_head(pool(features)).float() if settings.hog else None
        own = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing, reduction="none")
        mate = F.cross_entropy(logits, labels[pairs], label_smoothing=settings.smoothing, reduction="none")
        loss = (keep * own + (1 - keep) * mate).mean()
        if described is not None:
            # Each component standardised over the batch: a loss of 1 is what predicting the mean costs.
            target = F.batch_norm(hog(plain), None, None, training=True)
            target = target * keep[:, None] + target[pairs] * (1 - keep)[:, None]
            loss = loss + settings.hog * F.mse_loss(described, target)
        return loss


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast that `precision` asks for."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of uint8 images that the backbone's own head classifies rightly."""
    model.eval()
    with torch.inference_mode():
        right = [
            int((model(normalise(some)).argmax(1) == wanted).sum())
            for some, wanted in zip(images.split(500), labels.split(500), strict=True)
        ]
    model.train()
    return sum(right) / max(len(labels), 1)


def save_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def train(
    data: Path,
    out: Path,
    settings: Settings,
    *,
    init: Path | None = None,
    device: str = "cpu",
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train, going on from OUT.checkpoint where there is one, and write the weights in float16 to `out`.

    Args:
        data: Parquet file with the splits `train` and `test`.
        out: Safetensors file to write; the checkpoint stands beside it.
        settings: The recipe; a checkpoint of another recipe is refused.
        init: Weights to begin with.
        device: Where to train.
        on_epoch: Called with the number of finished epochs, after their checkpoint is on disk.

    Raises:
        SystemExit: The checkpoint is of another recipe or other data.
    """
    settings = dataclasses.replace(settings, init=file_sha256(init) if init else "")
    recipe = {**dataclasses.asdict(settings), "data": file_sha256(data), "device": device}
    checkpoint = out.with_name(out.name + ".checkpoint")
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    if saved is not None:
        differing = [
            f"{k}: {saved['recipe'].get(k)!r} there, {v!r} now"
            for k, v in recipe.items()
            if saved["recipe"].get(k) != v
        ]
        if differing:
            raise SystemExit(f"{checkpoint} is of another run ({'; '.join(differing)}): choose another OUT")
        if saved["epoch"] == settings.epochs and out.exists():
            print(f"finished already: {out}, {settings.epochs} epochs", flush=True)
            return

    torch.manual_seed(settings.seed)
    trainee = Trainee(settings)
    if init:
        trainee.backbone.load_state_dict({k: v.float() for k, v in load_file(init).items()})
    trainee.to(device)
    images, labels = (x.to(device) for x in load_images(data, "train"))
    test_images, test_labels = (x.to(device) for x in load_images(data, "test"))
    steps = len(images) // settings.batch_size  # an epoch; what is left over waits for the next shuffle
    optimiser = torch.optim.AdamW(trainee.parameters(), settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.lr, settings.epochs * steps, pct_start=settings.warmup
    )
    first = 0
    if saved is not None:
        first = saved["epoch"]
        trainee.load_state_dict(saved["trainee"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        set_rng_state(saved["rng"])
        print(f"going on after epoch {first} of {settings.epochs}", flush=True)

    trainee.train()
    start = time.monotonic()
    for epoch in range(first, settings.epochs):
        order = torch.randperm(len(images)).to(device)
        total = 0.0
        for step in range(steps):
            batch = order[step * settings.batch_size :][: settings.batch_size]
            loss = trainee.loss(images[batch], labels[batch], settings)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
            if (step + 1) % 50 == 0:
                print(
                    f"  step {step + 1}/{steps} loss {total / (step + 1):.3f} {time.monotonic() - start:.0f} s",
                    flush=True,
                )
        test = accuracy(trainee.backbone, test_images, test_labels)
        print(
            f"epoch {epoch + 1}/{settings.epochs} loss {total / steps:.3f} test accuracy {test:.4f} "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
        state = {
            "recipe": recipe,
            "epoch": epoch + 1,
            "trainee": trainee.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": rng_state(),
        }
        save_atomically(checkpoint, partial(torch.save, state))
        on_epoch(epoch + 1)
    weights = {name: tensor.half().cpu().contiguous() for name, tensor in trainee.backbone.state_dict().items()}
    save_atomically(out, lambda path: save_file(weights, path))
    print(f"finished: {out}, sha256 {file_sha256(out)}", flush=True)


def rng_state() -> dict[str, Any]:
    """Return the state of every generator that training draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since `rng_state`."""
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"])


# Evaluation.


def pooled_taps(model: VisionTransformer, path: Path, split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return class token and patch mean (n, 2 * channels) of every tap and of the final norm, and labels (n,)."""
    transform = create_transform(**resolve_data_config(pretrained_cfg=PRETRAINED_CFG))
    table = pq.read_table(path, columns=["image", "label"], filters=[("split", "==", split)])
    images = [transform(Image.open(io.BytesIO(b.as_py())).convert("RGB")) for b in table["image"]]
    collected: dict[str, list[Tensor]] = {}
    for batch in torch.stack(images).split(250):
        with torch.inference_mode():
            tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(batch))))
            collected.setdefault("z0", []).append(pool(tokens))
            for i, block in enumerate(model.blocks, start=1):
                tokens = block(tokens)
                collected.setdefault(f"z{i}", []).append(pool(tokens))
            collected.setdefault("final", []).append(pool(model.norm(tokens)))
    return {name: torch.cat(parts).numpy() for name, parts in collected.items()}, table["label"].to_numpy()


def probe(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> float:
    """Fit a multinomial logistic regression on standardised features; return its accuracy on `val`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_C, max_iter=2000))
    return float(classifier.fit(train, train_labels).score(val, val_labels))


def evaluate(weights: Path, folder: Path, *, every_tap: bool = False) -> float:
    """Print the linear-probe accuracy on the val split of each Parquet set of a folder; return their mean.

    The protocol: class token and patch mean, side by side, after the final norm; standardised by the train
    split; multinomial logistic regression with C = PROBE_C fitted on the train split; accuracy on the val split.
    No tap, regularisation or epoch is chosen, and the test split is not read. `every_tap` adds the curve over taps.
    """
    model = VisionTransformer(**LAYOUT)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    model.eval()
    scores: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*.parquet")):
        train_features, train_labels = pooled_taps(model, path, "train")
        val_features, val_labels = pooled_taps(model, path, "val")
        for tap in train_features if every_tap else ["final"]:
            scores.setdefault(tap, {})[path.stem] = probe(
                train_features[tap], train_labels, val_features[tap], val_labels
            )
    if not scores:
        raise SystemExit(f"{folder}: no Parquet files")
    for tap, row in scores.items():
        sets = "  ".join(f"{name} {score:.3f}" for name, score in row.items())
        print(f"{tap:>5}  {sets}  mean {np.mean(list(row.values())):.4f}", flush=True)
    return float(np.mean(list(scores["final"].values())))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; every field of `Settings` is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="probe these weights on the sets in DATA")
    parser.add_argument("--every-tap", action="store_true", help="with --evaluate: probe every tap too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    for field in dataclasses.fields(Settings):
        kind = Path if field.name == "init" else type(field.default)
        default = None if field.name == "init" else field.default
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=kind, default=default, help=OPTION_HELP.get(field.name))
    parsed = parser.parse_args(arguments)
    if (parsed.out is None) == (parsed.evaluate is None):
        parser.error("give either OUT or --evaluate FILE")
    return parsed


def main(arguments: list[str]) -> None:
    """Train or evaluate, as the command line says."""
    parsed = parse(arguments)
    torch.set_num_threads(parsed.threads)
    if parsed.evaluate:
        evaluate(parsed.evaluate, parsed.data, every_tap=parsed.every_tap)
        return
    fields: dict[str, Any] = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Settings)}
    fields["init"] = ""
    train(parsed.data, parsed.out, Settings(**fields), init=parsed.init, device=parsed.device)


if __name__ == "__main__":
    main(sys.argv[1:])
