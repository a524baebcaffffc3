"""The benchmark of quantised backbones: every cell once in small, the tables, and a second call that does nothing."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.quantised import cells, main, report
from benchmarks.quantised_accuracy import CellTask, StoreTask, float_store, run_cell
from benchmarks.quantised_budget import FLOAT, METHODS, Budget, Place
from benchmarks.quantised_cost import measure_latency
from benchmarks.quantised_geometries import GeometryTask, run_geometry
from benchmarks.quantised_pairs import pair_images, pair_series
from coldtap.errors import RunError
from coldtap.pipeline.backbones.integer.artefact import read_artefact
from tests.helpers.jobs import files
from tests.helpers.pictures import encoded, picture

SETS = ("dots", "noise")
BUDGET = Budget(sets=SETS, schemes=("w4a4",), seeds=(0,), epochs=1, images=16, geometries=())


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Light and dark noise, and all cells of a small budget."""
    folder = tmp_path_factory.mktemp("quantised")
    place = Place(data=folder / "data", out=folder / "out")
    write_noise(place.own, train=32, test=16)
    for name in SETS:
        write_noise(place.dataset(name), train=40, val=8, test=8)
        float_store(StoreTask(place=place, dataset=name))
    run_cell(CellTask(place=place, budget=BUDGET, scheme="", method=FLOAT, seed=0))
    for task in cells(place, BUDGET):
        run_cell(task)
    return place


def write_noise(path, **sizes):
    splits = [split for split, n in sizes.items() for _ in range(n)]
    images = [picture(i, 32, 32).point(lambda value, dark=i % 2: value // (1 + dark)) for i in range(len(splits))]
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [encoded(image) for image in images],
        "label": [i % 2 for i in range(len(splits))],
        "split": splits,
    }
    pq.write_table(pa.table(columns), path)


def found(place, cell):
    return place.read(cell, BUDGET)


def test_every_cell_has_its_numbers_and_leaves_no_stores(place):
    for method in METHODS:
        cell = found(place, f"w4a4-{method}-s0")
        assert cell["own"]["n_images"] == 16
        right = np.unpackbits(np.frombuffer(bytes.fromhex(cell["own"]["right"]), np.uint8))
        assert right.mean() == cell["own"]["top1"]
        assert {*cell["adaptors"]} == {*cell["crossed"]} == {*SETS}
        for scores in (*cell["adaptors"].values(), *(of for sets in cell["crossed"].values() for of in sets.values())):
            assert all(0 <= scores[adaptor] <= 1 for adaptor in ("linear", "mist"))
        assert any("stored" in direction for direction in cell["crossed"]["dots"]) == (method == "none")
    assert not list(place.work("").glob("*"))


def test_methods_share_their_integers_and_differ_in_what_they_add(place):
    tensors = {method: read_artefact(place.artefact("w4a4", method, 0)).tensors for method in METHODS}
    codes = [name for name in tensors["none"] if name.startswith("codes/")]
    assert codes
    for method in ("qwt", "cwac"):
        assert all(torch.equal(tensors["none"][name], tensors[method][name]) for name in codes)
    cost = {method: found(place, f"w4a4-{method}-s0") for method in METHODS}
    assert (cost["none"]["n_parameters"], cost["none"]["n_folded_parameters"]) == (0, 0)
    assert (cost["cwac"]["n_parameters"], cost["cwac"]["n_folded_parameters"]) == (9 * 2 * 2 * 192, 0)
    assert cost["none"]["n_bytes"] < cost["cwac"]["n_bytes"] < cost["none"]["float_bytes"]


def test_a_second_command_computes_nothing_and_gives_the_tables(place, capsys):
    before = files(place.out)
    stamps = {file: file.stat().st_mtime_ns for file in place.out.rglob("*") if file.is_file()}
    main([str(place.data), "--out", str(place.out), "--schemes", "w4a4", "--seeds", "1", *NO_GEOMETRIES, *SMALL])
    after = files(place.out)
    assert {name for name in after if name not in before} == {"quantised.json", "quantised.md", "quantised.png"}
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    printed = capsys.readouterr().out
    assert printed.startswith("budget: ")
    assert "[1/" not in printed
    assert "cells that are not done: 0" in printed
    for line in ("| – | float32 |", "| W4A4 | base |", "| W4A4 | CWAC − QwT |", "| W4A4 | base, stored features comp"):
        assert line in printed
    data = json.loads((place.out / "quantised.json").read_text())
    assert {(row["scheme"], row["method"]) for row in data["accuracy"]} == {
        ("", FLOAT),
        *(("w4a4", m) for m in METHODS),
    }
    directions = {(row["compensation"], row["direction"]) for row in data["crossed"]["rows"]}
    assert len(directions) == 12
    assert {row["left"] for row in data["differences"]} == {*METHODS}
    with Image.open(place.out / "quantised.png") as drawn:
        assert drawn.size > (600, 300)


NO_GEOMETRIES = ("--no-geometries",)
SMALL = ("--epochs", "1", "--images", "16", "--jobs", "1")


def test_what_is_done_so_far_has_tables_too(place, tmp_path):
    half = Place(data=place.data, out=tmp_path)
    (tmp_path / "cells").mkdir()
    for cell in ("float-s0", "w4a4-cwac-s0"):
        half.write(cell, BUDGET, found(place, cell))
    text = report(half, BUDGET)
    assert "cells that are not done: 2" in text
    assert "CWAC − float32" in text
    assert "CWAC − base" not in text


def test_cells_of_another_budget_are_refused(place):
    other = Budget(sets=SETS, schemes=("w4a4",), seeds=(0,), epochs=2, images=16, geometries=())
    with pytest.raises(RunError, match=r"float-s0\.json is of another budget: epochs: 1 → 2\. Choose another --out"):
        place.read("float-s0", other)


def test_latency_has_every_contestant(place):
    latency = measure_latency(place, scheme="w4a4", rounds=1, batches=1)
    assert {*latency["images_per_s"]} == {FLOAT, *METHODS}
    assert latency["ratios"][FLOAT] == [1.0]
    assert all(speed > 0 for speed in latency["images_per_s"].values())


def test_a_larger_geometry_has_a_ratio_for_every_tap(place):
    task = GeometryTask(place=place, budget=BUDGET, model="test_vit", n_images=16, scheme="w8a8")
    run_geometry(task)
    taps = found(place, task.cell)["taps_db"]
    assert {*taps} == {*METHODS}
    assert {len(of) for of in taps.values()} == {7}
    assert all(math.isfinite(db) and db > 20 for of in taps.values() for db in of)


def test_pairs_have_students_interval_and_images_their_own():
    left = {seed: {"a": {"mist": 0.5 + 0.1 * seed}, "b": {"mist": 0.5}} for seed in (0, 1)}
    right = {seed: {"a": {"mist": 0.5}, "b": {"mist": 0.5}} for seed in (0, 1)}
    pair = pair_series(left, right, ["mist"])
    assert pair["difference"] == pytest.approx(2.5)  # of 5 and 0 points, the sets' means over seeds
    assert pair["interval"] == pytest.approx([2.5 - 12.706 * 2.5, 2.5 + 12.706 * 2.5])
    assert pair["pairs"] == 2
    assert pair_series(left, {}, ["mist"]) is None
    images = pair_images({0: "f0"}, {0: "c0"}, 8)  # 4 right against 2 of 8
    assert images["difference"] == pytest.approx(25)
    deviation = np.std([0, 0, 1, 1, 0, 0, 0, 0], ddof=1)
    assert images["interval"][1] == pytest.approx(25 + 196 * deviation / math.sqrt(8))
