"""Calibration images: some of a source's, chosen by a seed, as pixels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coldtap.errors import OptionError, SourceError
from coldtap.pipeline.images.decode_ahead import Decoder, Sample
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.images.sources import Source, open_source

DEFAULT_IMAGES = 512
# A quarter at a time is held out, and four images say little of a range.
FEWEST_IMAGES = 16
N_FOLDS = 4
LARGEST_BATCH = 32
N_DECODE_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationImages:
    """Images in batches.

    Attributes:
        batches: uint8 (batch, channel, height, width) each, at least one per fold.
        digest: SHA-256 over the digests of their files, in order.
        n_unusable: images that could not be read and were passed over.
    """

    batches: Sequence[Tensor]
    digest: str
    n_unusable: int

    @property
    def n_images(self) -> int:
        """Images in all batches."""
        return sum(map(len, self.batches))


def read_calibration_images(
    source: Any, preprocess: Preprocess, *, n_images: int | None, seed: int
) -> CalibrationImages:
    """Decode calibration images, with the preprocessing of the evaluation.

    Args:
        source: a path that `open_source` understands, a source, or any indexable of (image, target); of a source with
            splits the train split.
        preprocess: of the backbone.
        n_images: how many; None is 512, or all where there are fewer.
        seed: chooses them.

    Raises:
        OptionError: fewer than 16 are asked for.
        SourceError: the source has too few images that can be read.
    """
    if n_images is not None and n_images < FEWEST_IMAGES:
        raise OptionError(f"`images={n_images}`: give at least {FEWEST_IMAGES} calibration images")
    opened: Source = source if hasattr(source, "listing") else open_source(source, labels="optional", seed=seed)
    splits = opened.listing.splits
    candidates = [i for i, split in enumerate(splits) if split == "train"] or list(range(len(splits)))
    wanted = n_images or min(DEFAULT_IMAGES, len(candidates))
    order = [candidates[i] for i in np.random.default_rng(seed).permutation(len(candidates))]
    pixels, digests, n_unusable = _decode(opened, preprocess, order, wanted)
    needed = max(FEWEST_IMAGES, n_images or 0)
    if len(pixels) < needed:
        place = " in its train split" if len(candidates) < len(splits) else ""
        raise SourceError(
            f"calibration needs {needed} different images, and {opened.name} has {len(pixels)} that can be read{place} "
            f"({n_unusable} cannot): give more images{'' if n_images is None else ', or smaller `images`'}"
        )
    n_batch = min(LARGEST_BATCH, len(pixels) // N_FOLDS)
    return CalibrationImages(
        batches=[torch.from_numpy(np.stack(some)) for some in batched(pixels, n_batch)],
        digest=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        n_unusable=n_unusable,
    )


def _decode(
    source: Source, preprocess: Preprocess, order: Sequence[int], wanted: int
) -> tuple[list[np.ndarray[Any, np.dtype[np.uint8]]], list[str], int]:
    """Pixels and digests of the first images in that order that can be read, and how many could not.

    A file counts once: a copy among the images held out would tell the gate nothing.
    """
    pixels: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    digests: list[str] = []
    n_unusable = 0
    with Decoder(source=source, preprocess=preprocess, batch_size=LARGEST_BATCH, n_threads=N_DECODE_THREADS) as decoder:
        for batch in decoder.batches([Sample(index) for index in order]):
            for i in range(len(batch.samples)):
                if len(pixels) == wanted:
                    return pixels, digests, n_unusable
                if i in batch.reasons:
                    n_unusable += 1
                elif batch.digests[i] not in digests:
                    pixels.append(batch.pixels[i])
                    digests.append(batch.digests[i])
    return pixels, digests, n_unusable
