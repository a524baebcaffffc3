"""Decoding in threads, a few batches ahead of the backbone, in bounded memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from coldtap.pipeline.images.decode import BadImageError, content_digest, decode_rgb
from coldtap.pipeline.images.preprocess import Augmentation, Preprocess
from coldtap.pipeline.images.sources import Source

BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """One view of one image of a source.

    Attributes:
        index: the image's place in the source's listing.
        view: 0 as for evaluation; 1 … V are augmented.
    """

    index: int
    view: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedBatch:
    """Consecutive samples with their pixels.

    Attributes:
        pixels: (batch, channel, height, width) uint8; zeros where an image could not be read.
        digests: SHA-256 of each image that was read, by its index in the batch.
        reasons: why the others were not.
    """

    samples: Sequence[Sample]
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    digests: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Decoder:
    """From samples to pixels, in threads that leaving a `with` ends; it may be asked from many threads at once.

    A batch is cut into as many parts as there are threads; `augmentation` and its seed are for views 1 … V.
    """

    source: Source
    preprocess: Preprocess
    batch_size: int
    n_threads: int
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def batches(self, samples: Sequence[Sample]) -> Iterator[DecodedBatch]:
        """Yield batches of consecutive samples, decoded ahead; the first ones start before they are asked for."""
        starts = deque(range(0, len(samples), self.batch_size))
        waiting: deque[tuple[DecodedBatch, list[Future[None]]]] = deque()

        def begin() -> None:
            if starts:
                start = starts.popleft()
                waiting.append(self._begin(samples[start : start + self.batch_size]))

        for _ in range(BATCHES_AHEAD):
            begin()

        def deliver() -> Iterator[DecodedBatch]:
            try:
                while waiting:
                    batch, parts = waiting.popleft()
                    for part in parts:
                        part.result()
                    begin()
                    yield batch
            finally:
                for _, parts in waiting:
                    for part in parts:
                        part.cancel()

        return deliver()

    def _begin(self, samples: Sequence[Sample]) -> tuple[DecodedBatch, list[Future[None]]]:
        channels = len(self.preprocess.mean)
        pixels = np.zeros((len(samples), channels, self.preprocess.height, self.preprocess.width), np.uint8)
        batch = DecodedBatch(samples=samples, pixels=pixels)
        parts = [range(start, len(samples), self.n_threads) for start in range(min(self.n_threads, len(samples)))]
        return batch, [self._pool.submit(self._decode, batch, part) for part in parts]

    def _decode(self, batch: DecodedBatch, part: range) -> None:
        for image in part:
            try:
                batch.digests[image] = self._decode_one(batch.samples[image], batch.pixels[image])
            except BadImageError as error:
                batch.reasons[image] = str(error)

    def _decode_one(self, sample: Sample, out: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
        raw = self.source.read(sample.index)
        image = decode_rgb(raw)
        if sample.view == 0:
            out[:] = self.preprocess.pixels(image)
        else:
            out[:] = self.preprocess.augmented(
                image,
                seed=self.seed,
                sample_id=self.source.listing.ids[sample.index],
                view=sample.view,
                augmentation=self.augmentation,
            )
        return content_digest(raw)
