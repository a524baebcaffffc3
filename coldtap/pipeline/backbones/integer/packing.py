"""Codes at their own width: b bits each, one after another, lowest bits first."""

import math

import numpy as np
import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes of any shape into ⌈n · bits / 8⌉ bytes; each code as two's complement of `bits` bits."""
    flat = codes.reshape(-1).numpy().view(np.uint8)
    if bits == 8:
        return torch.from_numpy(flat.copy())
    planes = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return the int8 codes of `pack`.

    Raises:
        ValueError: there are more or fewer bytes than that shape takes.
    """
    n = math.prod(shape)
    data = packed.numpy()
    if data.shape != (-(-n * bits // 8),):
        raise ValueError(f"{data.size} bytes for {n} codes of {bits} bits")
    if bits == 8:
        return torch.from_numpy(data.view(np.int8).copy()).reshape(shape)
    planes = np.unpackbits(data, count=n * bits, bitorder="little").reshape(n, bits)
    codes = (planes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.int16)
    codes -= (codes >> (bits - 1)) << bits  # two's complement
    return torch.from_numpy(codes.astype(np.int8)).reshape(shape)
