"""Features for the benchmarks, and stores of them made by the real writer."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.targets import targets_bytes
from coldtap.stores.format.tiers import Numbers, scales_rule
from coldtap.stores.writing.writer import StoreWriter

VIT_B = Geometry(grid=(14, 14), prefix_tokens=1, channels=768)
N_CLASSES = 10
N_DISTINCT = 16  # images behind the features of ViT-B's geometry
NOISE = 0.5  # standard deviations of a channel
DATA = Path(__file__).parents[2] / "shared/data/downstream"

# Values (sample, *row shape) of sample numbers, float32.
type Values = Callable[[np.ndarray[Any, np.dtype[np.int64]]], np.ndarray[Any, np.dtype[np.float32]]]


def write_store(path: Path, spec: ArraySpec, n_samples: int, values: Values) -> None:
    """A complete store of one array in a float tier, its samples shuffled over the rows as in any store."""
    ids = [f"train/{number % N_CLASSES}/{number:08d}.jpeg" for number in range(n_samples)]
    order = np.random.default_rng(0).permutation(n_samples).tolist()
    plan = RowPlan(order={"train": tuple(order)}, views=0, block_rows=spec.block_rows)
    recipe = _recipe(spec, plan, ids)
    recorded = {"environment": {"device": "none"}, "model": "made", "source": "memory"}
    numbers = {spec.name: Numbers(exponents=(0,) * len(spec.taps))}
    writer = StoreWriter.begin(path, recipe, [spec], plan, recorded=recorded, numbers=numbers, norm=None)
    for block in range(plan.n_blocks):
        _write_block(writer, block, values)
    targets = [sample % N_CLASSES for sample in order]
    label = targets_bytes([ids[sample] for sample in order], targets, None, order=recipe.rows.order)
    writer.finish(ids, ids.__getitem__, {"label": label})


def _recipe(spec: ArraySpec, plan: RowPlan, ids: Sequence[str]) -> Recipe:
    taps = [{"name": f"z{tap}", **spec.geometry.to_dict()} for tap in range(spec.taps[-1] + 1)]
    order, splits = plan.order_digest(ids), {"train": plan.n_samples}
    parts = {
        "extractor": {"architecture": "made", "taps": taps},
        "rows": {"listing": "0" * 64, "order": order, "views": 0, "splits": splits},
        "encoding": {
            "gathers": {spec.gather: list(spec.taps)},
            "tier": spec.tier,
            "scales": scales_rule(None, 0),
            "layout": spec.layout,
            "block_rows": spec.block_rows,
        },
    }
    return Recipe.from_parts(parts, where="a benchmark's store")


def _write_block(writer: StoreWriter, block: int, values: Values) -> None:
    (spec,) = writer.specs
    rows = writer.plan.block(block)
    buffers = writer.new_buffers()
    made = values(np.array([row.sample for row in rows]))
    buffers[spec.name].put(made.reshape(len(rows), len(spec.taps), *spec.row_shape[-2:]), range(len(rows)))
    writer.write_block(
        block,
        buffers,
        rejected=(),
        # Digests as of files, since digests do not compress.
        source_sha256={row.number: hashlib.sha256(b"%d" % row.sample).hexdigest() for row in rows},
        ranges={},
        environment={"device": "none"},
    )


@dataclass(frozen=True)
class ManyFew:
    """Few numbers a row, for stores of many rows."""

    row_shape: tuple[int, ...]

    def __call__(self, samples: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, Any]:
        n_values = int(np.prod(self.row_shape))
        numbers = samples[:, None] % 1024 + np.arange(n_values)
        return numbers.astype(np.float32).reshape(-1, *self.row_shape)


@dataclass(frozen=True)
class Noise:
    """Gaussian numbers, for stores whose size alone matters."""

    row_shape: tuple[int, ...]

    def __call__(self, samples: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, Any]:
        return np.random.default_rng(samples).standard_normal((len(samples), *self.row_shape), np.float32)


class VitBFeatures:
    """Features of ViT-B's geometry: a ViT-B of random weights on a few random images, and noise.

    There are no trained weights here. A sample is one of `N_DISTINCT` images' taps and, in each channel of each
    tap, Gaussian noise of half its standard deviation, so that no two samples are alike and none compresses better
    than its numbers allow.
    """

    def __init__(self) -> None:
        import torch

        from coldtap.pipeline.backbones.backbone import load_backbone

        backbone = load_backbone("vit_base_patch16_224", random_weights=True)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (N_DISTINCT, 3, 224, 224), dtype=torch.uint8, generator=generator)
        taps = torch.stack(backbone(pixels)[1:], dim=1).float().numpy()
        self._images: np.ndarray[Any, np.dtype[np.float32]] = taps
        self._deviation = NOISE * taps.std(axis=(0, 2), keepdims=True)[0]

    def __call__(self, samples: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.stack([self._one(int(sample)) for sample in samples])

    def _one(self, sample: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        noise = np.random.default_rng(sample).standard_normal(self._images.shape[1:], np.float32)
        noise *= self._deviation
        noise += self._images[sample % N_DISTINCT]
        return noise


def real_images(n_images: int) -> Sequence[bytes]:
    """Encoded images of the downstream sets in turn; the digits that come with scikit-learn where there are none."""
    found = sorted(DATA.glob("*.parquet"))
    return _from_parquet(found, n_images) if found else _digits(n_images)


def _from_parquet(files: Sequence[Path], n_images: int) -> list[bytes]:
    import pyarrow.parquet as pq

    a_file = -(-n_images // len(files))
    columns = [pq.read_table(file, columns=["image"])["image"][:a_file].to_pylist() for file in files]
    return [image for images in zip(*columns, strict=True) for image in images][:n_images]


def _digits(n_images: int) -> list[bytes]:
    from PIL import Image
    from sklearn.datasets import load_digits

    def png(pixels: np.ndarray[Any, Any]) -> bytes:
        file = BytesIO()
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    return [png(pixels) for pixels in load_digits().images[:n_images]]
