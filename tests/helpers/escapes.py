"""The escapes of a block as docs/format.md has a stranger read them."""

import numpy as np


def escapes_of(store, name, block, block_rows, n_taps):
    """Each segment that is not empty: row of the array, place of the tap, flat positions (token, channel), values."""
    path = store / "escapes" / name / str(block)
    if not path.exists():
        return
    words = np.fromfile(path, "<u4")
    counts, rest = words[: block_rows * n_taps], words[block_rows * n_taps :]
    for number, n in enumerate(counts.tolist()):
        segment, rest = rest[: 2 * n], rest[2 * n :]
        if n:
            row, place = divmod(number, n_taps)
            yield block * block_rows + row, place, segment[:n], segment[n:].view("<f4")
    assert len(rest) == 0
