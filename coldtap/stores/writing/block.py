"""The values of one block in the making: a shard buffer an array, and beside codes what they do not hold."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coldtap.errors import StoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.codes import Encoded, Escapes, Floats
from coldtap.stores.format.shards import Mask, ShardBuffer
from coldtap.stores.format.tiers import Numbers

# Escapes of a block: beyond such a share they take more room than the codes, and beyond such a number a lot of memory.
LARGEST_SHARE = 1 / 32
LARGEST_NUMBER = 2**20


class ArrayBuffer:
    """Room for the rows of one block of one array.

    Attributes:
        spec: the array.
        numbers: how its values are kept.
        shard: stored numbers (row, tap, token, channel), or (row, token, channel).
    """

    def __init__(self, spec: ArraySpec, numbers: Numbers) -> None:
        self.spec, self.numbers = spec, numbers
        self.shard = ShardBuffer(spec)
        self._escapes: list[Escapes] = []

    def put(self, values: Floats, rows: Sequence[int]) -> None:
        """Encode values into some rows of the block.

        Args:
            values: (row, tap, token, channel) float32, finite; a `sum` has one tap.
            rows: their places in the block, ascending and consecutive.
        """
        stored = self.shard.values[rows[0] : rows[-1] + 1]
        numbers, escapes = self.spec.kept_as.encode(values, self.numbers)
        stored[:] = numbers.reshape(stored.shape)
        if escapes is not None:
            self._escape_at(escapes, rows[0])

    def put_codes(self, encoded: Encoded, rows: Sequence[int]) -> None:
        """Keep codes as they are in some rows of an int8 block.

        Args:
            encoded: codes (row, tap, token, channel) made with this array's scaling, and their escapes.
            rows: their places in the block, ascending and consecutive.
        """
        stored = self.shard.values[rows[0] : rows[-1] + 1]
        stored[:] = encoded.codes.reshape(stored.shape)
        self._escape_at(encoded.escapes, rows[0])

    def _escape_at(self, escapes: Escapes, first: int) -> None:
        """Keep escapes whose rows are counted from the block's row `first`."""
        position = escapes.position + np.array([first, 0, 0, 0], np.uint32)
        self.escape(Escapes(position=position, value=escapes.value))

    def escape(self, escapes: Escapes) -> None:
        """Keep values that the codes do not hold; rows are counted within the block.

        Raises:
            StoreError: so many that scales from other rows would serve the block better.
        """
        self._escapes.append(escapes)
        n_escaped = sum(len(some.value) for some in self._escapes)
        n_values = self.spec.block_rows * self.spec.bytes_per_row
        if n_escaped > max(LARGEST_SHARE * n_values, LARGEST_NUMBER):
            _, tap, _, channel = escapes.position[-1]
            raise StoreError(
                f"{self.spec.name}: more than {LARGEST_SHARE:.0%} of a block's values are beyond the reach of int8 "
                f"codes, such as those of channel {channel} at tap {self.spec.taps[tap]}: the first rows, which set "
                "the scales, do not stand for the rest; give a lower `snr`, or `tier='float16'`"
            )

    def take_escapes(self, block: int, present: Mask) -> Escapes:
        """Return the escapes of present rows, ascending, rows counted from the array's first; leaves none behind."""
        position = np.concatenate([np.empty((0, 4), np.uint32), *(escapes.position for escapes in self._escapes)])
        value = np.concatenate([np.empty(0, np.float32), *(escapes.value for escapes in self._escapes)])
        self._escapes.clear()
        order = np.lexsort(position.T[::-1])
        order = order[present[position[order, 0]]]
        first = np.array([block * self.spec.block_rows, 0, 0, 0], np.uint32)
        return Escapes(position=position[order] + first, value=value[order])


type BlockBuffers = Mapping[str, ArrayBuffer]


class SpareBuffers:
    """Buffers of blocks that are written, for the next ones: fresh memory costs more than the copies into it.

    Args:
        new: makes buffers for one block, where none are spare.
    """

    def __init__(self, new: Callable[[], BlockBuffers]) -> None:
        self._new = new
        self._spare: deque[BlockBuffers] = deque()

    def take(self) -> BlockBuffers:
        """Return buffers for one block, with whatever an earlier one left in them."""
        try:
            return self._spare.pop()
        except IndexError:
            return self._new()

    def give_back(self, buffers: BlockBuffers) -> None:
        """Keep the buffers of a block that is written."""
        self._spare.append(buffers)
