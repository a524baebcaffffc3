"""The parts of a store on their own: recipe, row plan, tiers, manifest, lock, durable files."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldtap.errors import (
    ColdtapError,
    CorruptStoreError,
    IncompleteStoreError,
    MachineError,
    OptionError,
    StoreError,
    StoreLockedError,
)
from coldtap.stores.format.arrays import Geometry, arrays_of_recipe, plan_arrays
from coldtap.stores.format.canonical import canonical_json
from coldtap.stores.format.journal import JournalLine, Rejection, ShardRecord, read_line, write_line
from coldtap.stores.format.manifest import Entry, read_manifest, write_manifest
from coldtap.stores.format.recipe import Recipe, differences
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.tiers import FLOAT16_MAX, HEADROOM, Numbers, float16_exponent, restore
from coldtap.stores.reading.recipe_file import read_recipe
from coldtap.stores.storage.atomic import machine_errors, write_file
from coldtap.stores.storage.lock import StoreLock
from coldtap.stores.storage.output_place import require_place

RECIPE = Recipe(extractor={"weights": "a", "taps": [1, 2]}, rows={"seed": 0}, encoding={"tier": "float16"})


def test_recipe_round_trips_and_its_address_follows_every_field():
    assert Recipe.from_dict(RECIPE.to_dict(), where="here") == RECIPE
    others = [
        Recipe(extractor={"weights": "b", "taps": [1, 2]}, rows=RECIPE.rows, encoding=RECIPE.encoding),
        Recipe(extractor=RECIPE.extractor, rows={"seed": 1}, encoding=RECIPE.encoding),
        Recipe(extractor=RECIPE.extractor, rows=RECIPE.rows, encoding={"tier": "float32"}),
    ]
    assert len({recipe.address for recipe in (RECIPE, *others)}) == 4
    assert others[1].extractor_digest == RECIPE.extractor_digest


def test_differences_name_each_field_old_and_new():
    other = Recipe(extractor={"weights": "b", "taps": [1, 2]}, rows={}, encoding=RECIPE.encoding)
    assert differences(RECIPE, other) == ["extractor.weights: a → b", "rows.seed: 0 → (absent)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2; this coldtap reads format 1"),
        ({"surprise": 1}, "unknown keys"),
        ({"address": "0" * 64}, "edited by hand"),
        ({"rows": 3}, "'rows' is not a JSON object"),
    ],
)
def test_a_recipe_that_was_tampered_with_is_refused(change, message):
    with pytest.raises(CorruptStoreError, match=message):
        Recipe.from_dict({**RECIPE.to_dict(), **change}, where="recipe.json")


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)))
def test_canonical_json_is_one_text_for_one_value(value):
    backwards = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(backwards)
    assert json.loads(canonical_json(value)) == value


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(0, 9), st.integers(0, 9)),
    views=st.integers(0, 3),
    block_rows=st.integers(1, 16),
    seed=st.integers(0, 5),
)
def test_row_plan_places_every_sample_and_view_once_and_never_crosses_a_segment(sizes, views, block_rows, seed):
    splits = [name for name, n in zip(("train", "val", "test"), sizes, strict=True) for _ in range(n)]
    ids = [f"{i}" for i in range(len(splits))]
    keep = [name for name in ("train", "val", "test") if name in splits]
    plan = RowPlan.of(ids, splits, keep=keep, views=views, seed=seed, block_rows=block_rows)
    rows = list(plan)
    assert len({row.number for row in rows}) == len(rows) == plan.n_planned == len(ids) + views * sizes[0]
    assert {(row.sample, row.view) for row in rows} == {
        (i, v) for i, split in enumerate(splits) for v in range(views + 1) if v == 0 or split == "train"
    }
    for block in range(plan.n_blocks):
        assert len({(row.split, row.view) for row in plan.block(block)}) == 1
        assert [row.number for row in plan.block(block)] == list(
            range(block * block_rows, block * block_rows + len(plan.block(block)))
        )
    assert plan.n_rows == plan.n_blocks * block_rows


def test_a_new_sample_moves_no_other_past_its_neighbour():
    ids = [f"image-{i}" for i in range(50)]
    few = RowPlan.of(ids, ["train"] * 50, keep=["train"], views=0, seed=3, block_rows=8).order["train"]
    more = RowPlan.of([*ids, "new"], ["train"] * 51, keep=["train"], views=0, seed=3, block_rows=8).order["train"]
    assert tuple(i for i in more if i != 50) == few
    assert few != tuple(range(50))


def test_a_split_without_samples_is_refused():
    with pytest.raises(OptionError, match="--split val: the source has no val images"):
        RowPlan.of(["a"], ["train"], keep=["train", "val"], views=0, seed=0, block_rows=1)


@given(st.floats(0, 1e30))
def test_float16_exponent_leaves_the_headroom_and_no_more(largest):
    exponent = float16_exponent(largest)
    limit = FLOAT16_MAX / HEADROOM
    assert largest / 2.0**exponent <= limit
    assert exponent == 0 or largest / 2.0 ** (exponent - 1) > limit


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4))
def test_bfloat16_bits_come_back_as_the_float32_that_they_are(values):
    bits = (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(1, 1, 4)
    out = np.empty((1, 1, 4), np.float32)
    restore(bits[:, :, None], out[:, :, None], "bfloat16", Numbers(exponents=(0,)))
    np.testing.assert_array_equal(out.view(np.uint32) >> 16, bits)
    assert not (out.view(np.uint32) & 0xFFFF).any()


def test_float16_scales_are_undone_a_tap_each():
    out = np.empty((1, 2, 1, 1), np.float32)
    restore(np.array([1.5, 1.5], np.float16).reshape(out.shape), out, "float16", Numbers(exponents=(0, 10)))
    np.testing.assert_array_equal(out.ravel(), [1.5, 1536])


def test_arrays_come_back_from_the_recipe():
    geometry = Geometry(grid=(2, 2), prefix_tokens=0, channels=4)
    gathers = {"layers": [0, 1], "sum": [1], "pooled": [1]}
    for tier, layout in (("float16", "fast"), ("int8", "compact")):
        specs = plan_arrays({0: geometry, 1: geometry}, gathers, tier, layout)
        encoding = {"gathers": gathers, "tier": tier, "layout": layout, "block_rows": specs[0].block_rows}
        extractor = {"taps": [{"name": "z", **geometry.to_dict()}] * 2}
        assert arrays_of_recipe(extractor, encoding, where="here") == specs
        for damage in ({"tier": "int4"}, {"layout": "odd"}, {"gathers": {"layers": [7]}}, {"block_rows": None}):
            with pytest.raises(CorruptStoreError, match=r"here: (its recipe does not describe|tier)"):
                arrays_of_recipe(extractor, encoding | damage, where="here")


def test_only_codes_are_compressed():
    geometry = Geometry(grid=(2, 2), prefix_tokens=0, channels=4)
    with pytest.raises(OptionError, match="--layout compact with --tier float16: lossless compression buys"):
        plan_arrays({0: geometry}, {"layers": [0]}, "float16", "compact")


def test_stage_geometries_get_an_array_each_and_no_sum():
    wide, deep = (Geometry(grid=(s, s), prefix_tokens=0, channels=c) for s, c in ((8, 4), (4, 8)))
    specs = plan_arrays({0: wide, 1: deep, 2: deep}, {"layers": [0, 1, 2]}, "float32")
    assert [(spec.name, spec.taps) for spec in specs] == [("layers/g8x8-p0-c4", (0,)), ("layers/g4x4-p0-c8", (1, 2))]
    with pytest.raises(OptionError, match="taps of one geometry"):
        plan_arrays({0: wide, 1: deep}, {"sum": [1]}, "float32")


def test_manifest_round_trips_and_refuses_names_that_leave_the_store(tmp_path):
    entries = [Entry(sha256="b" * 64, n_bytes=2, name="z"), Entry(sha256="a" * 64, n_bytes=1, name="a/b#3")]
    digest = write_manifest(tmp_path, entries)
    manifest = read_manifest(tmp_path)
    assert (list(manifest.entries().values()), manifest.digest) == (entries[::-1], digest)
    assert [manifest.find(name) for name in ("a/b#3", "z", "a", "zz", "")] == [entries[1], entries[0], None, None, None]
    for name in ("../x", "/etc/passwd", "a/../../b"):
        (tmp_path / "manifest").write_text(f"{'a' * 64} 1 {name}\n")
        with pytest.raises(CorruptStoreError, match="line 1"):
            read_manifest(tmp_path).entries()
        with pytest.raises(CorruptStoreError, match="line 1"):
            read_manifest(tmp_path).find("z")
    (tmp_path / "manifest").unlink()
    with pytest.raises(IncompleteStoreError, match="run the same"):
        read_manifest(tmp_path)


def test_journal_lines_round_trip_and_a_damaged_one_says_what_to_do(tmp_path):
    line = JournalLine(
        block=3,
        shards={"layers/x/c/3": ShardRecord(n_bytes=9, sha256="a" * 64, tap_bytes=(5,), tap_sha256=("b" * 64,))},
        rejected=(Rejection(row=7, reason="truncated", tap=None),),
        source_sha256={6: "c" * 64},
        ranges={"layers/x": [[-1.0, 2.5]]},
        environment={"device": "cpu"},
    )
    write_line(tmp_path, line)
    assert read_line(tmp_path, 3) == line
    assert read_line(tmp_path, 4) is None
    path = tmp_path / "journal/00000003.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(CorruptStoreError, match="remove it, and the block is done again"):
        read_line(tmp_path, 3)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep/file"
    write_file(path, [b"ab", memoryview(b"cd")])
    assert path.read_bytes() == b"abcd"

    def dies():
        yield b"new"
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_file(path, dies())
    assert path.read_bytes() == b"abcd"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_systems_refusals_become_one_clear_error():
    with pytest.raises(MachineError, match="the disk is full: free some space"), machine_errors(Path("there")):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="odd"), machine_errors(Path("there")):
        raise OSError(errno.EIO, "odd")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/new", "a file is where a folder would have to be: choose another path"),
        ("file/deep/new", "a file is where a folder would have to be: choose another path"),
        (250 * "n", "a name in this path is too long: choose a shorter one"),  # that of its temporary file is
        (300 * "n", "a name in this path is too long: choose a shorter one"),
        ("folder", "a folder is there: choose another path"),
    ],
)
def test_a_path_that_no_file_can_have_is_one_clear_error(tmp_path, name, reason):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError, match=f"cannot write .*{name}: {reason}"):
        write_file(tmp_path / name, [b"new"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("folder", OptionError, r"`out='.*folder'` is a folder: give the path of a file, such as .*folder/example.bin"),
        ("file/new", OptionError, r"`out='.*file/new'`: .*file is a file, and no folder can be there"),
        ("file/deep/new", OptionError, r"`out='.*file/deep/new'`: .*file is a file, and no folder can be there"),
        (250 * "n", MachineError, "a name in this path is too long"),
        (300 * "n", MachineError, "a name in this path is too long"),
        (f"missing/{250 * 'n'}", MachineError, "a name in this path is too long"),
        (f"missing/{300 * 'n'}/new", MachineError, "a name in this path is too long"),
    ],
)
def test_a_place_for_no_file_is_refused_before_anything_is_made(tmp_path, monkeypatch, name, kind, message):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, Path(name)):
        with pytest.raises(kind, match=message):
            require_place(path, "example.bin")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_places_for_files_are_what_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    for name in ("file", "new", "link", "deep/er/new", 247 * "n"):
        for path in (tmp_path / name, Path(name)):
            require_place(path, "example.bin")
            write_file(path, [b"new"])
            assert path.read_bytes() == b"new"


def test_one_writer_a_store_and_a_dead_one_does_not_count(tmp_path):
    with StoreLock(tmp_path):
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()}"), StoreLock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text("process 1 on elsewhere, long dead, with a longer text than ours")
    with StoreLock(tmp_path):
        assert "elsewhere" not in (tmp_path / ".lock").read_text()


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    assert read_recipe(tmp_path / "new") is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        read_recipe(tmp_path / "file")
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(StoreError, match="a Zarr store that coldtap did not write"):
        read_recipe(tmp_path)


def test_every_error_pickles_and_has_its_exit_code():
    import pickle

    from coldtap import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ColdtapError)]
    assert len(kinds) == 15
    for kind in kinds:
        again = pickle.loads(pickle.dumps(kind("what was asked")))
        assert (type(again), str(again), again.exit_code) == (kind, "what was asked", kind.exit_code)
