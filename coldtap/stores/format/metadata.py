"""The Zarr v3 metadata of a store, and its small arrays: made by zarr-python in memory, placed by us, durably.

zarr-python decides every byte of each `zarr.json`; coldtap adds attributes. All groups have one.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunks import ZSTD_LEVEL
from coldtap.stores.format.codes import SCALE_OF_STEP, Floats, Scaling
from coldtap.stores.format.escapes import CHUNK, NOWHERE
from coldtap.stores.format.manifest import FEATURES
from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.tiers import Numbers


def static_files(
    recipe: Recipe,
    specs: Sequence[ArraySpec],
    n_rows: int,
    numbers: Mapping[str, Numbers],
    norm: FinalNorm | None,
) -> dict[str, bytes]:
    """Return every file of `features.zarr` that is there before the first block, by its path under the store."""
    memory = MemoryStore()
    root = zarr.create_group(memory, attributes={"coldtap": recipe.to_dict()})
    for spec in specs:
        _require_groups(root, spec.name)
        _create_array(root, spec, n_rows, numbers[spec.name])
        if scaling := numbers[spec.name].scaling:
            _create_scales(root, spec, scaling)
    _create_norm(root, norm)
    return _files_of(memory)


def escape_files(specs: Sequence[ArraySpec], n_blocks: int, n_chunks: Mapping[str, int]) -> dict[str, bytes]:
    """Return the metadata of the arrays of escapes, whose length is known when every block is done.

    Args:
        specs: the int8 arrays.
        n_blocks: blocks of the store.
        n_chunks: of each array's longest list.
    """
    memory = MemoryStore()
    root = zarr.create_group(memory)
    for spec in specs:
        _require_groups(root, f"escapes/{spec.name}/value")
        _create_escapes(root, spec, n_blocks, n_chunks[spec.name])
    files = _files_of(memory)
    del files[f"{FEATURES}/zarr.json"]
    return files


def _files_of(memory: MemoryStore) -> dict[str, bytes]:
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


def _create_array(root: zarr.Group, spec: ArraySpec, n_rows: int, numbers: Numbers) -> None:
    compressed = [ZstdCodec(level=ZSTD_LEVEL)] if spec.layout == "compact" else []
    root.create_array(
        spec.name,
        shape=(n_rows, *spec.row_shape),
        chunks=spec.shard_shape,
        dtype=spec.dtype,
        serializer=ShardingCodec(
            chunk_shape=spec.chunk_shape,
            codecs=[BytesCodec(endian="little"), *compressed, Crc32cCodec()],
            subchunk_write_order="lexicographic",
        ),
        compressors=None,
        filters=None,
        fill_value=spec.kept_as.fill_value,
        dimension_names=spec.dimensions,
        attributes={
            "gather": spec.gather,
            "taps": list(spec.taps),
            "tier": spec.tier,
            "layout": spec.layout,
            "block_rows": spec.block_rows,
            "scale_exponents": list(numbers.exponents),
            **spec.geometry.to_dict(),
        },
    )


def _create_scales(root: zarr.Group, spec: ArraySpec, scaling: Scaling) -> None:
    group = root.require_group("scales")
    for part in spec.name.split("/"):
        group = group.require_group(part)
    group.attrs.update({"of": spec.name, "largest_error_of_scale": 1 / SCALE_OF_STEP / 2})
    for name, values in (("scale", scaling.scale), ("offset", scaling.offset)):
        _create_values(group, name, values, ("tap", "channel"))


def _create_escapes(root: zarr.Group, spec: ArraySpec, n_blocks: int, n_chunks: int) -> None:
    """Create the two arrays' metadata; `n_chunks` is the number of chunks of the longest list."""
    codecs = [ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()]
    n_axes = len(spec.dimensions)
    for name, axes, dtype, fill in (("position", (n_axes,), "<u4", NOWHERE), ("value", (), "<f4", float("nan"))):
        root.create_array(
            f"escapes/{spec.name}/{name}",
            shape=(n_blocks, n_chunks * CHUNK, *axes),
            chunks=(1, CHUNK, *axes),
            dtype=dtype,
            serializer=BytesCodec(endian="little"),
            compressors=codecs,
            filters=None,
            fill_value=fill,
            dimension_names=("block", "escape", "axis")[: 2 + len(axes)],
            attributes={"of": spec.name, "axes": list(spec.dimensions)},
        )


def _create_norm(root: zarr.Group, norm: FinalNorm | None) -> None:
    if norm is None:
        root.create_group("norm", attributes={"kind": "none"})
        return
    group = root.create_group("norm", attributes={"kind": norm.kind, "eps": norm.eps})
    for name, values in (("weight", norm.weight), ("bias", norm.bias)):
        if values is not None:
            _create_values(group, name, values, ("channel",))


def _create_values(group: zarr.Group, name: str, values: Floats, dimensions: tuple[str, ...]) -> None:
    group.create_array(
        name,
        data=np.asarray(values, "<f4"),
        chunks=values.shape,
        compressors=None,
        dimension_names=dimensions,
        config={"write_empty_chunks": True},
    )
