"""Numbers as people read them, short enough for a phone; no line ends before a unit."""

from coldtap import text

SPACE = "\N{NO-BREAK SPACE}"


def show_percent(share: float | None) -> str:
    """Return a share in percent: `70.4 %`."""
    return "–" if share is None else f"{100 * share:.1f}{SPACE}%"


def show_bytes(n_bytes: float | None) -> str:
    """Return bytes in decimal units, three digits: `582 MB`."""
    return "–" if n_bytes is None else _unbroken(text.show_bytes(n_bytes))


def show_count(count: float) -> str:
    """Return a count in three digits: `126 k`."""
    return _unbroken(text.show_scaled(count, ("", "k", "M", "G")))


def show_seconds(seconds: float | None) -> str:
    """Return `0.25 s`, `45 s`, `12 min`, `3 h 20 min`."""
    return "–" if seconds is None else _unbroken(text.show_seconds(seconds))


def _unbroken(shown: str) -> str:
    return shown.replace(" ", SPACE)
