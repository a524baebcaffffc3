"""What people read: bytes, seconds and counts, lists cut short, and tables, as plain text."""

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

FORMULA_STARTS = ("=", "+", "-", "@", "'")


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


def printable(text: str) -> str:
    r"""Return a text that a terminal shows as it is, on one line.

    Control characters, line ends among them, marks that turn the direction of writing, and bytes of a path that are
    no UTF-8 are shown as escapes: `\x1b`, `\n`, `\u202e`, `\udcff`.
    """
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    # Spaces of other scripts are not "printable" to Python, and do no harm.
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def csv_cell(text: str) -> str:
    """Return a text for a cell of CSV: printable, and no formula to a spreadsheet.

    A text that begins with `=`, `+`, `-`, `@` or an apostrophe gets an apostrophe in front, unless it is a number; take
    one away from a cell that begins with an apostrophe to have the text again.
    """
    shown = printable(text)
    return f"'{shown}" if shown[:1] in FORMULA_STARTS and shown and not _is_number(shown) else shown


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]], *, numbers_right: bool = False) -> str:
    """Return a table with columns as wide as their widest cell; empty columns are left out.

    Args:
        header: A name per column.
        lines: The cells of each line.
        numbers_right: Whether all columns but the first stand to the right.
    """
    shown = [[printable(cell) for cell in line] for line in (header, *lines)]
    columns = [column for column in zip(*shown, strict=True) if not lines or any(column[1:])]
    padded = []
    for number, column in enumerate(columns):
        width = max(map(len, column))
        padded.append([cell.rjust(width) if numbers_right and number else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))
