"""What a run of blocks is given, whichever way it goes: in this process, or on workers."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldtap.pipeline.images.decode_ahead import Decoder
from coldtap.stores.writing.reporting import Reporter
from coldtap.stores.writing.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class BlockRun:
    """The blocks of one job, on their way to one store.

    Attributes:
        decoder: images to pixels.
        writer: the store in the making.
        environment: for the journal.
        fail_on_bad_image: raise at the first bad image instead of rejecting its row.
        reporter: told of rows that are done.
        stop: set when the job must end.
    """

    decoder: Decoder
    writer: StoreWriter
    environment: Mapping[str, Any]
    fail_on_bad_image: bool
    reporter: Reporter
    stop: threading.Event
