"""Before the job starts: how many bytes, how long, and whether they fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coldtap.errors import MachineError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunk_digests import LISTED_BYTES
from coldtap.stores.format.chunks import CRC_BYTES
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.shards import ENTRY_BYTES
from coldtap.stores.storage.contract import Storage

# Ids, digests and places in samples.parquet, and one line of the journal; a test holds the forecast within 3 %.
BYTES_PER_ROW_BESIDE = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is left to do.

    Attributes:
        n_rows: rows to extract.
        n_bytes: bytes to write.
        seconds: time to take, at the calibration's rate.
        free_bytes: free space where the store will be; None where nobody says.
    """

    n_rows: int
    n_bytes: int
    seconds: float
    free_bytes: int | None


def forecast(
    storage: Storage,
    specs: Sequence[ArraySpec],
    plan: RowPlan,
    blocks: Sequence[int],
    rows_per_second: float,
    compressed: Mapping[str, float],
) -> Forecast:
    """Forecast the blocks that are still to be done.

    `compressed` is the share of its bytes that compression leaves of each `compact` array.
    """
    n_rows = sum(len(plan.block(block)) for block in blocks)
    per_row = BYTES_PER_ROW_BESIDE + sum(
        compressed.get(spec.name, 1) * spec.bytes_per_row + spec.chunks_per_row * CRC_BYTES for spec in specs
    )
    per_block = sum(spec.block_rows * spec.chunks_per_row * (ENTRY_BYTES + LISTED_BYTES) + CRC_BYTES for spec in specs)
    return Forecast(
        n_rows=n_rows,
        n_bytes=round(n_rows * per_row) + len(blocks) * per_block,
        seconds=n_rows / rows_per_second,
        free_bytes=storage.free_bytes(),
    )


def require_space(storage: Storage, forecast: Forecast) -> None:
    """Refuse to start what cannot fit.

    Raises:
        MachineError: naming both sizes.
    """
    if forecast.free_bytes is not None and forecast.n_bytes > forecast.free_bytes:
        raise MachineError(
            f"{storage} needs {forecast.n_bytes / 1e6:,.3f} MB and {forecast.free_bytes / 1e6:,.3f} MB are free there: "
            "free some space, choose another path, or keep less (`taps`, `gather`, `tier`)"
        )
