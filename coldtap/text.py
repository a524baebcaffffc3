"""What people read: bytes, seconds and counts, lists cut short, and tables, as plain text."""

from collections.abc import Collection, Iterable, Sequence
from itertools import islice


def show_bytes(n_bytes: float) -> str:
    """Return bytes in decimal units, three digits: `582 MB`."""
    return show_scaled(n_bytes, ("B", "kB", "MB", "GB", "TB"))


def show_seconds(seconds: float) -> str:
    """Return `0.25 s`, `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def show_scaled(number: float, units: Sequence[str]) -> str:
    """Return a number in three digits and the first of its units, each a thousand of the one before, that suits it."""
    for unit in units[:-1]:
        if number < 999.5:  # 999.6 in three digits would read 1e+03
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    return f"{number:{'.3g' if number < 999.5 else '.0f'}} {units[-1]}"


def a_few(items: Collection[object], limit: int = 5) -> str:
    """Return the first items, and how many more there are: `a, b, c … and 4 more`."""
    return a_few_of(items, len(items), limit)


def a_few_of(items: Iterable[object], count: int, limit: int = 5) -> str:
    """Return the first of `count` items that need not all be at hand."""
    shown = ", ".join(str(item) for item in islice(items, limit))
    return f"{shown} … and {count - limit} more" if count > limit else shown


def images(count: int) -> str:
    """Return `1 image`, `2 images`."""
    return f"{count} image" if count == 1 else f"{count} images"


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]], *, numbers_right: bool = False) -> str:
    """Return a table with columns as wide as their widest cell; empty columns are left out.

    Args:
        header: A name per column.
        lines: The cells of each line.
        numbers_right: Whether all columns but the first stand to the right.
    """
    columns = [column for column in zip(header, *lines, strict=True) if not lines or any(column[1:])]
    padded = []
    for number, column in enumerate(columns):
        width = max(map(len, column))
        padded.append([cell.rjust(width) if numbers_right and number else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))
