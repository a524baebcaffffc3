"""What a caching job tells at its end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coldtap.stores.storage.contract import Storage
from coldtap.stores.writing.forecast import Forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """How a job ended.

    Attributes:
        store: where the store is: its path, or its storage.
        status: `written`; `unchanged` where it was complete already; `relabelled` where only targets were new;
            `forecast` after a dry run.
        digest: SHA-256 of the manifest; None after a dry run.
        n_rows: rows that are there.
        n_rejected: rows that are not.
        forecast: what was left to do when the job began; None where there was nothing.
    """

    store: Path | Storage
    status: Literal["written", "unchanged", "relabelled", "forecast"]
    digest: str | None
    n_rows: int
    n_rejected: int
    forecast: Forecast | None
