"""How a store keeps its values, read back from its own metadata: exponents, scales and the final norm."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.canonical import parse_json
from coldtap.stores.format.codes import Floats, Scaling
from coldtap.stores.format.manifest import FEATURES
from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.tiers import Numbers
from coldtap.stores.storage.contract import Storage

ROOT = f"{FEATURES}/zarr.json"  # written when every array's metadata and scales are there

type Read = Callable[[str], bytes | None]  # the bytes of a file under `features.zarr`, None where there is none


def stored_numbers(storage: Storage, specs: Sequence[ArraySpec]) -> dict[str, Numbers] | None:
    """Return how an unfinished store keeps its values; None where its arrays are not all there yet.

    Raises:
        CorruptStoreError: its metadata is not what the recipe says.
    """
    if storage.stat(ROOT) is None:
        return None
    read, features = read_feature(storage), storage.describe(FEATURES)
    return {spec.name: read_numbers(read, spec, features) for spec in specs}


def read_feature(storage: Storage) -> Read:
    """Return what reads the files below `features.zarr` of an unfinished store, which no manifest lists yet."""

    def read(name: str) -> bytes | None:
        try:
            return storage.get(f"{FEATURES}/{name}")
        except FileNotFoundError:
            return None

    return read


def read_numbers(read: Read, spec: ArraySpec, features: str) -> Numbers:
    """Return how one array keeps its values; errors name the file under `features`.

    Raises:
        CorruptStoreError: a file is missing, or not what the recipe says.
    """
    exponents = read_metadata(read, spec.name, features)["attributes"].get("scale_exponents")
    if not (isinstance(exponents, list) and len(exponents) == len(spec.taps) and all(map(_is_exponent, exponents))):
        raise CorruptStoreError(f"{features}/{spec.name}: its metadata does not give an exponent a tap")
    return Numbers(
        exponents=tuple(exponents), scaling=_scaling(read, spec, features) if spec.kept_as.is_coded else None
    )


def _is_exponent(value: object) -> bool:
    return type(value) is int and 0 <= value < 128


def read_metadata(read: Read, name: str, features: str) -> dict[str, Any]:
    """Return the `zarr.json` of an array or group; errors name the file under `features`.

    Raises:
        CorruptStoreError: it is missing or not of its form.
    """
    data = read(f"{name}/zarr.json")
    try:
        found = parse_json(data or b"")
    except ValueError as error:
        raise CorruptStoreError(f"{features}/{name}/zarr.json is missing or not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("attributes"), dict):
        raise CorruptStoreError(f"{features}/{name}/zarr.json is not the metadata of a coldtap array")
    return found


def _scaling(read: Read, spec: ArraySpec, features: str) -> Scaling:
    shape = len(spec.taps), spec.geometry.channels
    scale, offset = (_values(read, f"scales/{spec.name}/{name}", shape, features) for name in ("scale", "offset"))
    if not (np.isfinite(scale).all() and np.isfinite(offset).all() and (scale > 0).all()):
        raise CorruptStoreError(f"{features}/scales/{spec.name}: a scale is not a positive number")
    return Scaling(scale=scale, offset=offset)


def _values(read: Read, name: str, shape: tuple[int, ...], features: str) -> Floats:
    """A small float32 array of one uncompressed chunk."""
    data = read(f"{name}/c" + "/0" * len(shape))
    if data is None or len(data) != 4 * prod(shape):
        raise CorruptStoreError(f"{features}/{name}: its numbers are missing, or not of shape {shape}")
    return np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)


def read_norm(read: Read, features: str) -> FinalNorm | None:
    """Return the backbone's frozen final norm, or None where it has none; errors name the file under `features`.

    Raises:
        CorruptStoreError: a file is missing, or not that of a norm.
    """
    attributes = read_metadata(read, "norm", features)["attributes"]
    kind, eps = attributes.get("kind"), attributes.get("eps")
    if kind == "none":
        return None
    if kind not in ("layer_norm", "rms_norm") or type(eps) is not float:
        raise CorruptStoreError(f"{features}/norm/zarr.json does not describe a norm")
    weight, bias = (_norm_values(read, name, features) for name in ("weight", "bias"))
    return FinalNorm(kind=kind, eps=eps, weight=weight, bias=bias)


def _norm_values(read: Read, name: str, features: str) -> Floats | None:
    data = read(f"norm/{name}/c/0")
    if data is not None and len(data) % 4:
        raise CorruptStoreError(f"{features}/norm/{name}: {len(data)} bytes are no float32 numbers")
    return None if data is None else np.frombuffer(data, "<f4")
