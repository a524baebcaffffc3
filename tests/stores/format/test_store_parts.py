"""The parts of a store on their own: recipe, row plan, tiers, manifest."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coldtap.errors import (
    ColdtapError,
    CorruptStoreError,
    IncompleteStoreError,
    OptionError,
    StoreError,
)
from coldtap.stores.format.arrays import plan_arrays
from coldtap.stores.format.canonical import canonical_json, readable_json
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.journal import JournalLine, Rejection, WrittenFile
from coldtap.stores.format.manifest import Entry
from coldtap.stores.format.recipe import Recipe, differences
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.tiers import FLOAT16_MAX, HEADROOM, TIERS, Numbers, float16_exponent
from coldtap.stores.reading.journal_lines import read_line
from coldtap.stores.reading.manifest_files import read_manifest
from coldtap.stores.reading.recipe_file import read_recipe
from coldtap.stores.storage.address import storage_at
from coldtap.stores.writing.records import write_line, write_manifest, write_part

FIXTURES = Path(__file__).parents[2] / "fixtures"
TAP = {"name": "z0", "grid": [2, 2], "prefix_tokens": 1, "channels": 4}
PARTS = {
    "extractor": {"architecture": "made", "weights": "a", "taps": [TAP, {**TAP, "name": "z1"}]},
    "rows": {"listing": "0", "splits": {"train": 3}, "views": 0, "seed": 0},
    "encoding": {"gathers": {"layers": [1]}, "tier": "float16", "scales": {}, "layout": "fast", "block_rows": 4},
}


def recipe_with(**changes):
    """The recipe with some fields of its parts changed; None takes a field out."""
    parts = {
        part: {name: value for name, value in {**record, **changes.get(part, {})}.items() if value is not None}
        for part, record in PARTS.items()
    }
    return Recipe.from_parts(parts, where="here")


RECIPE = recipe_with()


def test_recipe_round_trips_and_its_address_follows_every_field():
    assert Recipe.from_dict(RECIPE.to_dict(), where="here") == RECIPE
    others = [
        recipe_with(extractor={"weights": "b"}),
        recipe_with(rows={"seed": 1}),
        recipe_with(encoding={"tier": "float32"}),
    ]
    assert len({recipe.address for recipe in (RECIPE, *others)}) == 4
    assert others[1].extractor_digest == RECIPE.extractor_digest


def test_differences_name_each_field_old_and_new():
    other = recipe_with(extractor={"weights": "b"}, rows={"seed": None})
    assert differences(RECIPE, other) == ["extractor.weights: a → b", "rows.seed: 0 → (absent)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3; this coldtap reads formats 1 and 2: read it with a newer coldtap"),
        ({"format": True}, "format True"),
        ({"requires": "chunk-digests"}, "not a list of names"),
        ({"requires": ["chunk-digests", "cells"]}, "requires 'cells', which this coldtap does not know"),
        ({"format": 1}, "unknown keys \\['requires'\\]"),
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
    with pytest.raises(OptionError, match="`split='val'`: the source has no val images"):
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
    TIERS["bfloat16"].restore(bits[:, :, None], out[:, :, None], Numbers(exponents=(0,)))
    np.testing.assert_array_equal(out.view(np.uint32) >> 16, bits)
    assert not (out.view(np.uint32) & 0xFFFF).any()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_bfloat16_bits_are_those_of_torch(values):
    floats = np.array([*values, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4028235e38, 1e-45], np.float32)
    stored, escapes = TIERS["bfloat16"].encode(floats.reshape(1, 1, 1, -1), Numbers(exponents=(0,)))
    bits = torch.from_numpy(floats).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(stored.ravel(), bits)
    assert escapes is None


def test_a_recipe_leaves_the_bytes_that_it_was_read_from():
    for path in sorted(FIXTURES.glob("*/recipe.json")):
        record = json.loads(path.read_bytes())
        recorded = record.pop("recorded")
        recipe = Recipe.from_dict(record, where=str(path))
        assert readable_json({**recipe.to_dict(), "recorded": recorded}) == path.read_bytes()
    parts = json.loads(json.dumps(PARTS))
    parts["extractor"]["taps"][0]["stride"] = 4.0
    for record in parts.values():
        record["later"] = [1, {"a": None}]
    parts["rows"]["augmentation"] = parts["extractor"]["quantisation"] = None
    assert Recipe.from_parts(parts, where="here").parts == parts


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "extractor",
            {"taps": [{**TAP, "grid": [2, 0]}]},
            r"extractor\.taps\[0\]\.grid is 0, not a whole",
        ),
        ("extractor", {"weights": 3}, r"extractor\.weights is 3, not a text"),
        ("rows", {"splits": {"odd": 1}}, r"rows\.splits are \['odd'\]"),
        ("rows", {"splits": {"val": True}}, r"rows\.splits\.val is True, not a whole number"),
        ("encoding", {"gathers": {"layers": [1, 1]}}, r"encoding\.gathers\.layers: a tap stands twice"),
        ("encoding", {"block_rows": 0}, r"encoding\.block_rows is 0"),
    ],
)
def test_a_field_of_another_form_is_named(part, change, message):
    with pytest.raises(CorruptStoreError, match=message):
        recipe_with(**{part: change})


def test_float16_scales_are_undone_a_tap_each():
    out = np.empty((1, 2, 1, 1), np.float32)
    TIERS["float16"].restore(np.array([1.5, 1.5], np.float16).reshape(out.shape), out, Numbers(exponents=(0, 10)))
    np.testing.assert_array_equal(out.ravel(), [1.5, 1536])


def arrays_of(extractor, encoding):
    recipe = Recipe.from_parts(
        {"extractor": PARTS["extractor"] | extractor, "rows": PARTS["rows"], "encoding": PARTS["encoding"] | encoding},
        where="here",
    )
    return recipe.arrays(where="here")


def test_arrays_come_back_from_the_recipe():
    geometry = Geometry(grid=(2, 2), prefix_tokens=0, channels=4)
    gathers = {"layers": [0, 1], "sum": [1], "pooled": [1]}
    for tier, layout in (("float16", "fast"), ("int8", "compact")):
        specs = plan_arrays({0: geometry, 1: geometry}, gathers, tier, layout)
        encoding = {"gathers": gathers, "tier": tier, "layout": layout, "block_rows": specs[0].block_rows}
        extractor = {"taps": [{"name": "z", **geometry.to_dict()}] * 2}
        assert arrays_of(extractor, encoding) == specs
        for damage in ({"tier": "int4"}, {"layout": "odd"}, {"gathers": {"layers": [7]}}, {"block_rows": None}):
            with pytest.raises(CorruptStoreError, match=r"here: (its recipe does not describe|tier)"):
                arrays_of(extractor, encoding | damage)


def test_only_codes_are_compressed():
    geometry = Geometry(grid=(2, 2), prefix_tokens=0, channels=4)
    with pytest.raises(OptionError, match="`layout='compact'` with `tier='float16'`: lossless compression buys"):
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


def test_a_manifest_in_parts_is_one_manifest(tmp_path):
    entries = [Entry(sha256="b" * 64, n_bytes=2, name=f"{letter}/0") for letter in "dbca"]
    storage = storage_at(tmp_path)
    parts = [write_part(storage, entries[:2]), write_part(storage, entries[2:])]
    small = Entry(sha256="c" * 64, n_bytes=1, name="b")
    digest = write_manifest(tmp_path, [*parts, small])
    manifest = read_manifest(tmp_path)
    every = sorted([*entries, *parts, small], key=lambda entry: entry.name)
    assert (list(manifest.entries().values()), manifest.digest) == (every, digest)
    assert [manifest.find(name) for name in ("a/0", "b", "b/0", "d/0", "x")] == [
        entries[3],
        small,
        *entries[1::-1],
        None,
    ]
    assert set(manifest.root_entries()) == {"b", *(part.name for part in parts)}
    assert manifest.most_lines >= 7
    (tmp_path / "manifest").write_text(f"{'a' * 64} 1 {parts[0].name}\n")
    with pytest.raises(CorruptStoreError, match="manifest, line 1"):
        read_manifest(tmp_path)


def test_journal_lines_round_trip_and_a_damaged_one_says_what_to_do(tmp_path):
    line = JournalLine(
        block=3,
        files={"features.zarr/layers/x/c/3": WrittenFile(n_bytes=9, sha256="a" * 64)},
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
