"""The demo's picture: the first three principal components of patch features, as colours on the token grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from coldtap.stores.reading.array import StoredArray
from coldtap.stores.reading.store import Store

type Floats = npt.NDArray[np.float32]

N_FIT = 300  # images that the components are computed on
COMPONENTS = 3
CLIPPED = 1.0  # percent of the values at either end that saturate, so that a few outliers do not grey the rest


def draw_components(store: Store, images: Path, out: Path) -> None:
    """Draw one test image a class, and below it the components of its patch features at four taps.

    Args:
        store: with `layers`.
        images: the folder that the store was made from.
        out: the PNG file.
    """
    from matplotlib.figure import Figure

    array = next(array for array in store.arrays.values() if array.gather == "layers")
    taps = _chosen_taps(array.taps)
    rows = store.rows("test")[:N_FIT]
    shown = _one_per_class(store.targets(rows))
    side = store.recipe.extractor.preprocess["width"]
    pixels = [_resized(images / name, side) for name in store.sample_ids(rows[shown])]
    figure = Figure(figsize=(1.15 * len(shown) + 1.2, 1.2 * (len(taps) + 1) + 0.9), layout="constrained")
    axes = figure.subplots(len(taps) + 1, len(shown), squeeze=False)
    _draw_row(axes[0], "image", pixels)
    for line, tap in zip(axes[1:], taps, strict=True):
        colours = component_colours(_patches(array, rows, tap), shown=shown)
        grid = colours.reshape(len(shown), *array.geometry.grid, COMPONENTS)
        _draw_row(line, f"tap z{tap}\nof {store.depth}", grid)
    for cell, label in zip(axes[0], store.targets(rows[shown]), strict=True):
        cell.set_title(str(label), fontsize=11)
    height, width = array.geometry.grid
    figure.suptitle(
        f"Patch features on their {height} × {width} grid: principal components 1, 2, 3 as red, green, blue"
    )
    figure.savefig(out, dpi=130, metadata={"Software": None})


def _chosen_taps(taps: Sequence[int]) -> list[int]:
    """The start, a third, two thirds and the end of the way through the backbone."""
    last = len(taps) - 1
    return sorted({taps[round(last * part / 3)] for part in range(4)})


def _one_per_class(targets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The first row of each class, classes ascending."""
    return np.unique(targets, return_index=True)[1]


def _resized(path: Path, side: int) -> npt.NDArray[np.uint8]:
    """An image at the size at which the backbone sees it."""
    with Image.open(path) as image:
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def _patches(array: StoredArray, rows: npt.NDArray[np.int64], tap: int) -> Floats:
    """Patch tokens of one tap: (row, token, channel)."""
    out = np.empty((len(rows), 1, *array.row_shape[1:]), np.float32)
    array.read_into(out, rows, [tap])
    return out[:, 0, array.geometry.prefix_tokens :]


def component_colours(patches: Floats, shown: npt.NDArray[np.int64]) -> Floats:
    """Return components of all patches, as colours of some images.

    Args:
        patches: (image, token, channel); the components are those of all of them together.
        shown: the images wanted.

    Returns:
        (wanted, token, 3) from 0 to 1, each component stretched over its own range in all images.
    """
    flat = patches.reshape(-1, patches.shape[-1])
    flat = flat - flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    basis = vectors[:, : -COMPONENTS - 1 : -1]
    # An eigenvector's sign is arbitrary: the largest entry decides, so that every machine draws the same colours.
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])])
    values = flat @ basis
    low, high = np.percentile(values, [CLIPPED, 100 - CLIPPED], axis=0)
    stretched: Floats = np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
    return stretched.reshape(*patches.shape[:2], COMPONENTS)[shown]


def _draw_row(axes: Any, name: str, pictures: Any) -> None:
    for cell, picture in zip(axes, pictures, strict=True):
        cell.imshow(picture, cmap="gray" if picture.ndim == 2 else None, interpolation="nearest")
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    axes[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, fontsize=11)
