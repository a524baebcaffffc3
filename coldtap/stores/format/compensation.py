"""A store's compensations: `compensation/NAME.safetensors`, maps that bring its features near to a float backbone's.

    y = offset + scale · x      x a value of the store, with a scale and an offset a tap and channel of an array

One safetensors file holds `<array>/scale` and `<array>/offset`, float32 (tap, channel), of each array that has a map; a
`sum` has one tap there, as in `scales/`. The header's `coldtap` says in JSON on what the maps were fitted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.canonical import canonical_json, parse_json, safetensors_header
from coldtap.stores.format.codes import Floats

COMPENSATION = "compensation"
SUFFIX = ".safetensors"
FITTED = {"float_store", "store", "split", "rows", "samples", "ridge", "gate", "gain"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TapMaps:
    """y = offset + scale · x of some taps of an array; both (tap, channel) float32, the scale positive."""

    scale: Floats
    offset: Floats

    def of_places(self, places: list[int]) -> "TapMaps":
        """Return the maps of some taps, by their places along the tap axis, in the order given."""
        return TapMaps(scale=self.scale[places], offset=self.offset[places])


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """Maps of some arrays of a store.

    Attributes:
        name: as the store calls it.
        maps: by array, of all its taps.
        fitted: on which rows of which float store, how, and with what gain (`docs/format.md`).
    """

    name: str
    maps: Mapping[str, TapMaps]
    fitted: Mapping[str, Any]


def compensation_file(name: str) -> str:
    """Path of a compensation's file under the store."""
    return f"{COMPENSATION}/{name}{SUFFIX}"


def compensation_bytes(maps: Mapping[str, TapMaps], fitted: Mapping[str, Any]) -> bytes:
    """Return the bytes of a compensation's file: equal maps and equal records give equal bytes."""
    tensors = {f"{array}/{part}": getattr(of, part) for array, of in maps.items() for part in ("scale", "offset")}
    # One key of metadata alone: safetensors keeps several in no fixed order.
    return save(tensors, {"coldtap": canonical_json(fitted).decode()})


def parse_compensation(data: bytes, name: str, arrays: Mapping[str, ArraySpec], where: str) -> Compensation:
    """Return a compensation from its file.

    Args:
        data: the file's bytes.
        name: of the compensation.
        arrays: those of the store, by name.
        where: the file, for errors.

    Raises:
        CorruptStoreError: it is not such a file, or has a map that fits no array of the store.
    """
    try:
        tensors = load(data)
        fitted = parse_json(safetensors_header(data)["__metadata__"]["coldtap"].encode())
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"{where} is not the file of a compensation ({error!r})") from error
    if not (isinstance(fitted, dict) and {*fitted} >= FITTED):
        raise CorruptStoreError(f"{where} does not say on what it was fitted")
    names = sorted({tensor.rpartition("/")[0] for tensor in tensors})
    if sorted(tensors) != sorted(f"{array}/{part}" for array in names for part in ("scale", "offset")) or not names:
        raise CorruptStoreError(f"{where} has tensors {sorted(tensors)}; expected a scale and an offset an array")
    return Compensation(
        name=name, maps={array: _maps(tensors, array, arrays.get(array), where) for array in names}, fitted=fitted
    )


def _maps(tensors: Mapping[str, np.ndarray[Any, Any]], array: str, spec: ArraySpec | None, where: str) -> TapMaps:
    if spec is None:
        raise CorruptStoreError(f"{where} has a map of {array}, which is no array of this store")
    shape = len(spec.taps), spec.geometry.channels
    scale, offset = (tensors[f"{array}/{part}"] for part in ("scale", "offset"))
    if not all(values.shape == shape and values.dtype == np.float32 for values in (scale, offset)):
        raise CorruptStoreError(f"{where}: the map of {array} is not float32 of shape {shape}")
    if not (np.isfinite(scale).all() and np.isfinite(offset).all() and (scale > 0).all()):
        raise CorruptStoreError(f"{where}: a scale of {array} is not a positive number")
    return TapMaps(scale=scale, offset=offset)
