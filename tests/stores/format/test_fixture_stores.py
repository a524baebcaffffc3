"""Stores of each tier and layout that were made once: they open, and read as they did on the day they were made."""

import json
import re

import numpy as np
import pytest
import tensorstore
import zarr

from coldtap.stores import open_store
from coldtap.stores.format.canonical import sha256
from coldtap.stores.reading.describe import describe_store
from coldtap.stores.reading.manifest_files import files_of
from coldtap.stores.verify.verify import verify_store
from tests.helpers.escapes import escapes_of
from tests.helpers.places import FIXTURES, ROOT

HERE = FIXTURES
RECORDED = {
    name: (digest, expected) for digest, expected, name in map(str.split, (HERE / "DIGESTS").read_text().splitlines())
}
NAMES = sorted(RECORDED)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def expected(name):
    with np.load(HERE / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def test_every_kind_of_store_is_here():
    kinds = {(array.spec.tier, array.spec.layout) for one in NAMES for array in open_store(HERE / one).arrays.values()}
    assert kinds == {
        ("float32", "fast"), ("float16", "fast"), ("bfloat16", "fast"), ("int8", "fast"), ("int8", "compact"),
    }  # fmt: skip
    assert {path.name for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(NAMES)


def test_they_are_the_stores_that_were_made_then(name):
    """Run `make.py` for a new kind of store. An old store that changes is a format that broke."""
    digest, of_expected = RECORDED[name]
    assert open_store(HERE / name).digest == digest
    assert sha256((HERE / f"{name}.npz").read_bytes()) == of_expected


def test_each_is_of_the_format_that_its_name_says(name):
    recipe = open_store(HERE / name).recipe
    requires = ("chunk-digests", "escape-segments", "manifest-parts")
    expected = 2, requires if name == "format-2-parts" else requires[:2]
    assert (recipe.format, recipe.requires) == (expected if name.startswith("format-2") else (1, ()))
    assert (
        json.loads((HERE / name / "features.zarr/zarr.json").read_text())["attributes"]["coldtap"] == recipe.to_dict()
    )


def test_they_are_small():
    sizes = [sum((HERE / one / file).stat().st_size for file in files_of(HERE / one)) for one in NAMES]
    assert max(sizes) < 60_000
    assert sum(sizes) + sum((HERE / f"{one}.npz").stat().st_size for one in NAMES) < 500_000


def test_every_row_reads_as_it_did(name, expected):
    store = open_store(HERE / name)
    rows = expected["row"]
    for array in store.arrays.values():
        values = np.full((len(rows), *array.row_shape), np.nan, np.float32)
        array.read_into(values, rows)
        np.testing.assert_array_equal(values, expected[f"values:{array.name}"])
        stored = np.zeros(values.shape, array.spec.dtype)
        exceptions = array.read_stored_into(stored, rows)
        assert stored.tobytes() == expected[f"stored:{array.name}"].astype(array.spec.dtype).tobytes()
        assert (len(exceptions.value) > 0) == (array.spec.tier == "int8")
    assert len(store.arrays) == sum(key.startswith("values:") for key in expected)


def test_the_tables_read_as_they_did(name, expected):
    store = open_store(HERE / name)
    rows = expected["row"]
    assert store.n_rows == len(rows)
    assert store.sample_ids(rows) == expected["sample"].tolist()
    np.testing.assert_array_equal(store.targets(rows), expected["target"])
    assert store.class_names() == ("ant", "bee", "cow")
    for split in ("train", "val", "test"):
        for view in range(4):
            of_both = (expected["split"] == split) & (expected["view"] == view)
            np.testing.assert_array_equal(store.rows(split, view), rows[of_both])
    np.testing.assert_array_equal(store.norm.weight, expected["norm_weight"])
    assert (store.norm.kind, store.norm.eps, store.norm.bias) == ("layer_norm", 1e-6, None)


def foreign(reader, path):
    if reader == "tensorstore":
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        return tensorstore.open(spec).result().read().result()
    if reader == "zarrs":
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            return zarr.open_array(path, mode="r")[:]
    return zarr.open_array(path, mode="r")[:]


def put_escapes(store, array, read, values):
    """By docs/format.md, of either format."""
    if f"escapes/{array.name}/position" in read:
        position = read[f"escapes/{array.name}/position"].reshape(-1, values.ndim)
        there = position[:, 0] != 2**32 - 1
        values[tuple(position[there].T)] = read[f"escapes/{array.name}/value"].reshape(-1)[there]
        return
    by_tap = values.reshape(len(values), len(array.taps), -1, copy=False)
    for block in range(len(values) // array.spec.block_rows):
        for row, place, position, value in escapes_of(store, array.name, block, array.spec.block_rows, len(array.taps)):
            by_tap[row, place, position] = value


@pytest.mark.parametrize("reader", ["zarr", "tensorstore", "zarrs"])
def test_other_readers_read_every_array(name, expected, reader):
    root = HERE / name / "features.zarr"
    read = {}
    for file in sorted(root.rglob("zarr.json")):
        if json.loads(file.read_text())["node_type"] == "array":
            read[str(file.parent.relative_to(root))] = foreign(reader, file.parent)
    for array in open_store(HERE / name).arrays.values():
        stored = read[array.name]
        kept = expected[f"stored:{array.name}"]
        assert np.ascontiguousarray(stored[expected["row"]]).tobytes() == kept.astype(stored.dtype).tobytes()
        absent = np.delete(stored, expected["row"], axis=0)
        fill = {"bfloat16": 0xFFFF, "int8": -128}.get(array.spec.tier)
        assert (np.isnan(absent) if fill is None else absent == fill).all()
        if array.spec.tier == "int8":
            values = stored.reshape(len(stored), -1, *stored.shape[-2:]).astype(np.float32)
            values = values * read[f"scales/{array.name}/scale"][:, None] + read[f"scales/{array.name}/offset"][:, None]
            values = values.reshape(stored.shape)
            put_escapes(HERE / name, array, read, values)
            np.testing.assert_array_equal(values[expected["row"]], expected[f"values:{array.name}"])
    np.testing.assert_array_equal(read["norm/weight"], expected["norm_weight"])


def test_nothing_is_wrong_with_them(name):
    assert verify_store(HERE / name).problems == ()


def test_they_are_described(name, expected):
    about = describe_store(HERE / name)
    assert about["complete"]
    assert (about["n_rows"], about["n_rejected"]) == (len(expected["row"]), len(expected["rejected"]))
    assert about["digest"] == RECORDED[name][0]
    assert {array["name"] for array in about["arrays"]} == {
        key.removeprefix("values:") for key in expected if key.startswith("values:")
    }


def test_the_lines_of_the_specification_read_an_int8_store(monkeypatch):
    text = (ROOT / "docs/format.md").read_text()
    (lines,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "zarr.open_group" in code)
    monkeypatch.chdir(HERE)
    lines = lines.replace("STORE", "format-2-int8").replace("g8x8-p1-c192", "g2x2-p1-c6").replace("17", "number")
    with np.load("format-2-int8.npz") as expected:
        numbers, values = expected["row"].tolist(), expected["values:layers/g2x2-p1-c6"]
    for number, wanted in zip(numbers, values, strict=True):
        names = {"zarr": zarr, "number": number}
        exec(lines, names)  # it is our own page
        np.testing.assert_array_equal(names["row"], wanted)
