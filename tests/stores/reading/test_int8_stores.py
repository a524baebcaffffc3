"""int8 stores: what is written is what every reader reads, within the bound, exceptions included."""

import hashlib

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr

from coldtap.stores import open_store
from coldtap.stores.format.codes import SCALE_OF_STEP, Scaling, encode
from coldtap.stores.verify.verify import verify_store
from tests.helpers.escapes import escapes_of
from tests.helpers.synthetic import GEOMETRY, by_tap, gathered, synthetic_store

SPLITS = ["train"] * 11 + ["val"] * 5 + ["test"] * 6
TARGETS = [i % 3 for i in range(22)]
LAYERS, SUM, POOLED = "layers/g2x3-p1-c8", "sum/g2x3-p1-c8/3", "pooled/g2x3-p1-c8"
LAYOUTS = ["fast", "compact"]


@pytest.fixture
def features():
    """Ordinary values, a massive channel on one token, and single massive values."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((22, 4, GEOMETRY.tokens, GEOMETRY.channels)).astype(np.float32)
    values[:, 2, 0, 5] += 500
    values[rng.integers(0, 22, 9), rng.integers(0, 4, 9), rng.integers(0, 7, 9), rng.integers(0, 8, 9)] *= 1e4
    return values


def scaling_of(name):
    taps = 1 if name == SUM else 4
    scale = np.linspace(0.05, 0.1, taps * 8, dtype=np.float32).reshape(taps, 8)
    return Scaling(scale=scale, offset=np.linspace(-1, 1, taps * 8, dtype=np.float32).reshape(taps, 8))


@pytest.fixture(params=LAYOUTS)
def store(request, tmp_path, features):
    scaling = {LAYERS: scaling_of(LAYERS), SUM: scaling_of(SUM)}
    synthetic_store(
        tmp_path / "s",
        features,
        TARGETS,
        SPLITS,
        tier="int8",
        layout=request.param,
        scaling=scaling,
        block_rows=4,
        rejected=[3],
    )
    return open_store(tmp_path / "s")


def rows_and_samples(store):
    rows = np.concatenate([store.rows("test"), store.rows("train")[::-1], store.rows("val")])
    return rows, [int(name[-3:]) for name in store.sample_ids(rows)]


def expected(array, features, samples):
    return np.stack([by_tap(gathered(array.spec, features[sample])) for sample in samples])


@pytest.mark.parametrize("taps", [None, [0, 1, 2, 3], [2], [3, 1], [0, 2, 3]])
def test_values_come_back_within_the_bound(store, features, taps):
    rows, samples = rows_and_samples(store)
    array = store.arrays[LAYERS]
    out = np.full((len(rows), len(taps or range(4)), 7, 8), np.nan, np.float32)
    array.read_into(out, rows, taps)
    scaling = array.scaling_of(taps)
    wanted = expected(array, features, samples)[:, taps or slice(None)]
    bound = scaling.scale.astype(float)[:, None] / SCALE_OF_STEP / 2
    assert (np.abs(out - wanted.astype(float)) <= bound).all()
    codes = np.empty(out.shape, np.int8)
    exceptions = array.read_stored_into(codes, rows, taps)
    again = codes * scaling.scale[:, None] + scaling.offset[:, None]
    again.reshape(-1)[exceptions.position] = exceptions.value
    np.testing.assert_array_equal(again, out)


def test_sums_come_back_within_the_bound(store, features):
    rows, samples = rows_and_samples(store)
    array = store.arrays[SUM]
    out = np.empty((len(rows), 7, 8), np.float32)
    array.read_into(out, rows)
    bound = array.scaling_of().scale.astype(float) / SCALE_OF_STEP / 2
    assert (np.abs(out - expected(array, features, samples)[:, 0].astype(float)) <= bound).all()


def test_pooled_stays_in_float16(store, features):
    rows, samples = rows_and_samples(store)
    array = store.arrays[POOLED]
    assert (array.spec.tier, array.spec.layout) == ("float16", "fast")
    out = np.empty((len(rows), 4, 2, 8), np.float32)
    array.read_into(out, rows)
    np.testing.assert_array_equal(out, expected(array, features, samples).astype(np.float16))


def foreign(reader, path):
    if reader == "tensorstore":
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        return tensorstore.open(spec).result().read().result()
    if reader == "zarrs":
        pytest.importorskip("zarrs")
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            return zarr.open_array(path, mode="r")[:]
    return zarr.open_array(path, mode="r")[:]


@pytest.mark.parametrize("reader", ["zarr", "tensorstore", "zarrs"])
@pytest.mark.parametrize("name", [LAYERS, SUM])
def test_the_formula_of_the_specification_gives_what_coldtap_reads(store, features, name, reader):
    """A stranger with docs/format.md and any Zarr reader."""
    rows, _ = rows_and_samples(store)
    array, root = store.arrays[name], store.path / "features.zarr"
    codes = foreign(reader, root / name)
    absent = np.setdiff1d(np.arange(array.n_rows), rows)
    assert (codes[absent] == -128).all()
    assert not (codes[rows] == -128).any()
    scale, offset = (foreign(reader, root / "scales" / name / part) for part in ("scale", "offset"))
    values = offset[:, None] + scale[:, None] * codes.reshape(len(codes), -1, 7, 8).astype(np.float32)
    values = values.reshape(codes.shape)
    by_tap_of_row = values.reshape(len(codes), -1, 7 * 8, copy=False)
    n_escapes = 0
    for block in range(len(codes) // 4):
        for row, place, position, value in escapes_of(store.path, name, block, 4, by_tap_of_row.shape[1]):
            by_tap_of_row[row, place, position] = value
            n_escapes += len(value)
    assert n_escapes > 3
    ours = np.empty((len(rows), *array.row_shape), np.float32)
    array.read_into(ours, rows)
    np.testing.assert_array_equal(values[rows], ours)


def test_verify_finds_nothing_wrong(store):
    assert verify_store(store.path).problems == ()


def test_compact_is_smaller_and_reads_the_same(tmp_path, features):
    def made(layout):
        many = np.tile(features, (2, 1, 1, 1))
        synthetic_store(tmp_path / layout, many, TARGETS * 2, SPLITS * 2, tier="int8", layout=layout, snr_db=10)
        return open_store(tmp_path / layout)

    fast, compact = made("fast"), made("compact")
    rows = fast.rows("train")
    out = np.empty((2, len(rows), 4, 7, 8), np.float32)
    fast.arrays[LAYERS].read_into(out[0], rows)
    compact.arrays[LAYERS].read_into(out[1], rows)
    np.testing.assert_array_equal(out[0], out[1])


def test_escapes_of_rejected_rows_are_not_kept(tmp_path, features):
    features[3] = 6e4
    scaling = {LAYERS: scaling_of(LAYERS), SUM: scaling_of(SUM)}
    synthetic_store(tmp_path / "s", features, TARGETS, SPLITS, tier="int8", scaling=scaling, block_rows=4, rejected=[3])
    value = np.concatenate(
        [value for block in range(7) for *_, value in escapes_of(tmp_path / "s", LAYERS, block, 4, 4)]
    )
    assert len(value) > 0
    assert not (value == 6e4).any()


def test_a_store_without_exceptions_has_no_file_of_them(tmp_path):
    values = np.random.default_rng(0).standard_normal((22, 4, 7, 8)).astype(np.float32)
    synthetic_store(tmp_path / "s", values, TARGETS, SPLITS, tier="int8", layout="compact", block_rows=4)
    assert not list((tmp_path / "s").rglob("escapes"))
    store = open_store(tmp_path / "s")
    codes = np.empty((1, 4, 7, 8), np.int8)
    assert len(store.arrays[LAYERS].read_stored_into(codes, store.rows("val")[:1]).value) == 0
    assert verify_store(store.path).problems == ()


def test_escapes_of_a_block_without_rows_do_not_reach_the_next(tmp_path, features):
    """Its buffers are used again."""
    features[[0, 5]] *= 1e4
    writer = synthetic_store(
        tmp_path / "s",
        features,
        TARGETS,
        SPLITS,
        tier="int8",
        scaling={LAYERS: scaling_of(LAYERS)},
        block_rows=4,
        gathers={"layers": range(4)},
        blocks=[],
        finish=False,
    )
    buffers = writer.new_buffers()
    buffers[LAYERS].put(features[:1], [0])
    writer.write_block(0, buffers, rejected=[], source_sha256={}, ranges={}, environment={})
    buffers[LAYERS].put(features[1:2], [0])
    line = writer.write_block(1, buffers, rejected=[], source_sha256={4: "0" * 64}, ranges={}, environment={})
    expected = encode(features[1:2], scaling_of(LAYERS)).escapes
    kept = buffers[LAYERS].take_escapes(1, np.ones(4, bool))
    assert len(kept.value) == 0
    written = sorted(name for name in line.files if "escapes/" in name)
    assert written == [f"digests/escapes/{LAYERS}/1", f"escapes/{LAYERS}/1"]
    ((row, place, position, value),) = escapes_of(tmp_path / "s", LAYERS, 1, 4, 4)
    assert (row, place, value.tolist()) == (4, 2, expected.value.tolist())
    assert position.tolist() == [int(np.ravel_multi_index(expected.position[0, 2:], (7, 8)))]
    assert [path.name for path in (tmp_path / "s/escapes" / LAYERS).iterdir()] == ["1"]


def test_the_digests_of_segments_are_those_of_their_bytes(store):
    n_segments = 0
    for array in (store.arrays[LAYERS], store.arrays[SUM]):
        n_taps = len(array.taps)
        for block in range(array.n_rows // 4):
            listed = store.path / "digests/escapes" / array.name / str(block)
            entries = np.zeros((4, n_taps, 36), np.uint8)
            for row, place, position, value in escapes_of(store.path, array.name, block, 4, n_taps):
                segment = position.tobytes() + value.tobytes()
                digest = hashlib.sha256(segment).digest() + google_crc32c.value(segment).to_bytes(4, "little")
                entries[row % 4, place] = np.frombuffer(digest, np.uint8)
                n_segments += 1
            assert listed.exists() == entries.any()
            assert not entries.any() or listed.read_bytes() == entries.tobytes()
    assert n_segments > 5


def test_escapes_of_an_earlier_life_are_forgotten_where_there_are_none_now(tmp_path, features):
    features[4] *= 1e4
    writer = synthetic_store(
        tmp_path / "s",
        features,
        TARGETS,
        SPLITS,
        tier="int8",
        scaling={LAYERS: scaling_of(LAYERS)},
        block_rows=4,
        gathers={"layers": range(4)},
        blocks=[],
        finish=False,
    )
    for values, n_files in ((features[4:5], 2), (np.zeros_like(features[:1]), 0)):
        buffers = writer.new_buffers()
        buffers[LAYERS].put(values, [0])
        line = writer.write_block(0, buffers, rejected=[], source_sha256={0: "0" * 64}, ranges={}, environment={})
        assert sum("escapes/" in name for name in line.files) == n_files
        assert len([path for path in (tmp_path / "s").rglob("escapes/**/0") if path.is_file()]) == n_files
