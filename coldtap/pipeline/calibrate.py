"""The calibration prefix: the first rows of a job, run once before it, for scales and for the forecast."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coldtap.pipeline.backbone import Backbone
from coldtap.pipeline.decode_ahead import DecodedBatch, Decoder
from coldtap.pipeline.gather import Gathered, gather
from coldtap.stores.arrays import ArraySpec
from coldtap.stores.chunks import compress
from coldtap.stores.codes import ErrorBound, Floats, Scaling, choose_scaling, encode, measure_errors
from coldtap.stores.rows import Row, RowPlan
from coldtap.stores.tiers import Numbers, float16_exponent

CALIBRATION_ROWS = 64
# Variances need more rows than a largest value does (docs/log.md); the errors are measured on the rows after them.
CODE_CALIBRATION_ROWS = 128
HELD_OUT_ROWS = 64
MAX_SAMPLE_BYTES = 256_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the prefix showed.

    Attributes:
        numbers: how the values of each array are to be kept.
        errors: of each int8 array, what its codes lose on rows that were not used for its scales, a tap.
        compressed: of each `compact` array, the share of its codes' bytes that zstd leaves.
        rows_per_second: decoding and backbone, batch after batch, the first (warming) batch left out.
    """

    numbers: dict[str, Numbers]
    errors: dict[str, list[dict[str, Any]]]
    compressed: dict[str, float]
    rows_per_second: float


def calibration_rows(specs: Sequence[ArraySpec]) -> int:
    """The number of rows that fix the scales of a store."""
    return CODE_CALIBRATION_ROWS if any(spec.tier == "int8" for spec in specs) else CALIBRATION_ROWS


def calibrate(
    backbone: Backbone, decoder: Decoder, specs: Sequence[ArraySpec], plan: RowPlan, bound: ErrorBound | None
) -> Calibration:
    """Run the first rows of the first split; images that cannot be used do not count.

    At least two batches are timed where there are so many rows, so the rate may come from more rows than the scales.
    A source with too few rows for both keeps a third of them for the errors.
    """
    held_out = HELD_OUT_ROWS if bound else 0
    rows = plan.first_rows(max(calibration_rows(specs) + held_out, 2 * decoder.batch_size))
    samples = _Samples(specs, len(rows))
    times = [time.perf_counter()]
    for batch in decoder.batches(rows):
        taps = backbone(torch.from_numpy(batch.pixels))
        usable = [i for i in range(len(batch.rows)) if i not in batch.reasons]
        with torch.inference_mode():
            for part in gather(taps, specs) if usable else ():
                samples.add(part, batch, usable)
        times.append(time.perf_counter())
    n_scales = min(calibration_rows(specs), -(-samples.n_rows * 2 // 3) if bound else samples.n_rows)
    return Calibration(
        numbers={spec.name: samples.numbers(spec, n_scales, bound) for spec in specs},
        errors={spec.name: samples.errors(spec, n_scales, bound) for spec in specs if spec.tier == "int8" and bound},
        compressed={
            spec.name: samples.compressed(spec, n_scales, bound) for spec in specs if spec.layout == "compact" and bound
        },
        rows_per_second=_rate(times, len(rows), decoder.batch_size),
    )


class _Samples:
    """Extremes of every tap, and for codes some tokens of every image: all prefix tokens and a draw of the patches."""

    def __init__(self, specs: Sequence[ArraySpec], n_rows: int) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._largest: dict[str, list[list[float]]] = {spec.name: [[] for _ in spec.taps] for spec in specs}
        self._values: dict[str, list[list[Floats]]] = {spec.name: [[] for _ in spec.taps] for spec in specs}
        self._scalings: dict[str, Scaling] = {}
        a_token = sum(4 * len(spec.taps) * spec.geometry.channels for spec in specs if spec.tier == "int8")
        self._n_tokens = MAX_SAMPLE_BYTES // (a_token * n_rows) if a_token else 0

    @property
    def n_rows(self) -> int:
        """Usable rows seen."""
        return len(next(iter(self._largest.values()))[0])

    def add(self, part: Gathered, batch: DecodedBatch, usable: list[int]) -> None:
        """Take what is needed of one tap of one array."""
        place = part.position or 0
        for image in usable:
            high = max(float(part.high[image]), -float(part.low[image]))
            self._largest[part.array][place].append(high if np.isfinite(high) else 0.0)
        spec = self._specs[part.array]
        if spec.tier == "int8":
            values = part.values.float()
            for image in usable:
                chosen = values[image, self._tokens(spec, batch.rows[image])].cpu().numpy()
                self._values[part.array][place].append(chosen)

    def _tokens(self, spec: ArraySpec, row: Row) -> list[int]:
        prefix, tokens = spec.geometry.prefix_tokens, spec.geometry.tokens
        n_patches = min(tokens - prefix, max(self._n_tokens - prefix, 1))
        drawn = np.random.default_rng(row.number).permutation(tokens - prefix)[:n_patches]
        return [*range(prefix), *sorted((prefix + drawn).tolist())]

    def numbers(self, spec: ArraySpec, n_scales: int, bound: ErrorBound | None) -> Numbers:
        """How the values of an array are to be kept."""
        largest = [max(tap[:n_scales], default=0.0) for tap in self._largest[spec.name]]
        exponents = tuple(float16_exponent(top) if spec.tier == "float16" else 0 for top in largest)
        scaling = self._scaling(spec, n_scales, bound) if spec.tier == "int8" and bound else None
        return Numbers(exponents=exponents, scaling=scaling)

    def _scaling(self, spec: ArraySpec, n_scales: int, bound: ErrorBound) -> Scaling:
        if spec.name not in self._scalings:
            values = self._stacked(spec, slice(n_scales))
            samples = values.transpose(1, 0, 2, 3).reshape(len(spec.taps), -1, spec.geometry.channels)
            self._scalings[spec.name] = choose_scaling(samples, bound)
        return self._scalings[spec.name]

    def _stacked(self, spec: ArraySpec, rows: slice) -> Floats:
        """Sampled values (row, tap, token, channel); rows that are not finite are left out."""
        values = np.stack([np.stack(tap[rows]) for tap in self._values[spec.name]], axis=1)
        return values[np.isfinite(values).all(axis=(1, 2, 3))]

    def errors(self, spec: ArraySpec, n_scales: int, bound: ErrorBound) -> list[dict[str, Any]]:
        """What the codes lose on the rows after those of the scales; empty where there is none."""
        if self.n_rows <= n_scales:
            return []
        held = self._stacked(spec, slice(n_scales, None))
        prefix = spec.geometry.prefix_tokens
        return measure_errors(held, self._scaling(spec, n_scales, bound), prefix_tokens=prefix) if len(held) else []

    def compressed(self, spec: ArraySpec, n_scales: int, bound: ErrorBound) -> float:
        """The share of the codes' bytes that zstd leaves, from the sampled tokens."""
        codes = encode(self._stacked(spec, slice(16)), self._scaling(spec, n_scales, bound)).codes
        return sum(len(compress(np.ascontiguousarray(tap))) for row in codes for tap in row) / codes.nbytes


def _rate(times: Sequence[float], n_rows: int, batch_size: int) -> float:
    if len(times) > 2:
        return (n_rows - batch_size) / (times[-1] - times[1])
    return n_rows / (times[-1] - times[0])
