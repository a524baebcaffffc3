"""`StoredArray.dask`: the values of `read_into`, lazily, wherever the tasks run; the page about it runs as written."""

import pickle
import re

import dask
import numpy as np
import pytest

from coldtap.errors import MissingExtraError, MissingFeaturesError
from coldtap.stores import StoredArray, open_store
from coldtap.stores.format.geometry import Geometry
from tests.helpers.places import ROOT
from tests.helpers.synthetic import synthetic_store

BLOCK_ROWS = 8
TIERS = ("float32", "float16", "bfloat16", "int8")


@pytest.fixture(params=TIERS)
def store(request, tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 3, 5, 6)).astype(np.float32)  # (sample, tap, token, channel)
    features[3, 1, 2, 4] = 1000  # an escape of int8
    targets, splits = [i % 2 for i in range(40)], ["train"] * 28 + ["val"] * 12
    synthetic_store(
        tmp_path / "s",
        features,
        targets,
        splits,
        geometries=dict.fromkeys(range(3), Geometry(grid=(2, 2), prefix_tokens=1, channels=6)),
        tier=request.param,
        layout="compact" if request.param == "int8" else "fast",
        block_rows=BLOCK_ROWS,
        rejected=[2, 30],
    )
    return open_store(tmp_path / "s")


def read(array, rows, taps=None):
    n_taps = (len(taps or array.taps),) if array.gather != "sum" else ()
    out = np.empty((len(rows), *n_taps, *array.row_shape[-2:]), np.float32)
    array.read_into(out, rows, taps)
    return out


def test_every_gather_gives_the_values_of_read_into(store):
    assert {array.gather for array in store.arrays.values()} == {"layers", "sum", "pooled"}
    for array in store.arrays.values():
        lazy = array.dask()
        rows = np.concatenate([store.rows("train"), store.rows("val")])
        assert lazy.shape == (38, *array.row_shape)
        assert lazy.dtype == np.float32
        np.testing.assert_array_equal(lazy.compute(), read(array, rows))


def test_rows_and_taps_are_taken_in_the_order_asked(store):
    layers = next(array for array in store.arrays.values() if array.gather == "layers")
    rows = store.rows("train")[::-1]
    np.testing.assert_array_equal(layers.dask(rows, taps=[2, 0]).compute(), read(layers, rows, [2, 0]))
    assert layers.dask(rows).chunks[0] == (8, 8, 8, 3)
    with pytest.raises(MissingFeaturesError, match="has no tap 7"):
        layers.dask(taps=[7])
    absent = sorted({*range(store.rows("train")[-1])} - {*store.rows("train").tolist()})
    with pytest.raises(Exception, match=r"there is no chunk|has no row"):
        layers.dask(absent[:1]).compute()


def test_nothing_is_read_before_it_is_computed(store, monkeypatch):
    layers = next(array for array in store.arrays.values() if array.gather == "layers")
    monkeypatch.setattr(StoredArray, "read_into", lambda *_: pytest.fail("rows were read"))
    mean = layers.dask().mean(axis=(0, 2))
    assert mean.shape == (3, 6)


def test_an_array_is_pickled_by_where_its_store_lies(store):
    layers = next(array for array in store.arrays.values() if array.gather == "layers")
    again = pickle.loads(pickle.dumps(layers))
    np.testing.assert_array_equal(read(again, store.rows("val")), read(layers, store.rows("val")))
    with dask.config.set(scheduler="processes", num_workers=1):
        np.testing.assert_array_equal(layers.dask(store.rows("val")).compute(), read(layers, store.rows("val")))


def test_without_dask_one_line_names_the_extra(store, monkeypatch):
    monkeypatch.setattr("coldtap.extras.find_spec", lambda name: None if name == "dask" else object())
    with pytest.raises(MissingExtraError, match=r"needs dask: pip install 'coldtap\[cluster\]'"):
        next(iter(store.arrays.values())).dask()


def test_the_page_runs_as_written_and_its_numbers_are_numpys(store):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/dask.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace('"STORE"', repr(str(store.path))), names)
    layers = next(array for array in store.arrays.values() if array.gather == "layers")
    values = read(layers, store.rows("train"))
    np.testing.assert_allclose(names["mean"], values.mean(axis=(0, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(names["deviation"], values.std(axis=(0, 2)), rtol=1e-4)
    tokens = values[:, -1].mean(axis=1)
    singular = np.linalg.svd(tokens - tokens.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(names["values"], singular[:2], rtol=1e-3)
    assert names["plane"].shape == (27, 2)
    assert {*names["clusters"].tolist()} <= {0, 1}
