"""A chunk is bound to its place: whole chunks of another row, tap, block, array or store are no answer."""

import json
import shutil

import google_crc32c
import numpy as np
import pytest

from coldtap.errors import CorruptStoreError, StoreError
from coldtap.stores import open_store
from coldtap.stores.convert.convert import convert_store
from coldtap.stores.format.canonical import readable_json
from coldtap.stores.format.chunk_digests import LISTED_BYTES, digests_name
from coldtap.stores.format.features import WRITTEN
from coldtap.stores.verify.verify import verify_store
from coldtap.stores.writing.job import Found
from tests.helpers.places import FIXTURES
from tests.helpers.synthetic import GEOMETRY, synthetic_store

KINDS = [("float32", "fast"), ("float16", "fast"), ("bfloat16", "fast"), ("int8", "fast"), ("int8", "compact")]
SPLITS = ["train"] * 8 + ["val"] * 3
N_TAPS, BLOCK_ROWS, REJECTED = 3, 4, 6
LAYERS = f"layers/{GEOMETRY.name}"
SHARDS = {LAYERS: "c/{}/0/0/0", f"sum/{GEOMETRY.name}/2": "c/{}/0/0", f"pooled/{GEOMETRY.name}": "c/{}/0/0/0"}
ABSENT = 2**64 - 1


def made(path, kind, seed=0):
    tier, layout = kind
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((len(SPLITS), N_TAPS, GEOMETRY.tokens, GEOMETRY.channels)).astype(np.float32)
    synthetic_store(
        path, features, [0] * len(SPLITS), SPLITS, tier=tier, layout=layout, block_rows=BLOCK_ROWS, rejected=[REJECTED]
    )
    return path


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture
def store(tmp_path, kind):
    return made(tmp_path / "store", kind)


def shard(store, array, block):
    return store / "features.zarr" / array / SHARDS[array].format(block)


def entries_of(path, n_chunks):
    data = path.read_bytes()
    n_index = BLOCK_ROWS * n_chunks * 16
    return np.frombuffer(data[-n_index - 4 : -4], "<u8").reshape(BLOCK_ROWS, n_chunks, 2).copy()


def with_entries(path, entries):
    index = entries.astype("<u8").tobytes()
    data = path.read_bytes()[: -len(index) - 4]
    path.write_bytes(data + index + google_crc32c.value(index).to_bytes(4, "little"))


def is_refused(store, array, message, tmp_path):
    """By the first read of a row, by the conversion, and by the check."""
    found = open_store(store, threads=1).arrays[array]
    refused = 0
    for row in open_store(store).samples["row"].to_pylist():
        out = np.empty((1, *found.row_shape), np.float32)
        try:
            found.read_into(out, [row])
        except CorruptStoreError as error:
            assert message in str(error)  # noqa: PT017 # rows at their place are read
            assert array in str(error)  # noqa: PT017
            refused += 1
    assert refused
    tier = "float16" if open_store(store).recipe.encoding.tier == "float32" else "float32"
    with pytest.raises(CorruptStoreError, match=message):
        convert_store(store, tmp_path / "new", tier=tier)
    assert not (tmp_path / "new/manifest").exists()
    assert verify_store(store).problems
    return refused


NOT_ITS_OWN = "the chunk is whole and not the one that belongs there"


@pytest.mark.parametrize("array", SHARDS)
def test_index_entries_of_two_rows_that_changed_places(store, array, tmp_path):
    n_chunks = N_TAPS if array == LAYERS else 1
    entries = entries_of(shard(store, array, 0), n_chunks)
    entries[[0, 3]] = entries[[3, 0]]
    with_entries(shard(store, array, 0), entries)
    assert is_refused(store, array, NOT_ITS_OWN, tmp_path) == 2


def test_index_entries_of_two_taps_that_changed_places(store, tmp_path):
    entries = entries_of(shard(store, LAYERS, 0), N_TAPS)
    entries[1, [0, 2]] = entries[1, [2, 0]]
    with_entries(shard(store, LAYERS, 0), entries)
    assert is_refused(store, LAYERS, "row 1, tap 0 of", tmp_path) == 1


def test_an_index_entry_that_points_at_the_chunk_of_another(store, tmp_path):
    entries = entries_of(shard(store, LAYERS, 0), N_TAPS)
    entries[1, 1] = entries[2, 1]
    with_entries(shard(store, LAYERS, 0), entries)
    assert is_refused(store, LAYERS, "row 1, tap 1 of", tmp_path) == 1


def test_chunks_that_changed_places_and_the_index_with_them(store, tmp_path):
    """The file is as it would be if the rows had been made in the other order."""
    path = shard(store, LAYERS, 0)
    entries, data = entries_of(path, N_TAPS), path.read_bytes()
    chunks = [[data[int(at) : int(at + n)] for at, n in row] for row in entries]
    chunks[0], chunks[1] = chunks[1], chunks[0]
    lengths = np.array([[len(chunk) for chunk in row] for row in chunks], np.uint64)
    ends = np.cumsum(lengths, dtype=np.uint64).reshape(lengths.shape)
    payload = b"".join(chunk for row in chunks for chunk in row)
    path.write_bytes(payload + data[len(payload) :])
    with_entries(path, np.stack([ends - lengths, lengths], axis=2))
    assert is_refused(store, LAYERS, NOT_ITS_OWN, tmp_path) == 2


@pytest.mark.parametrize("array", SHARDS)
def test_shards_that_changed_places(store, array, tmp_path):
    """Both are whole blocks of the same split but for one absent row, which the list tells before any chunk is read."""
    first, second = shard(store, array, 0), shard(store, array, 2)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert is_refused(store, array, "the store's list of digests", tmp_path) >= 6


def test_a_shard_of_another_store_of_the_same_recipe(store, kind, tmp_path):
    other = made(tmp_path / "other", kind, seed=1)
    assert open_store(other).recipe.address == open_store(store).recipe.address
    shutil.copy(shard(other, LAYERS, 0), shard(store, LAYERS, 0))
    assert is_refused(store, LAYERS, NOT_ITS_OWN, tmp_path) == 4


def test_a_row_that_should_have_a_chunk_or_none(store, tmp_path):
    whole = entries_of(shard(store, LAYERS, 0), N_TAPS)
    entries = whole.copy()
    entries[2] = ABSENT
    with_entries(shard(store, LAYERS, 0), entries)
    assert is_refused(store, LAYERS, "row 2, tap 0 of .* there is no chunk, and one in"[:14], tmp_path) == 4
    with_entries(shard(store, LAYERS, 0), whole)
    assert verify_store(store).problems == ()
    absent = next(block for block in (0, 1, 2) if (entries_of(shard(store, LAYERS, block), N_TAPS) == ABSENT).any())
    entries = entries_of(shard(store, LAYERS, absent), N_TAPS)
    row = int(np.flatnonzero((entries == ABSENT).all(axis=(1, 2)))[0])
    entries[row] = entries[row - 1]
    with_entries(shard(store, LAYERS, absent), entries)
    assert is_refused(store, LAYERS, "there is a chunk, and none in the store's list of digests", tmp_path) == 3


@pytest.mark.parametrize("change", ["swapped", "lost", "cut", "foreign"])
def test_a_list_that_is_not_the_stores_own(store, kind, tmp_path, change):
    mine, next_one = store / digests_name(LAYERS, 0), store / digests_name(LAYERS, 1)
    if change == "lost":
        mine.unlink()
    else:
        other = made(tmp_path / "other", kind, seed=1)
        data = {"swapped": next_one.read_bytes(), "cut": mine.read_bytes()[:-LISTED_BYTES]}
        mine.write_bytes(data.get(change) or (other / digests_name(LAYERS, 0)).read_bytes())
    with pytest.raises(CorruptStoreError, match="digests/layers"):
        open_store(store).arrays[LAYERS].read_into(
            np.empty((1, *open_store(store).arrays[LAYERS].row_shape), "f4"), [0]
        )
    (where,) = {problem.where for problem in verify_store(store).problems}
    assert where == digests_name(LAYERS, 0)


def test_later_reads_of_what_was_checked_take_no_list(store):
    array = open_store(store).arrays[LAYERS]
    out, again = (np.empty((1, *array.row_shape), np.float32) for _ in range(2))
    array.read_into(out, [0])
    (store / digests_name(LAYERS, 0)).unlink()
    array.read_into(again, [0])
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8-fast", "int8-compact", "views", "stages"])
def test_a_store_of_format_1_converts_into_its_own_tier_with_the_same_numbers(tmp_path, name):
    old = open_store(FIXTURES / name)
    assert (old.recipe.format, old.recipe.requires) == (1, ())
    encoding = old.recipe.encoding
    convert_store(old.storage, tmp_path / "new", tier=encoding.tier, layout=encoding.layout)
    new = open_store(tmp_path / "new")
    assert (new.recipe.format, new.recipe.requires) == (2, WRITTEN)
    assert new.recipe.digests["extractor"] == old.recipe.digests["extractor"]
    assert verify_store(tmp_path / "new").problems == ()
    assert new.sample_ids(new.index.present.all()) == old.sample_ids(old.index.present.all())
    for array in old.arrays.values():
        one, other = (np.empty((s.n_rows, *array.row_shape), array.spec.dtype) for s in (old, new))
        before = array.read_stored_into(one, old.index.present.all())
        after = new.arrays[array.name].read_stored_into(other, new.index.present.all())
        assert one.tobytes() == other.tobytes()
        np.testing.assert_array_equal(np.sort(before.position), np.sort(after.position))


def test_a_job_that_was_begun_in_format_1_is_left_as_it_is(tmp_path):
    store = shutil.copytree(FIXTURES / "float32", tmp_path / "store")
    (store / "manifest").unlink()
    found = Found.look(open_store(FIXTURES / "float32").storage.__class__(store))
    made_now = open_store(FIXTURES / "float32").recipe.__class__(
        extractor=found.recipe.extractor, rows=found.recipe.rows, encoding=found.recipe.encoding
    )
    assert made_now.address == found.recipe.address
    with pytest.raises(StoreError, match=r"begun in store format 1 .*finish it with the coldtap that began it, or"):
        found.is_complete_for(made_now)


def test_a_feature_of_the_format_that_is_not_known_is_refused_by_its_name(tmp_path):
    store = made(tmp_path / "store", ("float32", "fast"))
    record = json.loads((store / "recipe.json").read_text())
    record["requires"].append("pooled-cells")
    (store / "recipe.json").write_bytes(readable_json(record))
    with pytest.raises(CorruptStoreError, match=r"requires 'pooled-cells', .*: read it with a newer coldtap"):
        open_store(store)
