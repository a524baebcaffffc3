"""A store whose manifest has several parts: it reads, verifies, converts, and its small files change without them."""

import numpy as np
import pytest

from coldtap.errors import CorruptStoreError
from coldtap.stores import open_store
from coldtap.stores.convert.convert import convert_store
from coldtap.stores.editing.add_targets import add_targets
from coldtap.stores.format import manifest
from coldtap.stores.format.manifest import MANIFEST, MANIFEST_PARTS
from coldtap.stores.storage.memory import MemoryStorage
from coldtap.stores.verify.verify import verify_store
from tests.helpers.jobs import files, read
from tests.helpers.synthetic import synthetic_store

LAYERS = "layers/g2x3-p1-c8"
N_SAMPLES, BLOCK_ROWS, BLOCKS_A_PART = 19, 4, 2  # five blocks, three parts


@pytest.fixture
def features():
    values = np.random.default_rng(0).standard_normal((N_SAMPLES, 3, 7, 8)).astype(np.float32)
    values[::5, 1, 2, 3] = 50  # escapes
    return values


@pytest.fixture
def store(tmp_path, features, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCKS_A_PART", BLOCKS_A_PART)
    made(tmp_path / "s", features)
    return tmp_path / "s"


def made(path, features, **how):
    how = {"tier": "int8", "block_rows": BLOCK_ROWS, **how}
    return synthetic_store(path, features, [0] * N_SAMPLES, ["train"] * N_SAMPLES, **how)


def parts_of(store):
    return {name: data for name, data in files(store).items() if name.startswith(f"{MANIFEST_PARTS}/")}


def test_parts_list_what_blocks_wrote_and_the_root_the_rest(store):
    names = [{line.split(" ", 2)[2] for line in data.decode().splitlines()} for data in parts_of(store).values()]
    assert len(names) == 3
    for block in range(5):
        (of_block,) = [some for some in names if f"journal/{block:08d}.json" in some]
        assert {f"features.zarr/{LAYERS}/c/{block}/0/0/0", f"digests/{LAYERS}/{block}"} <= of_block
    root = {line.split(" ", 2)[2] for line in (store / MANIFEST).read_text().splitlines()}
    assert root.isdisjoint(set().union(*names))
    assert root | set().union(*names) == set(files(store)) - {MANIFEST}


def test_it_reads_verifies_and_converts(store, features):
    opened = open_store(store)
    assert verify_store(store).problems == ()
    out = MemoryStorage()
    convert_store(store, out, tier="float32")
    assert verify_store(out).problems == ()
    for name, array in opened.arrays.items():
        np.testing.assert_array_equal(
            read(array, opened.rows("train")), read(open_store(out).arrays[name], open_store(out).rows("train"))
        )


def test_new_targets_leave_the_parts_as_they_are(store):
    before, digest = files(store), open_store(store).digest
    ids = open_store(store).sample_ids(open_store(store).rows("train"))
    assert add_targets(store, "more", dict.fromkeys(ids, 1), kind="class") != digest
    after = files(store)
    assert {name for name in after if after[name] != before.get(name)} == {MANIFEST, "targets/more.parquet"}
    assert before.keys() <= after.keys()
    assert verify_store(store).problems == ()


def test_a_part_that_is_another_stores_is_refused(store, tmp_path, features):
    made(tmp_path / "other", features + 1)
    name, other = min(parts_of(store)), min(parts_of(tmp_path / "other").values())
    (store / name).write_bytes(other)
    with pytest.raises(CorruptStoreError, match=f"{name}, a part of the manifest, is not what the manifest says"):
        open_store(store)


def test_parts_of_an_earlier_call_are_gone_when_the_store_is_complete(tmp_path, features, store):
    writer = made(tmp_path / "again", features, finish=False)
    stale = tmp_path / "again" / MANIFEST_PARTS / ("0" * 64)
    stale.parent.mkdir()
    stale.write_text("of another environment\n")
    ids = [f"sample-{i:03d}" for i in range(N_SAMPLES)]
    writer.finish(ids, lambda i: f"memory[{i}]", {})
    assert not stale.exists()
    assert parts_of(tmp_path / "again").keys() == parts_of(store).keys()
