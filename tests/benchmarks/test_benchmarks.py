"""The benchmarks run and print finite ratios; how large they are is no test's business."""

import json
import math
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from benchmarks.__main__ import main
from benchmarks.features import ManyFew, write_store
from benchmarks.opening import TINY
from benchmarks.peers import CONTESTANTS, DECODE, MEMMAP
from benchmarks.pictures import Pictures, decode, encoded_images
from benchmarks.reading import TIERS, draw_reading
from coldtap.stores import open_store
from coldtap.stores.format.arrays import plan_arrays

# What the measured processes import: here once, in the process that all of them are forked from.
IMPORTED = [
    "coldtap.adaptors.training.train",
    "coldtap.pipeline.job",
    "coldtap.pipeline.run.extraction",
    "coldtap.pipeline.quantisation.quantize",
    "benchmarks.extraction",
]


@pytest.fixture
def quick_start(monkeypatch):
    """Processes that have imported already what they need; what is measured in earnest starts afresh."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    monkeypatch.setattr("benchmarks.machine.get_context", lambda _: context)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_start")
def test_quick_benchmarks_print_finite_ratios(tmp_path, capsys):
    main(["extraction", "--quick", "--json", str(tmp_path / "records.json")])
    printed = capsys.readouterr().out
    records = json.loads((tmp_path / "records.json").read_text())
    assert records["machine"]["cores"]
    ratios = [record["ratio"] for record in records["extraction"]]
    assert len(ratios) == 4
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    for record in records["extraction"]:
        assert f"{record['ratio']:.2f}" in printed


def test_the_quick_benchmark_of_codecs_prints_a_ratio_per_chunk_size(tmp_path, capsys):
    main(["codecs", "--quick", "--json", str(tmp_path / "records.json")])
    printed = capsys.readouterr().out
    for record in json.loads((tmp_path / "records.json").read_text())["codecs"]:
        for way in ("decode", "encode"):
            assert 0 < record[way]["ratio_least"] <= record[way]["ratio"] <= record[way]["ratio_greatest"] < math.inf
            assert f"{record[way]['ratio']:.2f}" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("quick_start")
def test_the_quick_benchmark_of_integers_prints_ratios_to_float_and_shares_of_time(tmp_path, capsys):
    main(["integers", "--quick", "--json", str(tmp_path / "records.json")])
    printed = capsys.readouterr().out
    records = json.loads((tmp_path / "records.json").read_text())["integers"]
    speeds = {(record["measured"], record["contestant"]): record for record in records if "contestant" in record}
    assert len(speeds) == 8
    assert all(record["images_per_s"] > 0 for record in speeds.values())
    assert speeds["whole extraction", "w8a8"]["goal"] == 2
    assert f"{speeds['backbone alone', 'w8a8']['ratio']:.2f}" in printed
    profile = next(record for record in records if record["measured"] == "profile")
    assert sum(profile["shares"].values()) == pytest.approx(1)
    # Where no integer kernel is exact and faster than float32, `auto` takes floats, and there are no such products.
    assert (profile["shares"]["integer products"] > 0) == (not profile["kernel"].startswith("float "))


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["speed"])
    assert "known are extraction, comparison, memory" in capsys.readouterr().err


def test_pictures_repeat_a_few_images_and_know_their_labels_unseen():
    pictures = Pictures(encoded_images(16), 130)
    image, label = pictures[129]
    assert (len(pictures), label) == (130, pictures.targets[129])
    assert decode(image, 8).shape == (3, 8, 8)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_start")
def test_quick_reading_gives_every_contestant_a_ratio_and_a_picture(tmp_path):
    main(["reading", "--quick", "--json", str(tmp_path / "records.json")])
    records = json.loads((tmp_path / "records.json").read_text())["reading"]
    epochs = [record for record in records if record["measured"] == "epoch"]
    assert {record["contestant"] for record in epochs} == set(CONTESTANTS)
    assert all(record["ratio"] > 0 for record in epochs if record["installed"])
    goals = [record for record in records if record["measured"] == "goal"]
    assert {record["against"] for record in goals} >= {MEMMAP, DECODE}
    assert len([record for record in records if record["measured"] == "MIST"]) == len(TIERS)
    draw_reading(records, tmp_path / "reading.png")
    with Image.open(tmp_path / "reading.png") as picture:
        assert picture.size > (600, 400)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_start")
def test_quick_opening_draws_a_batch_both_ways_and_reads_all_rows_under_its_limit(tmp_path):
    main(["opening", "--quick", "--json", str(tmp_path / "records.json")])
    *opened, limited = json.loads((tmp_path / "records.json").read_text())["opening"]
    assert [record["way"] for record in opened] == ["open_store", "FeatureBatches"]
    assert all(record["total_s"] > 0 and record["memory_bytes"] > 0 for record in opened)
    assert limited["n_read"] == limited["n_rows"]
    assert limited["memory_bytes"] < limited["limit_bytes"] < limited["store_bytes"] / 9


def test_a_store_of_made_features_holds_what_was_made(tmp_path):
    (spec,) = plan_arrays({0: TINY}, {"sum": [0]}, "float32")
    values = ManyFew(spec.row_shape)
    write_store(tmp_path / "store", spec, 700, values)
    store = open_store(tmp_path / "store")
    rows = store.rows("train")
    samples = np.array([int(name.rpartition("/")[2].removesuffix(".jpeg")) for name in store.sample_ids(rows)])
    out = np.empty((700, *spec.row_shape), np.float32)
    store.arrays[spec.name].read_into(out, rows)
    assert sorted(samples) == list(range(700))
    assert samples.tolist() != sorted(samples)
    np.testing.assert_array_equal(out, values(samples))
    np.testing.assert_array_equal(store.targets(rows), samples % 10)
