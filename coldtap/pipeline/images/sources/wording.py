"""How messages cut long lists."""

from collections.abc import Collection, Iterable
from itertools import islice


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
