"""What is written is what every reader reads: coldtap, zarr-python and TensorStore."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from coldtap.errors import IncompleteStoreError, MissingFeaturesError, StoreError
from coldtap.stores import open_store
from coldtap.stores.format.arrays import choose_block_rows
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.shards import ShardBuffer
from tests.helpers.synthetic import GEOMETRY, encode, gathered, synthetic_store

TIERS = ("float32", "float16", "bfloat16")
SPLITS = ["train"] * 11 + ["val"] * 5 + ["test"] * 6
TARGETS = [i % 3 for i in range(22)]


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((22, 4, GEOMETRY.tokens, GEOMETRY.channels)).astype(np.float32)


def _restored(values, tier):
    stored = encode(values, tier)
    if tier == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


@pytest.mark.parametrize("tier", TIERS)
def test_rows_come_back_in_any_order_with_any_taps(tmp_path, features, tier):
    synthetic_store(tmp_path / "s", features, TARGETS, SPLITS, tier=tier, block_rows=4)
    store = open_store(tmp_path / "s")
    rows = np.concatenate([store.rows("test"), store.rows("train")[::-1], store.rows("val")])
    samples = [int(name[-3:]) for name in store.sample_ids(rows)]
    assert sorted(samples) == list(range(22))
    np.testing.assert_array_equal(store.targets(rows), [TARGETS[i] for i in samples])
    layers = store.arrays["layers/g2x3-p1-c8"]
    for taps in ([0, 1, 2, 3], [2], [3, 1], [0, 1, 3]):
        out = np.full((22, len(taps), 7, 8), np.nan, np.float32)
        layers.read_into(out, rows, taps)
        np.testing.assert_array_equal(out, _restored(features[samples][:, taps], tier))
    for name in ("sum/g2x3-p1-c8/3", "pooled/g2x3-p1-c8"):
        array = store.arrays[name]
        out = np.empty((22, *array.row_shape), np.float32)
        array.read_into(out, rows)
        np.testing.assert_array_equal(
            out, _restored(np.stack([gathered(array.spec, features[i]) for i in samples]), tier)
        )


@pytest.mark.parametrize("tier", TIERS)
def test_zarr_and_tensorstore_read_every_array(tmp_path, features, tier):
    synthetic_store(tmp_path / "s", features, TARGETS, SPLITS, tier=tier, block_rows=4, rejected=[3])
    store = open_store(tmp_path / "s")
    group = zarr.open_group(tmp_path / "s/features.zarr", mode="r")
    assert group.attrs["coldtap"]["address"] == store.recipe.address
    rows = np.concatenate([store.rows(split) for split in ("train", "val", "test")])
    samples = [int(name[-3:]) for name in store.sample_ids(rows)]
    for name, array in store.arrays.items():
        expected = encode(np.stack([gathered(array.spec, features[i]) for i in samples]), tier)
        ours = group[name]
        assert ours.metadata.dimension_names == array.spec.dimensions
        np.testing.assert_array_equal(ours[:][rows], expected)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s/features.zarr" / name)}}
        other = tensorstore.open(spec).result()
        assert other.domain.labels == array.spec.dimensions
        np.testing.assert_array_equal(other.read().result()[rows], expected)
        absent = np.setdiff1d(np.arange(array.n_rows), rows)
        missing = _restored_bits(ours[:][absent], tier)
        assert np.isnan(missing).all(), "an absent row must never read as numbers"


def _restored_bits(stored, tier):
    return (stored.astype(np.uint32) << 16).view(np.float32) if tier == "bfloat16" else stored


def test_every_group_and_array_has_metadata_without_unregistered_codecs(tmp_path, features):
    synthetic_store(tmp_path / "s", features, TARGETS, SPLITS)
    root = tmp_path / "s/features.zarr"
    folders = {path.parent for path in root.rglob("*") if path.parent.name != "c" and "/c/" not in f"{path}/"}
    assert {folder for folder in folders if not (folder / "zarr.json").exists()} == set()
    named = json.dumps([json.loads(path.read_text()) for path in root.rglob("zarr.json")])
    assert "numcodecs" not in named


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("gather", ["layers", "sum", "pooled"])
def test_shard_bytes_are_those_that_zarr_writes_in_lexicographic_order(tmp_path, features, tier, gather):
    gathers = {gather: [3] if gather == "sum" else [0, 2, 3]}
    writer = synthetic_store(tmp_path / "s", features, TARGETS, SPLITS, tier=tier, gathers=gathers, block_rows=4)
    spec = writer.specs[0]
    buffer = ShardBuffer(spec)
    values = encode(np.stack([gathered(spec, features[i]) for i in range(4)]), tier)
    buffer.values[:] = values
    sealed = buffer.seal(np.ones(4, bool))
    theirs = zarr.create_array(
        tmp_path / "z",
        shape=spec.shard_shape,
        chunks=spec.shard_shape,
        dtype=spec.dtype,
        serializer=ShardingCodec(
            chunk_shape=spec.chunk_shape,
            codecs=[BytesCodec(endian="little"), Crc32cCodec()],
            subchunk_write_order="lexicographic",
        ),
        compressors=None,
        fill_value=7,
        config={"write_empty_chunks": True},
    )
    theirs[:] = values
    shard = next(path for path in (tmp_path / "z/c").rglob("*") if path.is_file())
    assert shard.read_bytes() == b"".join(sealed.pieces)
    assert len(b"".join(sealed.pieces)) == sealed.whole.n_bytes


def test_taps_of_one_row_lie_in_one_run(tmp_path, features):
    synthetic_store(tmp_path / "s", features, TARGETS, SPLITS, block_rows=4)
    shard = (tmp_path / "s/features.zarr/layers/g2x3-p1-c8/c/0/0/0/0").read_bytes()
    store = open_store(tmp_path / "s")
    first = int(store.sample_ids([0])[0][-3:])
    chunk = 7 * 8 * 4 + 4
    for tap in range(4):
        stored = np.frombuffer(shard[tap * chunk : (tap + 1) * chunk - 4], np.float32).reshape(7, 8)
        np.testing.assert_array_equal(stored, features[first, tap])


def test_absent_rows_are_an_error_never_zeros(tmp_path, features):
    synthetic_store(tmp_path / "s", features, TARGETS, SPLITS, block_rows=4, rejected=[2])
    store = open_store(tmp_path / "s")
    array = store.arrays["sum/g2x3-p1-c8/3"]
    present = {int(row) for split in ("train", "val", "test") for row in store.rows(split)}
    assert len(present) == 21
    for row in sorted(set(range(array.n_rows)) - present):
        with pytest.raises(StoreError, match=r"no chunk|missing"):
            array.read_into(np.empty((1, 7, 8), np.float32), [row])
        with pytest.raises(MissingFeaturesError, match=f"no row {row}"):
            store.sample_ids([row])
    with pytest.raises(MissingFeaturesError, match="row 999 was asked for"):
        array.read_into(np.empty((1, 7, 8), np.float32), [999])


def test_a_store_without_manifest_is_refused(tmp_path, features):
    synthetic_store(tmp_path / "s", features, TARGETS, SPLITS, blocks=[0], finish=False)
    with pytest.raises(IncompleteStoreError, match="run the same `cache-features` command again"):
        open_store(tmp_path / "s")


def test_views_belong_to_train_and_follow_view_0(tmp_path, features):
    both = np.stack([features, features + 100])
    synthetic_store(tmp_path / "s", both, TARGETS, SPLITS, views=1, block_rows=4)
    store = open_store(tmp_path / "s")
    assert (len(store.rows("train", 1)), len(store.rows("val", 1)), len(store.rows("test", 1))) == (11, 0, 0)
    assert store.rows("train", 1).min() > store.rows("test").max()
    assert store.sample_ids(store.rows("train", 1)) == store.sample_ids(store.rows("train"))
    first, augmented = np.empty((2, 11, 7, 8), np.float32)
    array = store.arrays["sum/g2x3-p1-c8/3"]
    array.read_into(first, store.rows("train"))
    array.read_into(augmented, store.rows("train", 1))
    np.testing.assert_allclose(augmented, first + 400, rtol=1e-5)


def test_block_rows_follow_the_design():
    vit_b = Geometry(grid=(14, 14), prefix_tokens=1, channels=768)
    assert choose_block_rows(13 * vit_b.tokens * vit_b.channels * 2) == 64
    assert choose_block_rows(1) == 512
    assert choose_block_rows(10**9) == 1


def test_norm_travels(tmp_path, features):
    synthetic_store(tmp_path / "s", features, TARGETS, SPLITS)
    norm = open_store(Path(tmp_path / "s")).norm
    np.testing.assert_array_equal(norm.weight, np.linspace(0.5, 1.5, 8, dtype=np.float32))
    np.testing.assert_array_equal(norm.bias, norm.weight - 1)
    assert (norm.kind, norm.eps) == ("layer_norm", 1e-6)
