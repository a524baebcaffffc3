"""From features on a device to the stored numbers of a block, in each array's tier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coldtap.pipeline.extract.gather import Gathered
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.codes import MAX_CODE, Escapes
from coldtap.stores.format.tiers import TierName
from coldtap.stores.writing.block import ArrayBuffer, BlockBuffers

# The dtype in torch of tiers whose numbers numpy holds as bits.
VIEWED_AS: Mapping[TierName, torch.dtype] = {"bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaw:
    """Why a row cannot be kept, and the tap at fault."""

    reason: str
    tap: int


class BlockEncoder:
    """Writes gathered batches into the buffers of one block, and keeps their ranges and flaws."""

    def __init__(self, buffers: BlockBuffers, device: torch.device) -> None:
        self._encoders = {
            name: _CodeEncoder(buffer, device) if buffer.spec.kept_as.is_coded else _FloatEncoder(buffer)
            for name, buffer in buffers.items()
        }
        self._ranges: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in buffers}

    def write(self, part: Gathered[ArraySpec], places: Sequence[int], flaws: dict[int, Flaw]) -> None:
        """Encode one tap of one array.

        Args:
            part: what was gathered.
            places: the row of the block of each image of the batch, ascending and consecutive.
            flaws: reasons by image of the batch; images with one are written but not counted.
        """
        encoder = self._encoders[part.spec.name]
        self._note(part, flaws, encoder.limit(part.position or 0))
        values = part.values
        if flaws:  # of a row that will not be there, nothing may escape
            values = values.clone()
            values[list(flaws)] = 0
        encoder.write(values, part.position or 0, places)

    def _note(self, part: Gathered[ArraySpec], flaws: dict[int, Flaw], limit: float) -> None:
        lows, highs = part.low.tolist(), part.high.tolist()
        for image, (low, high) in enumerate(zip(lows, highs, strict=True)):
            if image not in flaws and (flaw := _flaw(part, low, high, limit)):
                flaws[image] = flaw
        kept = [image for image in range(len(lows)) if image not in flaws]
        if kept:
            low, high = self._ranges[part.spec.name].get(part.position or 0, (float("inf"), float("-inf")))
            batch = min(lows[image] for image in kept), max(highs[image] for image in kept)
            self._ranges[part.spec.name][part.position or 0] = min(low, batch[0]), max(high, batch[1])

    def ranges(self) -> dict[str, list[list[float]]]:
        """Return the smallest and largest value of each tap of each array; empty where no row was kept."""
        return {name: [list(taps[p]) for p in sorted(taps)] for name, taps in self._ranges.items()}


def _flaw(part: Gathered[ArraySpec], low: float, high: float, limit: float) -> Flaw | None:
    where = f"{part.spec.gather} at tap {part.tap}"
    if low != low or high != high:
        return Flaw(reason=f"NaN in {where}", tap=part.tap)
    if low == float("-inf") or high == float("inf"):
        return Flaw(reason=f"infinity in {where}", tap=part.tap)
    # Rounding to nearest reaches infinity half a unit above the largest float16.
    if max(-low, high) > limit:
        return Flaw(reason=f"{max(-low, high):.3g} in {where} overflows the {part.spec.tier} tier", tap=part.tap)
    return None


class _FloatEncoder:
    """float32, float16 and bfloat16."""

    def __init__(self, buffer: ArrayBuffer) -> None:
        self._tier, self._exponents = buffer.spec.kept_as, buffer.numbers.exponents
        self._rows = _by_tap(buffer.shard.values)
        if as_bits := VIEWED_AS.get(buffer.spec.tier):
            self._rows = self._rows.view(as_bits)

    def limit(self, place: int) -> float:
        """Return the largest |x| that can be kept."""
        return self._tier.limit(self._exponents[place])

    def write(self, values: Tensor, place: int, rows: Sequence[int]) -> None:
        """Keep the values (batch, token, channel) of one tap."""
        exponent = self._exponents[place]
        target = self._rows[rows[0] : rows[-1] + 1, place]
        scaled = values if exponent == 0 else torch.ldexp(values.float(), torch.tensor(-exponent))
        if scaled.device.type != "cpu":
            scaled = scaled.to(target.dtype)  # half the bytes over the bus
        target.copy_(scaled)


class _CodeEncoder:
    """int8 codes, made on the device that has the features: a quarter of the bytes over the bus.

    The arithmetic is that of `coldtap.stores.format.codes.encode`, bit for bit: float32, division, rounding to nearest
    even.
    """

    def __init__(self, buffer: ArrayBuffer, device: torch.device) -> None:
        scaling = buffer.numbers.scaling
        assert scaling is not None
        self._scale, self._offset = (torch.from_numpy(v).to(device) for v in (scaling.scale, scaling.offset))
        self._codes = _by_tap(buffer.shard.values)
        self._buffer = buffer

    def limit(self, place: int) -> float:
        """Return infinity: every finite value can be kept."""
        return float("inf")

    def write(self, values: Tensor, place: int, rows: Sequence[int]) -> None:
        """Keep the values (batch, token, channel) of one tap."""
        values = values.float()
        steps = (values - self._offset[place]).div_(self._scale[place]).round_()
        # One look at the extremes is cheaper than a mask, and most batches have no escape. A NaN hides them, hence the
        # question is whether all is well.
        if not (float(steps.amax()) <= MAX_CODE and float(steps.amin()) >= -MAX_CODE):
            self._escape(values, steps.abs() > MAX_CODE, place, rows)
            steps.clamp_(-MAX_CODE, MAX_CODE)
        self._codes[rows[0] : rows[-1] + 1, place].copy_(steps.to(torch.int8))

    def _escape(self, values: Tensor, beyond: Tensor, place: int, rows: Sequence[int]) -> None:
        image, token, channel = beyond.nonzero().T.cpu().numpy()
        position = np.stack([image + rows[0], np.full_like(image, place), token, channel], axis=1)
        self._buffer.escape(Escapes(position=position.astype(np.uint32), value=values[beyond].cpu().numpy()))


def _by_tap(values: np.ndarray[Any, Any]) -> Tensor:
    """A block's stored numbers as a tensor that shares them, with a tap axis: (row, tap, token, channel)."""
    tensor = torch.from_numpy(values)
    return tensor if tensor.ndim == 4 else tensor[:, None]
