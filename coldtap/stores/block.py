"""The values of one block in the making: a shard buffer an array, and beside codes what they do not hold."""

from collections.abc import Mapping, Sequence

import numpy as np

from coldtap.stores.arrays import ArraySpec
from coldtap.stores.codes import Encoded, Escapes, Floats, encode
from coldtap.stores.shards import Mask, ShardBuffer
from coldtap.stores.tiers import Numbers, to_float


class ArrayBuffer:
    """Room for the rows of one block of one array.

    Attributes:
        spec: the array.
        numbers: how its values are kept.
        shard: stored numbers (row, tap, token, channel), or (row, token, channel).
        escapes: what codes do not hold; rows are counted within the block.
    """

    def __init__(self, spec: ArraySpec, numbers: Numbers) -> None:
        self.spec, self.numbers = spec, numbers
        self.shard = ShardBuffer(spec)
        self.escapes: list[Escapes] = []

    def put(self, values: Floats, rows: Sequence[int]) -> None:
        """Encode values into some rows of the block.

        Args:
            values: (row, tap, token, channel) float32, finite; a `sum` has one tap.
            rows: their places in the block, ascending and consecutive.
        """
        stored = self.shard.values[rows[0] : rows[-1] + 1]
        if self.spec.tier != "int8":
            stored[:] = to_float(values, self.spec.tier, self.numbers.exponents).reshape(stored.shape)
            return
        assert self.numbers.scaling is not None
        self.put_codes(encode(values, self.numbers.scaling), rows)

    def put_codes(self, encoded: Encoded, rows: Sequence[int]) -> None:
        """Keep codes as they are in some rows of an int8 block.

        Args:
            encoded: codes (row, tap, token, channel) made with this array's scaling, and their escapes.
            rows: their places in the block, ascending and consecutive.
        """
        stored = self.shard.values[rows[0] : rows[-1] + 1]
        stored[:] = encoded.codes.reshape(stored.shape)
        position = encoded.escapes.position + np.array([rows[0], 0, 0, 0], np.uint32)
        self.escapes.append(Escapes(position=position, value=encoded.escapes.value))

    def take_escapes(self, block: int, present: Mask) -> Escapes:
        """The escapes of present rows, ascending, rows counted from the array's first; leaves none behind."""
        position = np.concatenate([np.empty((0, 4), np.uint32), *(escapes.position for escapes in self.escapes)])
        value = np.concatenate([np.empty(0, np.float32), *(escapes.value for escapes in self.escapes)])
        self.escapes.clear()
        order = np.lexsort(position.T[::-1])
        order = order[present[position[order, 0]]]
        first = np.array([block * self.spec.block_rows, 0, 0, 0], np.uint32)
        return Escapes(position=position[order] + first, value=value[order])


type BlockBuffers = Mapping[str, ArrayBuffer]
