"""What a command prints: lines of text in which nothing from a file can move the cursor or pose as another line."""

import sys

from coldtap.text import printable


def say(*lines: str, err: bool = False) -> None:
    """Print lines to standard output, or to standard error; what is not printable in them is shown as an escape."""
    print("\n".join(map(printable, lines)), file=sys.stderr if err else sys.stdout, flush=err)
