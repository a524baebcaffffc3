"""The Zarr v3 metadata of a store, made by zarr-python in memory and placed by us, durably.

zarr-python decides every byte of each `zarr.json`; coldtap adds attributes. All groups have one.
"""

import json
from collections.abc import Mapping, Sequence

import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from coldtap.stores.arrays import ArraySpec
from coldtap.stores.manifest import FEATURES
from coldtap.stores.norm import FinalNorm
from coldtap.stores.recipe import Recipe


def static_files(
    recipe: Recipe,
    specs: Sequence[ArraySpec],
    n_rows: int,
    exponents: Mapping[str, Sequence[int]],
    norm: FinalNorm | None,
) -> dict[str, bytes]:
    """Every file of `features.zarr` that is no shard, by its path under the store."""
    memory = MemoryStore()
    root = zarr.create_group(memory, attributes={"coldtap": recipe.to_dict()})
    for spec in specs:
        _require_groups(root, spec.name)
        _create_array(root, spec, n_rows, exponents[spec.name])
    _create_norm(root, norm)
    prototype = default_buffer_prototype()
    names = [f"{FEATURES}/{key}" for key in sorted(memory._store_dict)]
    return {
        name: _readable(name, sync(memory.get(name.removeprefix(f"{FEATURES}/"), prototype)).to_bytes())  # type: ignore[union-attr]
        for name in names
    }


def _readable(name: str, data: bytes) -> bytes:
    return data if not name.endswith("zarr.json") else json.dumps(json.loads(data), indent=1).encode() + b"\n"


def _require_groups(root: zarr.Group, array: str) -> None:
    parts = array.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        root.require_group("/".join(parts[:depth]))


def _create_array(root: zarr.Group, spec: ArraySpec, n_rows: int, exponents: Sequence[int]) -> None:
    # A missing chunk (an absent row) reads as NaN in any Zarr reader, never as zeros; 0xFFFF is a NaN of bfloat16.
    fill: float | int = 0xFFFF if spec.tier == "bfloat16" else float("nan")
    root.create_array(
        spec.name,
        shape=(n_rows, *spec.row_shape),
        chunks=spec.shard_shape,
        dtype=spec.dtype,
        serializer=ShardingCodec(
            chunk_shape=spec.chunk_shape,
            codecs=[BytesCodec(endian="little"), Crc32cCodec()],
            subchunk_write_order="lexicographic",
        ),
        compressors=None,
        filters=None,
        fill_value=fill,
        dimension_names=spec.dimensions,
        attributes={
            "gather": spec.gather,
            "taps": list(spec.taps),
            "tier": spec.tier,
            "block_rows": spec.block_rows,
            "scale_exponents": list(exponents),
            **spec.geometry.to_dict(),
        },
    )


def _create_norm(root: zarr.Group, norm: FinalNorm | None) -> None:
    if norm is None:
        root.create_group("norm", attributes={"kind": "none"})
        return
    group = root.create_group("norm", attributes={"kind": norm.kind, "eps": norm.eps})
    for name, values in (("weight", norm.weight), ("bias", norm.bias)):
        if values is not None:
            group.create_array(
                name,
                data=values,
                compressors=None,
                dimension_names=("channel",),
                config={"write_empty_chunks": True},
            )
