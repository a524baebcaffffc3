"""Scikit-learn's handwritten digits as image files, in class folders below train, val and test."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coldtap.errors import MachineError

WHITE = 16  # the digits' pixels are integers from 0 to 16
SHARES = {"train": 800 / 1797, "val": 200 / 1797}
SEED = 0


def write_digits(folder: Path, n_images: int | None = None) -> Path:
    """Write the digits as 8 × 8 PNG files, if they are not there yet; returns the folder.

    Args:
        folder: gets `train/3/0017.png` and so on: 800, 200 and 797 images, every class in proportion.
        n_images: take that many of the 1,797; None for all.

    Raises:
        MachineError: scikit-learn is missing.
    """
    if folder.exists():
        return folder
    images, labels = _load_digits(n_images)
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, members in _split(labels).items():
        for index in members:
            path = unfinished / split / str(labels[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.rint(images[index] * (255 / WHITE)).astype(np.uint8)
            Image.fromarray(grey).save(path)
    unfinished.rename(folder)
    return folder


def _load_digits(n_images: int | None) -> tuple[Any, Any]:
    """Images (image, 8, 8) and labels; they come with scikit-learn, so that no network is needed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MachineError(
            "the demo's digits come with scikit-learn, which is missing: pip install scikit-learn"
        ) from None
    digits = load_digits()
    return digits.images[:n_images], digits.target[:n_images]


def _split(labels: Any) -> dict[str, Any]:
    """Indices of each split, stratified and always the same."""
    from sklearn.model_selection import train_test_split

    sizes = {split: round(share * len(labels)) for split, share in SHARES.items()}
    train, rest = train_test_split(
        np.arange(len(labels)), train_size=sizes["train"], stratify=labels, random_state=SEED
    )
    val, test = train_test_split(rest, train_size=sizes["val"], stratify=labels[rest], random_state=SEED)
    return {"train": train, "val": val, "test": test}
