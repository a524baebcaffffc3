"""From the first rows of a store to its scales: which rows, which of their tokens, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coldtap.stores.format.arrays import ArraySpec, calibration_rows
from coldtap.stores.format.chunks import compress
from coldtap.stores.format.codes import ErrorBound, Floats, Scaling, choose_scaling, encode, measure_errors
from coldtap.stores.format.shards import Mask
from coldtap.stores.format.tiers import Numbers

HELD_OUT_ROWS = 64  # after those of the calibration: errors are measured on them
MAX_SAMPLE_BYTES = 256_000_000
COMPRESSED_ROWS = 16  # enough to forecast what zstd leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the first rows of a store show before its first block is begun.

    Attributes:
        numbers: how the values of each array are to be kept.
        errors: of each array that loses something, what it loses per tap; of codes on rows that set no scales.
        compressed: of each `compact` array, the share of its codes' bytes that zstd leaves.
        rows_per_second: without writing.
        blocks_at_once: blocks that go on at that rate at a time.
    """

    numbers: dict[str, Numbers]
    errors: dict[str, list[dict[str, Any]]]
    compressed: dict[str, float]
    rows_per_second: float
    blocks_at_once: int = 1


class CalibrationSamples:
    """What the first rows show: extremes of every tap, and for codes some tokens of every row.

    Where all tokens would be too much, all prefix tokens and a draw of the patches; of the prefix tokens only as large
    a share then counts in the scales, or the few of them would outweigh the patches. Rows are added in order, those
    that cannot be used left out. A store with too few rows for both keeps a third of them for the errors.
    """

    def __init__(self, specs: Sequence[ArraySpec], bound: ErrorBound | None, n_rows: int) -> None:
        """Make room for at most so many rows."""
        self._specs, self._bound = {spec.name: spec for spec in specs}, bound
        self._n_calibration = calibration_rows(specs)
        self._largest: dict[str, list[list[float]]] = {spec.name: [[] for _ in spec.taps] for spec in specs}
        self._values: dict[str, list[list[Floats]]] = {spec.name: [[] for _ in spec.taps] for spec in specs}
        self._scalings: dict[str, Scaling] = {}
        a_token = sum(4 * len(spec.taps) * spec.geometry.channels for spec in specs if spec.kept_as.is_coded)
        self._n_tokens = MAX_SAMPLE_BYTES // (a_token * n_rows) if a_token else 0

    @staticmethod
    def rows_needed(specs: Sequence[ArraySpec], bound: ErrorBound | None) -> int:
        """Return rows that fix the scales, and those on which the errors are measured."""
        return calibration_rows(specs) + (HELD_OUT_ROWS if bound else 0)

    @property
    def n_scales(self) -> int:
        """Of the rows that were added, those that fix the scales: the first ones."""
        n_rows = len(next(iter(self._largest.values()))[0])
        return min(self._n_calibration, -(-n_rows * 2 // 3) if self._bound else n_rows)

    def tokens(self, spec: ArraySpec, row: int) -> list[int]:
        """Return the tokens of a row of which `add` wants the values."""
        prefix, tokens = spec.geometry.prefix_tokens, spec.geometry.tokens
        drawn = np.random.default_rng(row).permutation(tokens - prefix)[: self._n_patches(spec)]
        return [*range(prefix), *sorted((prefix + drawn).tolist())]

    def _n_patches(self, spec: ArraySpec) -> int:
        prefix = spec.geometry.prefix_tokens
        return min(spec.geometry.tokens - prefix, max(self._n_tokens - prefix, 1))

    def _tokens_that_count(self, spec: ArraySpec, number: int) -> Mask:
        """Of the tokens of the `number`-th row added: every patch, and a draw of the prefix tokens."""
        prefix, n_patches = spec.geometry.prefix_tokens, self._n_patches(spec)
        share = n_patches / (spec.geometry.tokens - prefix)
        return np.concatenate([np.random.default_rng(number).random(prefix) < share, np.ones(n_patches, bool)])

    def add(self, array: str, place: int, largest: float, values: Floats | None) -> None:
        """Take in one tap of one array of a row.

        Args:
            array: its name.
            place: along the tap axis.
            largest: the largest |x|.
            values: (token, channel) of the row's `tokens`; for int8 arrays alone.
        """
        self._largest[array][place].append(largest if np.isfinite(largest) else 0.0)
        if values is not None:
            self._values[array][place].append(values)

    def numbers(self) -> dict[str, Numbers]:
        """Return how the values of each array are to be kept."""
        return {name: self._numbers(spec) for name, spec in self._specs.items()}

    def _numbers(self, spec: ArraySpec) -> Numbers:
        largest = [max(tap[: self.n_scales], default=0.0) for tap in self._largest[spec.name]]
        exponents = tuple(spec.kept_as.exponent(top) for top in largest)
        return Numbers(exponents=exponents, scaling=self._scaling(spec) if spec.kept_as.is_coded else None)

    def _scaling(self, spec: ArraySpec) -> Scaling:
        if spec.name not in self._scalings:
            assert self._bound is not None
            values, counted = self._stacked(spec, slice(self.n_scales))
            self._scalings[spec.name] = choose_scaling(values.transpose(1, 0, 2, 3)[:, counted], self._bound)
        return self._scalings[spec.name]

    def _stacked(self, spec: ArraySpec, rows: slice) -> tuple[Floats, Mask]:
        """Sampled values (row, tap, token, channel), and which (row, token) count; finite rows alone."""
        values = np.stack([np.stack(tap[rows]) for tap in self._values[spec.name]], axis=1)
        finite = np.isfinite(values).all(axis=(1, 2, 3))
        numbers = range(len(self._values[spec.name][0]))[rows]
        counted = np.stack([self._tokens_that_count(spec, number) for number in numbers])
        return values[finite], counted[finite]

    def errors(self) -> dict[str, list[dict[str, Any]]]:
        """Return what the codes of each int8 array lose on the rows after those of the scales."""
        return {name: self._errors(spec) for name, spec in self._specs.items() if spec.kept_as.is_coded}

    def _errors(self, spec: ArraySpec) -> list[dict[str, Any]]:
        if len(self._values[spec.name][0]) <= self.n_scales:
            return []
        held, counted = self._stacked(spec, slice(self.n_scales, None))
        prefix = spec.geometry.prefix_tokens
        if len(held) == 0:
            return []
        return measure_errors(held, self._scaling(spec), prefix_tokens=prefix, counted=counted)

    def compressed(self) -> dict[str, float]:
        """Return of each `compact` array, the share of its codes' bytes that zstd leaves, from the sampled tokens."""
        return {name: self._compressed(spec) for name, spec in self._specs.items() if spec.layout == "compact"}

    def _compressed(self, spec: ArraySpec) -> float:
        codes = encode(self._stacked(spec, slice(COMPRESSED_ROWS))[0], self._scaling(spec)).codes
        return sum(len(compress(np.ascontiguousarray(tap))) for row in codes for tap in row) / codes.nbytes
