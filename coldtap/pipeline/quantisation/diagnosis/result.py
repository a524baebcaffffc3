"""What a diagnosis says of each site, block and tap, with its spread over calibration seeds; as JSON and CSV."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from coldtap.text import csv_cell


@dataclass(frozen=True, slots=True)
class Spread:
    """One number by seed. A level in dB is infinite where a part is exact."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.values) / len(self.values)

    @property
    def lowest(self) -> float:
        """Of the seeds."""
        return min(self.values)

    @property
    def highest(self) -> float:
        """Of the seeds."""
        return max(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDiagnosis:
    """A layer that has CWAC, behind a prefix that has it; levels are signal to noise, on images held out.

    Attributes:
        uncompensated_db, cwac_db: without CWAC here, and with it.
        kept: share of the channels that the gate let through.
        diagonal_gain_db: of two numbers per channel over none, without the gate.
        full_gain_db: of the full matrix over two numbers per channel.
        off_diagonal_share: of the energy of the full matrix M, as `NearDiagonal`.
        off_diagonal_share_of_change: of the energy of M − 1.
    """

    name: str
    uncompensated_db: Spread
    cwac_db: Spread
    kept: Spread
    diagonal_gain_db: Spread
    full_gain_db: Spread
    off_diagonal_share: Spread
    off_diagonal_share_of_change: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDiagnosis:
    """A block's output, behind blocks that have QwT.

    Attributes:
        uncompensated_db, qwt_db: without QwT here, and with it.
        kept: 1 where the gate let it through; of a residual network, the share of its groups.
    """

    name: str
    uncompensated_db: Spread
    qwt_db: Spread
    kept: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class TapDiagnosis:
    """A tap of the whole quantised model against the float model's: without compensation, with CWAC, with QwT."""

    name: str
    uncompensated_db: Spread
    cwac_db: Spread
    qwt_db: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        n_calibration: images that a seed calibrates on; levels of CWAC at its sites and of QwT at its blocks are over
            them, each quarter under the map of the others.
        n_held_out: other images, which taps and full matrices are measured on.
        runs: seed, digest of the images and how many were passed over.
        left_float: from the name of what stays float to the reason.
        sites, blocks, taps: in the order in which they run.
    """

    architecture: str
    scheme: str
    settings: Mapping[str, Any]
    n_calibration: int
    n_held_out: int
    runs: Sequence[Mapping[str, Any]]
    left_float: Mapping[str, str]
    sites: Sequence[SiteDiagnosis]
    blocks: Sequence[BlockDiagnosis]
    taps: Sequence[TapDiagnosis]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: a spread as its mean, range and values, what is not finite as null."""
        lines = {
            part: [{"name": line.name} | {name: _record(spread) for name, spread in _spreads(line)} for line in of_part]
            for part, of_part in (("sites", self.sites), ("blocks", self.blocks), ("taps", self.taps))
        }
        return {field.name: lines.get(field.name, getattr(self, field.name)) for field in fields(self)}

    def to_csv(self) -> str:
        """Return a line for each number of each site, block and tap: mean, range and one column per seed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        seeds = [f"seed {run['seed']}" for run in self.runs]
        writer.writerow(["part", "name", "measure", "mean", "lowest", "highest", *seeds])
        for part, of_part in (("site", self.sites), ("block", self.blocks), ("tap", self.taps)):
            for line in of_part:
                for name, spread in _spreads(line):
                    writer.writerow(
                        [part, csv_cell(line.name), name, spread.mean, spread.lowest, spread.highest, *spread.values]
                    )
        return text.getvalue()


def _spreads(line: SiteDiagnosis | BlockDiagnosis | TapDiagnosis) -> Iterator[tuple[str, Spread]]:
    for field in fields(line):
        value = getattr(line, field.name)
        if isinstance(value, Spread):
            yield field.name, value


def _record(spread: Spread) -> dict[str, Any]:
    return {
        "mean": _finite(spread.mean),
        "lowest": _finite(spread.lowest),
        "highest": _finite(spread.highest),
        "values": [_finite(value) for value in spread.values],
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
