"""From features on a device to the bytes of a block, in the store's tier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldtap.pipeline.gather import Gathered
from coldtap.stores.arrays import Tier
from coldtap.stores.shards import ShardBuffer
from coldtap.stores.tiers import FLOAT16_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaw:
    """Why a row cannot be kept, and the tap at fault."""

    reason: str
    tap: int


class BlockEncoder:
    """Writes gathered batches into the buffers of one block, and keeps their ranges and flaws.

    `exponents` are those of each array's taps; they are zero outside float16.
    """

    def __init__(self, buffers: Mapping[str, ShardBuffer], tier: Tier, exponents: Mapping[str, Sequence[int]]) -> None:
        self._views = {name: _as_tensor(buffer, tier) for name, buffer in buffers.items()}
        self._tier = tier
        self._exponents = exponents
        self._ranges: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in buffers}

    def write(self, part: Gathered, places: Sequence[int], flaws: dict[int, Flaw]) -> None:
        """Encode one tap of one array.

        Args:
            part: what was gathered.
            places: the row of the block of each image of the batch, ascending and consecutive.
            flaws: reasons by image of the batch; images with one are written but not counted.
        """
        exponent = self._exponents[part.array][part.position or 0]
        self._note(part, flaws, exponent)
        rows = self._views[part.array][places[0] : places[-1] + 1]
        target = rows if part.position is None else rows[:, part.position]
        values = part.values if exponent == 0 else torch.ldexp(part.values.float(), torch.tensor(-exponent))
        if values.device.type != "cpu":
            values = values.to(target.dtype)  # half the bytes over the bus
        target.copy_(values)

    def _note(self, part: Gathered, flaws: dict[int, Flaw], exponent: int) -> None:
        limit = FLOAT16_MAX * 2.0**exponent if self._tier == "float16" else float("inf")
        lows, highs = part.low.tolist(), part.high.tolist()
        for image, (low, high) in enumerate(zip(lows, highs, strict=True)):
            if image not in flaws and (flaw := _flaw(part, low, high, limit)):
                flaws[image] = flaw
        kept = [image for image in range(len(lows)) if image not in flaws]
        if kept:
            low, high = self._ranges[part.array].get(part.position or 0, (float("inf"), float("-inf")))
            batch = min(lows[image] for image in kept), max(highs[image] for image in kept)
            self._ranges[part.array][part.position or 0] = min(low, batch[0]), max(high, batch[1])

    def ranges(self) -> dict[str, list[list[float]]]:
        """Smallest and largest value of each tap of each array; empty where no row was kept."""
        return {name: [list(taps[p]) for p in sorted(taps)] for name, taps in self._ranges.items()}


def _flaw(part: Gathered, low: float, high: float, limit: float) -> Flaw | None:
    where = f"{part.array.split('/')[0]} at tap {part.tap}"
    if low != low or high != high:
        return Flaw(reason=f"NaN in {where}", tap=part.tap)
    if low == float("-inf") or high == float("inf"):
        return Flaw(reason=f"infinity in {where}", tap=part.tap)
    # Rounding to nearest reaches infinity half a unit above the largest float16.
    if max(-low, high) > limit:
        return Flaw(reason=f"{max(-low, high):.3g} in {where} overflows the float16 tier", tap=part.tap)
    return None


def _as_tensor(buffer: ShardBuffer, tier: Tier) -> Tensor:
    """The buffer's values as a tensor that shares them: (row, …), bfloat16 where the bits are."""
    values = torch.from_numpy(buffer.values)
    return values.view(torch.bfloat16) if tier == "bfloat16" else values
