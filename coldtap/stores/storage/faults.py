"""Named places where a test can kill the process, to show that a death there loses nothing.

    COLDTAP_FAULT=shard-renamed:3 cache-features …

dies by SIGKILL at the third time that the job passes `shard-renamed`. Unset, a fault point costs one look-up.
"""

import os
import signal
from collections import Counter

FAULT_POINTS = (
    "recipe-written",
    "array-created",
    "arrays-created",
    "shard-temporary",
    "shard-renamed",
    "digests-renamed",
    "escapes-renamed",
    "block-renamed",
    "journal-written",
    "index-written",
    "manifest-temporary",
)
_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Die here if the environment asks for it."""
    asked = os.environ.get("COLDTAP_FAULT")
    if asked is None:
        return
    point, _, count = asked.partition(":")
    if point == name:
        _passed[name] += 1
        if _passed[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
