"""`coldtap benchmark`: the table that a paper prints, from a folder of datasets; interrupted, it ends in the same."""

import csv
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coldtap.adaptors.results import Cell, ResultTable, Score, table_csv, table_html, table_text
from coldtap.adaptors.results.vtab import GROUPS, vtab_name
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.cli.epoch_lines import EpochLines
from coldtap.errors import OptionError, SourceError
from coldtap.pipeline.images.sources.collection import find_datasets
from coldtap.stores import open_store
from coldtap.workflows.benchmark import run as benchmark_run
from coldtap.workflows.benchmark.cell import Rules
from coldtap.workflows.benchmark.contenders import make_contenders
from coldtap.workflows.benchmark.run import Benchmark
from tests.helpers.jobs import coldtap, error_line, files
from tests.helpers.pictures import encoded, write_classes

SIZES = {"train": 24, "val": 9, "test": 12}
QUICK = ("--epochs", 3, "--seeds", 2, "--device", "cpu")


def shades(sizes, *, n_classes=3, seed=0):
    """Images of three shades in noise: (split, class, image bytes)."""
    rng = np.random.default_rng(seed)
    rows = [(split, number % n_classes) for split, n in sizes.items() for number in range(n)]
    for split, label in rows:
        pixels = rng.integers(0, 110, (8, 8, 3)) + 70 * label
        yield split, label, encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def write_parquet(path, *, sizes=SIZES, n_classes=3, seed=0):
    splits, labels, images = zip(*shades(sizes, n_classes=n_classes, seed=seed), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": list(images), "label": list(labels), "split": list(splits)}), path)
    return path


def write_vtab(folder, *, seed=0):
    lists = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
    lines = {split: [] for split in lists}
    for number, (split, label, image) in enumerate(shades(SIZES, seed=seed)):
        file = folder / "images" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
        lines[split].append(f"images/{number}.png {label}")
    for split, name in lists.items():
        (folder / name).write_text("\n".join(lines[split]))


def cells(out):
    with (out / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(out):
    """The CSV without its one column of times."""
    text = io.StringIO()
    lines = cells(out)
    names = [name for name in lines[0] if name != "seconds"]
    csv.DictWriter(text, names, extrasaction="ignore").writerows(lines)
    return text.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(["apples", "pears"]):
        write_parquet(data / f"{name}.parquet", seed=seed)
    (data / "README.md").write_text("not a dataset")
    return data


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "bench"
    return out, coldtap("benchmark", folder, "--adaptors", "linear,mist", "--out", out, *QUICK)


def test_one_command_gives_the_table(finished):
    out, result = finished
    assert result.exit_code == 0
    lines = cells(out)
    assert [(line["dataset"], line["adaptor"]) for line in lines] == [
        (dataset, adaptor) for dataset in ("apples", "pears") for adaptor in ("linear", "mist")
    ]
    for line in lines:
        tests = [float(score) for score in line["test"].split()]
        assert len(tests) == 2
        assert float(line["mean"]) == pytest.approx(statistics.mean(tests), abs=1e-3)
        assert float(line["std"]) == pytest.approx(statistics.stdev(tests), abs=1e-3)
        assert line["metric"] == "top1"
        assert line["setting"].startswith("lr=")
        assert int(line["parameters"]) > 0
        assert float(line["seconds"]) > 0
        assert not line["failure"]
    text = (out / "table.txt").read_text()
    assert text in result.stdout
    assert "mean of 2 datasets" in text
    assert "over seeds of start and dropout, with one order of samples" in text
    assert "2 datasets × 2 adaptors, protocol vtab: 20 trainings of 3 epochs, 2 seeds" in result.stdout
    assert "mist: 3 settings: lr 0.0005, 0.002, 0.008" in result.stdout  # a quarter of its own, its own, four times it
    assert "[cell 4/4" in result.stderr
    assert "left] " in result.stderr
    page = (out / "table.html").read_text()
    assert all(name in page for name in ("apples", "pears", "linear", "mist", "prefers-color-scheme: dark"))


def test_a_finished_benchmark_is_only_read(finished, folder):
    out, _ = finished
    before = files(out / "runs"), (out / "table.csv").read_bytes()
    assert coldtap("benchmark", folder, "--adaptors", "linear,mist", "--out", out, *QUICK).exit_code == 0
    after = files(out / "runs"), (out / "table.csv").read_bytes()
    assert after[1] == before[1]
    assert {name for name in before[0] if before[0][name] != after[0][name]} == set()


def test_some_sets_and_the_settings_of_one_adaptor(folder, tmp_path):
    result = coldtap(
        *("benchmark", folder, "--sets", "pears", "--adaptors", "linear,mist", "--out", tmp_path / "out"),
        *("--grid", "lr=0.01", "--grid", "mist.rank=2,4", "--set", "mist.depth=1", "--protocol", "val", *QUICK),
    )
    assert result.exit_code == 0
    assert "linear: 1 setting: lr 0.01" in result.stdout
    assert "mist: 2 settings: depth=1; lr 0.01; rank 2, 4" in result.stdout
    linear, mist = cells(tmp_path / "out")
    assert (linear["dataset"], linear["setting"]) == ("pears", "lr=0.01")
    assert mist["setting"] in ("lr=0.01, rank=2", "lr=0.01, rank=4")
    assert len(mist["val"].split()) == 2  # with this protocol every seed searches


def test_stopped_again_and_again_it_ends_in_the_same_table(finished, folder, tmp_path, monkeypatch):
    seen = 0

    def stop_now_and_then(*_, **__):
        nonlocal seen
        seen += 1
        if seen % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(EpochLines, "__call__", stop_now_and_then)
    write_tables = benchmark_run.write_tables

    def stop_after_writing(out, table):
        write_tables(out, table)
        if not (out / f"stopped-{len(table.cells)}").exists():
            (out / f"stopped-{len(table.cells)}").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_run, "write_tables", stop_after_writing)
    command = ("benchmark", folder, "--adaptors", "linear,mist", "--out", tmp_path / "out", *QUICK)
    stops = 0
    while (result := coldtap(*command)).exit_code == 130:
        stops += 1
        assert stops < 60
    assert result.exit_code == 0
    assert stops > 8  # between cells, and within them
    assert without_seconds(tmp_path / "out") == without_seconds(finished[0])


@pytest.mark.slow
def test_sigterm_reaches_every_process_and_nothing_is_lost(finished, folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "coldtap.cli.main", "benchmark", folder, "--adaptors", "linear,mist", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*map(str, command), *map(str, QUICK), "--jobs", "2"], stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        seen = []
        for line in running.stderr:
            seen.append(line)
            if line.startswith("[cell 1/4"):
                running.send_signal(signal.SIGTERM)
        assert running.wait() == 143, seen
    assert not any("Traceback" in line for line in seen), seen
    result = subprocess.run(
        [*map(str, command), *map(str, QUICK), "--jobs", "2"], capture_output=True, env=environment, check=True
    )
    assert b"mean of 2 datasets" in result.stdout
    assert without_seconds(out) == without_seconds(finished[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--epochs", 4), "training.epochs: 3 → 4. Choose another --out"),
        (("--seeds", 1), "seeds: 2 → 1."),
        (("--batch-size", 8, "--weight-decay", 0.1), "training.batch_size: 32 → 8; training.weight_decay: 0.05 → 0.1."),
        (("--protocol", "val"), "protocol: vtab → val."),
        (("--tier", "int8"), "caching.tier: float16 → int8."),
        (("--model", "test_vit"), "caching.model: coldtap/vit-reference → test_vit."),
        (("--random-weights",), "caching.random_weights: (absent) → True."),
        (("--set", "mist.depth=1"), "adaptors.mist.options.depth: 6 → 1."),
        (("--grid", "mist.lr=0.002,0.008"), "adaptors.mist.grid.lr: 0.0005, 0.002, 0.008 → 0.002, 0.008."),
        (("--grid", "mist.rank=2,8"), "adaptors.mist.grid.rank: (absent) → 2, 8"),
        (("--epochs", 4, "--dry-run"), "training.epochs: 3 → 4."),
    ],
)
def test_other_rules_are_refused_and_nothing_changes(finished, folder, changed, message):
    out, _ = finished
    before = files(out)
    result = coldtap("benchmark", folder, "--adaptors", "linear,mist", "--out", out, *QUICK, *changed)
    assert result.exit_code == 9
    assert f"{out} holds a benchmark of other rules: " in error_line(result)
    assert message in error_line(result)
    assert files(out) == before


def test_a_call_may_ask_for_more_and_the_rules_grow(folder, tmp_path):
    def call(*arguments, seeds=1):
        command = ("benchmark", folder, "--out", tmp_path, "--epochs", 2, "--device", "cpu", "--protocol", "val")
        result = coldtap(*command, "--seeds", seeds, *arguments)
        assert result.exit_code == 0
        return json.loads((tmp_path / "benchmark.json").read_text())

    first = call("--sets", "apples", "--adaptors", "linear", "--grid", "lr=0.01")
    assert (first["datasets"], first["seeds"]) == (["apples"], 1)
    assert first["adaptors"]["linear"]["grid"] == {"lr": [0.01]}
    runs = files(tmp_path / "runs")
    grown = call("--adaptors", "head2toe,linear", "--grid", "lr=0.01,0.02", seeds=2)
    assert (grown["datasets"], grown["seeds"], list(grown["adaptors"])) == (
        ["apples", "pears"],
        2,
        ["head2toe", "linear"],
    )
    assert [len(line["test"].split()) for line in cells(tmp_path)] == [2, 2, 2, 2]
    kept = {name for name, content in files(tmp_path / "runs").items() if runs.get(name) == content}
    assert {name for name in runs if name.endswith("adaptor.safetensors")} <= kept
    # A part of it is only read, and takes nothing back.
    part = call("--sets", "pears", "--adaptors", "linear", "--grid", "lr=0.01,0.02", seeds=2)
    assert part == grown
    assert [line["dataset"] for line in cells(tmp_path)] == ["pears"]


def test_damaged_rules_are_no_rules(finished, folder, tmp_path):
    for content in (b"{", b"[]", b"{}"):
        (tmp_path / "benchmark.json").write_bytes(content)
        result = coldtap("benchmark", folder, "--adaptors", "linear", "--out", tmp_path, *QUICK)
        assert result.exit_code == 9
        assert "benchmark.json cannot be read" in error_line(result)


def test_what_is_cached_follows_from_the_adaptors(folder, tmp_path):
    def call(adaptors, *arguments):
        command = ("benchmark", folder, "--sets", "apples", "--out", tmp_path, "--grid", "lr=0.01", *QUICK)
        return coldtap(*command, "--adaptors", adaptors, *arguments)

    assert call("linear").exit_code == 0
    assert {array.gather for array in open_store(tmp_path / "stores/apples").arrays.values()} == {"pooled"}
    result = call("linear,mist")
    assert result.exit_code == 5
    linear, mist = cells(tmp_path)
    store = tmp_path / "stores/apples"
    assert linear["mean"]
    assert mist["failure"] == (
        f"mist needs sum; {store} was cached for other adaptors and holds pooled: delete it and its runs "
        f"({tmp_path / 'runs/apples'}) and run the same command again, or choose another `out`"
    )
    shutil.rmtree(store)
    shutil.rmtree(tmp_path / "runs/apples")
    assert call("linear,mist").exit_code == 0
    assert {array.gather for array in open_store(store).arrays.values()} == {"pooled", "sum"}
    assert call("linear").exit_code == 0  # a store with more than that is used as it is
    assert {array.gather for array in open_store(store).arrays.values()} == {"pooled", "sum"}


def test_a_dry_run_says_what_would_be_done(folder, tmp_path):
    result = coldtap("benchmark", folder, "--out", tmp_path / "out", "--dry-run", *QUICK)
    assert result.exit_code == 0
    assert "2 datasets × 3 adaptors, protocol vtab: 30 trainings" in result.stdout
    assert "apples: 45 rows, " in result.stdout
    assert "nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_fails_says_why_and_the_others_go_on(folder, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    write_parquet(data / "bare.parquet", sizes={"train": 24, "val": 9})
    write_parquet(data / "whole.parquet")
    (data / "broken.parquet").write_bytes(b"not Parquet")
    result = coldtap(
        *("benchmark", data, "--adaptors", "linear,mist", "--out", out, "--grid", "mist.lr=1e30", *QUICK),
    )
    by_cell = {(line["dataset"], line["adaptor"]): line for line in cells(out)}
    assert "no test split" in by_cell["bare", "linear"]["failure"]
    assert "not a Parquet file" in by_cell["broken", "linear"]["failure"]
    assert "the val loss is nan in epoch 1 of 3" in by_cell["whole", "mist"]["failure"]
    assert float(by_cell["whole", "linear"]["mean"]) > 50
    assert result.exit_code == 3  # the broken file is met first
    text = (out / "table.txt").read_text()
    assert "– [1]" in text
    assert "\n[1] " in text
    assert coldtap("benchmark", data, "--sets", "whole", "--adaptors", "linear", "--out", out, *QUICK).exit_code == 0


def test_what_a_store_cannot_give_ends_one_cell(folder, tmp_path):
    result = coldtap(
        *("benchmark", folder, "--sets", "apples", "--adaptors", "linear,mist,last", "--out", tmp_path),
        *("--model", "test_resnet", "--random-weights", "--grid", "lr=0.01", *QUICK),
    )
    linear, mist, last = cells(tmp_path)
    assert linear["mean"]
    assert "use `adaptor='linear'`, or a ViT backbone" in mist["failure"]  # such a network has no sum to cache either
    assert "use `adaptor='linear'`, or a ViT backbone" in last["failure"]
    assert result.exit_code == 5


def test_folders_of_vtab_get_the_means_of_groups_and_of_datasets(tmp_path):
    for seed, name in enumerate(["cifar-100", "EuroSAT", "dsprites_location"]):
        write_vtab(tmp_path / "vtab" / name, seed=seed)
    out = tmp_path / "out"
    result = coldtap("benchmark", tmp_path / "vtab", "--adaptors", "linear", "--out", out, "--grid", "lr=0.02", *QUICK)
    assert result.exit_code == 0
    lines = (out / "table.txt").read_text().splitlines()
    table = [line.split("  ")[0] for line in lines[lines.index(next(x for x in lines if x.startswith("test, %"))) :]]
    assert table[1:9] == [
        *("cifar-100", "EuroSAT", "dsprites_location"),
        *("Natural (1 of 7)", "Specialized (1 of 4)", "Structured (1 of 8)"),
        *("mean of the 3 group means", "mean of 3 datasets"),
    ]


def test_what_is_asked_wrongly_is_said_before_anything_is_done(folder, tmp_path):
    def refused(*arguments, out=tmp_path / "out"):
        result = coldtap("benchmark", folder, "--adaptors", "linear,mist", "--out", out, *arguments)
        assert result.exit_code in (2, 3, 4)
        assert not (tmp_path / "out").exists()
        return error_line(result)

    assert "unknown adaptor 'lastt'" in refused("--adaptors", "lastt")
    assert "--adaptors names mist twice" in refused("--adaptors", "mist,mist")
    assert "--adaptors" in refused("--adaptors", ",")
    assert "no dataset plums; it holds apples, pears" in refused("--sets", "plums")
    assert "lies in" in refused(out=folder / "out")
    assert "--jobs 0" in refused("--jobs", 0)
    assert "--protocol best" in refused("--protocol", "best")
    assert "seeds=0" in refused("--seeds", 0)
    assert "epochs=0" in refused("--epochs", 0)
    assert "tier" in refused("--tier", "float12")
    assert "leave patience out, or use --protocol val" in refused("--grid", "patience=2,3")
    assert "--checkpoint none.safetensors: cannot be read" in refused("--checkpoint", "none.safetensors")


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({}, {"lr": ["fast"]}, "lr=fast: it must be a number"),
        ({}, {"mist.rank": ["2.5"]}, "rank=2.5: it must be a whole number"),
        ({}, {"mist.ranks": ["2"]}, "has no such setting"),
        ({}, {"rank": ["2"]}, "`grid='rank'`: for all adaptors it can vary lr"),
        ({}, {"last.rank": ["2"]}, "last is not among the adaptors asked for: linear, mist"),
        ({}, {"lr": []}, "give at least one value"),
        ({}, {"lr": ["1e-3", "0.001"]}, "asked for twice"),
        ({"rank": "2"}, {}, "say whose option it is, as in linear.rank"),
        ({"mist.ranks": "2"}, {}, "has no option 'ranks'"),
        ({"mist.rank": "2"}, {"mist.rank": ["2", "4"]}, "rank is given twice"),
    ],
)
def test_settings_are_checked_for_each_adaptor(options, grid, message):
    with pytest.raises(OptionError, match=message):
        make_contenders(["linear", "mist"], options, grid, TrainingOptions())


@pytest.mark.parametrize(
    ("adaptor", "options", "grid", "gathers"),
    [
        ("linear", {}, {}, {"pooled"}),
        ("linear", {"linear.norm_at": "before"}, {}, {"layers"}),
        ("linear", {}, {"linear.norm_at": ["before", "after"]}, {"layers", "pooled"}),
        ("attentive", {}, {}, {"layers"}),
        ("head2toe", {}, {}, {"pooled"}),
        ("mist", {}, {}, {"sum"}),
        ("ladder", {}, {}, {"layers"}),
        ("combo", {}, {}, {"layers"}),
        ("last", {}, {}, {"layers"}),
    ],
)
def test_each_adaptor_says_which_gathers_it_reads(adaptor, options, grid, gathers):
    (contender,) = make_contenders([adaptor], options, grid, TrainingOptions())
    assert contender.gathers == gathers


def test_patience_of_all_is_refused_too(tmp_path):
    training = TrainingOptions(patience=2)
    with pytest.raises(OptionError, match="leave patience out, or use `protocol='val'`"):
        Benchmark(
            datasets={},
            contenders=make_contenders(["linear"], {}, {}, training),
            rules=Rules(protocol="vtab", seeds=1, training=training),
            caching={},
            out=tmp_path,
        )


def test_an_adaptors_own_grid_comes_before_that_of_all():
    first, second = make_contenders(
        ["linear", "mist"], {}, {"lr": ["0.1"], "mist.lr": ["0.2", "0.3"]}, TrainingOptions()
    )
    assert [trial["lr"] for trial in first.trials] == ["0.1"]
    assert [trial["lr"] for trial in second.trials] == ["0.2", "0.3"]


def test_folders_that_hold_no_datasets_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no such folder; wanted a folder of datasets"):
        find_datasets(tmp_path / "none")
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="is a file; wanted a folder of datasets"):
        find_datasets(tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(SourceError, match="found no dataset; wanted a folder of datasets"):
        find_datasets(tmp_path / "empty")
    write_classes(tmp_path / "one" / "train", 1, "ant", "bee")
    write_classes(tmp_path / "one" / "test", 1, "ant", "bee")
    with pytest.raises(SourceError, match="is itself one dataset"):
        find_datasets(tmp_path / "one")


def test_folders_are_datasets_and_junk_beside_them_is_named(tmp_path):
    write_vtab(tmp_path / "all" / "dtd")
    write_classes(tmp_path / "all" / "ants" / "train", 1, "ant", "bee")
    write_parquet(tmp_path / "all" / "parts" / "train-00000-of-00001.parquet")
    assert list(find_datasets(tmp_path / "all")) == ["ants", "dtd", "parts"]
    (tmp_path / "all" / "notes").mkdir()
    with pytest.raises(SourceError, match="notes beside ants, dtd, parts: neither the list files of VTAB-1K"):
        find_datasets(tmp_path / "all")
    assert list(find_datasets(tmp_path / "all", ["dtd"])) == ["dtd"]
    write_parquet(tmp_path / "all" / "more.parquet")
    with pytest.raises(SourceError, match=r"both Parquet files \(more\) and folders that are datasets"):
        find_datasets(tmp_path / "all", ["dtd", "more"])


def made(scores, *, adaptors=("linear", "mist"), **fields):
    """A table of scores by dataset and adaptor; None is a failure, a missing one is not done."""
    known = {
        key: Cell(dataset=key[0], adaptor=key[1], metric="top1", test=tests, val=(0.5,), setting={"lr": 0.1}, **fields)
        if tests
        else Cell(dataset=key[0], adaptor=key[1], failure="it <b>diverged</b>")
        for key, tests in scores.items()
    }
    datasets = tuple(dict.fromkeys(dataset for dataset, _ in scores))
    return ResultTable(
        title="<script>", about=("a & b",), datasets=datasets, adaptors=adaptors, cells=(*known.values(),)
    )


def test_means_are_taken_a_seed_each():
    table = made(
        {("a", "linear"): (0.1, 0.3), ("b", "linear"): (0.5, 0.5), ("a", "mist"): (0.2, 0.2), ("b", "mist"): None}
    )
    (mean,) = table.means()
    assert mean.name == "mean of 2 datasets"
    assert mean.scores["linear"] == Score.of([0.3, 0.4])
    assert mean.scores["mist"] is None  # over fewer datasets it would compare with nothing


def test_metrics_are_not_mixed_in_a_mean():
    metrics = {"a": "top1", "b": "mAP", "c": "top1"}
    cells_of = [
        Cell(dataset=name, adaptor="linear", metric=metric, test=(score,), val=(0.5,))
        for (name, metric), score in zip(metrics.items(), (0.2, 0.9, 0.4), strict=True)
    ]
    table = ResultTable(title="t", about=(), datasets=("a", "b", "c", "d"), adaptors=("linear",), cells=(*cells_of,))
    means = [(row.name, row.metric, row.scores["linear"].mean) for row in table.means()]
    assert means == [("mean of 2 of 4 datasets", "top1", pytest.approx(0.3)), ("mean of 1 of 4 datasets", "mAP", 0.9)]
    assert "<small>mAP</small>" in table_html(table).split('class="means"')[1]
    (mean,) = made({("a", "linear"): (0.1,), ("b", "linear"): (0.5,)}, adaptors=("linear",)).means()
    assert (mean.name, mean.metric) == ("mean of 2 datasets", "top1")


def test_group_means_weigh_groups_alike():
    datasets = {"CIFAR100": 0.1, "svhn": 0.3, "pcam": 0.5, "dmlab": 0.9}
    table = made({(name, "linear"): (score, score) for name, score in datasets.items()}, adaptors=("linear",))
    means = {row.name: row.scores["linear"].mean for row in table.means()}
    assert means == pytest.approx(
        {
            "Natural (2 of 7)": 0.2,
            "Specialized (1 of 4)": 0.5,
            "Structured (1 of 8)": 0.9,
            "mean of the 3 group means": (0.2 + 0.5 + 0.9) / 3,
            "mean of 4 datasets": 0.45,
        }
    )


def test_vtab_names_go_under_many_spellings():
    assert sum(map(len, GROUPS.values())) == 19
    assert all(vtab_name(name) == name for names in GROUPS.values() for name in names)
    spelt = ["CIFAR-100", "Flowers102", "oxford-iiit-pets", "dSprites_orientation", "smallNORB azimuth", "Sun397"]
    assert [vtab_name(name) for name in spelt] == [
        *("cifar", "oxford_flowers102", "oxford_iiit_pet", "dsprites_ori", "smallnorb_azi", "sun397")
    ]
    assert vtab_name("grocery") is None


def test_the_best_of_a_row_and_what_is_as_good():
    scores = {("a", "x"): (0.50, 0.60), ("a", "y"): (0.49, 0.51), ("a", "z"): (0.1, 0.1)}
    (row,) = made(scores, adaptors=("x", "y", "z")).rows()
    assert (row.best, row.close) == ({"x"}, {"y"})  # 55 ± 7.1 against 50


def test_the_page_escapes_and_marks():
    table = made({("a", "linear"): (0.5, 0.6), ("a", "mist"): None, ("b", "linear"): (0.5, 0.6)})
    page = table_html(table)
    assert "<script" not in page
    assert "<b>diverged" not in page
    assert "it &lt;b&gt;diverged&lt;/b&gt;" in page
    assert '<td class="n best">55.0 ± 7.1</td>' in page
    assert '–<sup><a href="#why1">1</a></sup>' in page
    assert "http" not in page.replace("http-equiv", "")
    text = table_text(table)
    assert "– [1]" in text
    assert "…" in text  # b has not come to mist yet
    assert table_csv(table).splitlines()[2] == "a,mist,,,,,,,,,,it <b>diverged</b>"
