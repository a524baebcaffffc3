"""Measured errors as people read them: the worst channel of a tap, prefix and patch tokens apart."""

from collections.abc import Mapping
from typing import Any


def show_errors(about: Mapping[str, Any]) -> str:
    """Return worst channel and median: `patch 30.4 dB in channel 17, median 30.9; prefix …`, in columns."""
    return "; ".join(f"{part} {_worst(about[part])}" for part in ("patch", "prefix") if part in about)


def _worst(found: Mapping[str, Any]) -> str:
    if found["worst_snr_db"] is None:
        return "nothing lost"
    worst, channel, median = (found[key] for key in ("worst_snr_db", "worst_channel", "median_snr_db"))
    return f"{worst:.1f} dB in channel {channel:<4} median {median:.1f}"


def show_share(share: float) -> str:
    """Return a small share in percent, two digits: `0.042 %`."""
    return f"{100 * share:.2g} %"
