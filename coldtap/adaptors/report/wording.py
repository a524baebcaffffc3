"""Numbers as people read them, short enough for a phone; no line ends before a unit."""

SPACE = "\N{NO-BREAK SPACE}"


def show_percent(share: float | None) -> str:
    """`70.4 %`."""
    return "–" if share is None else f"{100 * share:.1f}{SPACE}%"


def show_bytes(n_bytes: float | None) -> str:
    """Decimal units, three digits: `582 MB`."""
    return "–" if n_bytes is None else _scaled(n_bytes, ("B", "kB", "MB", "GB", "TB"))


def show_count(count: float) -> str:
    """Three digits: `126 k`."""
    return _scaled(count, ("", "k", "M", "G"))


def show_seconds(seconds: float | None) -> str:
    """`0.25 s`, `45 s`, `12 min`, `3 h 20 min`."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.2g}{SPACE}s" if seconds < 10 else f"{seconds:.0f}{SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes}{SPACE}min" if minutes < 90 else f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < 999.5:  # 999.6 would read 1e+03
            return f"{number:.3g}{SPACE}{unit}".rstrip()
        number /= 1000
    return f"{number:.3g}{SPACE}{units[-1]}"
