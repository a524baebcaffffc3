"""The command line: what each command prints, where, and with which exit code."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import coldtap as package
from coldtap.adaptors import load_adaptor, read_run
from coldtap.cli.inspect import _format
from coldtap.cli.main import app
from coldtap.stores import open_store
from coldtap.stores.format.manifest import MANIFEST
from tests.helpers.escapes import escapes_of
from tests.helpers.jobs import coldtap, error_line, files, read
from tests.helpers.pictures import encoded
from tests.helpers.places import FIXTURES

COMMANDS = (
    "cache-features",
    "train-adaptor",
    "benchmark",
    "evaluate",
    "quantize",
    "diagnose",
    "export-backbone",
    "predict",
    "compensate",
    "report",
    "export",
    "convert",
    "inspect",
    "verify",
)
OPTIONS = {
    "cache-features": "--model --checkpoint --random-weights --taps --gather --sum-at --tier --precision --split "
    "--views --batch-size --device --on-bad-image --max-rejected --allow-mixed --dry-run --seed --json",
    "train-adaptor": "--adaptor --out --epochs --lr --set --grid --seeds --protocol --target --compensation --seed "
    "--device --json",
    "benchmark": "--adaptors --out --sets --protocol --grid --set --seeds --epochs --model --tier --jobs --dry-run",
    "evaluate": "--split --compensation --across-quantisation --device --json",
    "quantize": "--calibration --out --scheme --compensate --checkpoint --images --ranges --reparameterise --override "
    "--site --target --ridge --device --seed --json",
    "diagnose": "--calibration --out --scheme --seeds --images --json",
    "export-backbone": "--format --out --json",
    "compensate": "--name --split --max-rows --json",
    "report": "--out --source --no-images",
    "export": "--format --out --json",
    "predict": "--model --checkpoint --quantized --split --out --device",
    "convert": "--tier --layout --snr --max-error --dry-run --json",
    "inspect": "--json",
    "verify": "--source --json",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shade(name, number):
    """An image that a linear probe can tell: dark of class `day`, bright of class `night`, against all habit."""
    level = (40 if name == "day" else 200) + number % 30
    return Image.fromarray(np.random.default_rng(number).integers(level - 20, level + 20, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for start, (split, n_images) in enumerate((("train", 8), ("val", 3), ("test", 4))):
        for name in ("day", "night"):
            (folder / split / name).mkdir(parents=True)
            for number in range(n_images):
                shade(name, 10 * start + number).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, images):
    store = tmp_path_factory.mktemp("cached") / "store"
    result = coldtap("cache-features", images, store, "--device", "cpu", "--taps", "0,9", "--views", "1")
    assert result.exit_code == 0, result.stderr
    return store


@pytest.fixture(scope="module")
def run(tmp_path_factory, store):
    run = tmp_path_factory.mktemp("trained") / "run"
    options = ("--adaptor", "linear", "--out", run, "--epochs", "10", "--lr", "0.01", "--device", "cpu")
    result = coldtap("train-adaptor", store, *options)
    assert result.exit_code == 0, result.stderr
    assert "test 1.0000" in result.stdout
    return run


def predicted(result):
    assert result.exit_code == 0, result.stderr
    return list(csv.DictReader(io.StringIO(result.stdout)))


# Help and version


def test_the_version_is_the_packages_own():
    result = coldtap("--version")
    assert (result.exit_code, result.stdout) == (0, f"{package.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_lists_its_options(command):
    result = coldtap(command, "--help")
    assert result.exit_code == 0
    for option in OPTIONS[command].split():
        assert option in result.stdout
    assert command in coldtap("--help").stdout


def test_no_command_is_left_without_a_test_of_its_help():
    assert {command.name for command in app.registered_commands} - {"demo"} == set(COMMANDS)


def test_help_and_a_typing_error_come_without_loading_torch():
    code = (
        "import sys; from coldtap.cli.main import app\n"
        "for words in (['cache-features', '--help'], ['train-adaptor', '--no-such-option']):\n"
        "    try: app(words)\n"
        "    except SystemExit as end: print(end.code)\n"
        "assert not {'torch', 'timm', 'zarr'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-2:] == ["0", "2"] or ended.stdout.endswith("0\n2\n")


@pytest.mark.parametrize("script", ["cache-features", "train-adaptor", "coldtap"])
def test_the_installed_scripts_are_there(script):
    ended = subprocess.run([Path(sys.executable).parent / script, "--help"], capture_output=True, text=True, check=True)
    assert "Usage: " in ended.stdout
    if script != "coldtap":
        assert OPTIONS[script].split()[-1] in ended.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["cache-features"],
        ["cache-features", "only-a-source"],
        ["cache-features", "a", "b", "--views", "many"],
        ["train-adaptor", "store"],
        ["no-such-command"],
    ],
)
def test_a_call_that_does_not_parse_ends_with_code_2(words):
    result = coldtap(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


# cache-features


def test_a_job_says_what_is_ahead_on_stderr_and_what_was_done_on_stdout(tmp_path, images):
    result = coldtap("cache-features", images, tmp_path / "s", "--device", "cpu", "--gather", "pooled")
    assert result.exit_code == 0
    first, *rest = result.stderr.splitlines()
    assert first.startswith("forecast: 30 rows, ")
    assert " free" in first
    assert rest[-1].startswith("30/30 rows  ")
    assert "images/s" in rest[-1]
    assert result.stdout == f"{tmp_path / 's'}: 30 rows; digest {open_store(tmp_path / 's').digest}\n"


def test_a_val_split_that_was_cut_from_train_is_said(tmp_path, images):
    result = coldtap("cache-features", images / "train", tmp_path / "s", "--device", "cpu", "--gather", "pooled")
    assert "no val split: 2 of the 16 train images, a stratified tenth by seed 0, became it" in result.stderr


def test_a_dry_run_prints_the_forecast_alone(tmp_path, images):
    result = coldtap("cache-features", images, tmp_path / "s", "--device", "cpu", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.startswith("would write 30 rows, ")
    assert result.stdout.endswith(f" to {tmp_path / 's'}; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_the_report_as_json_is_the_whole_of_stdout(tmp_path, images, store):
    dry = coldtap("cache-features", images, tmp_path / "s", "--device", "cpu", "--dry-run", "--json")
    ahead = json.loads(dry.stdout)
    assert (ahead["status"], ahead["digest"], ahead["forecast"]["rows"]) == ("forecast", None, 30)
    again = coldtap("cache-features", images, store, "--device", "cpu", "--taps", "0,9", "--views", "1", "--json")
    assert json.loads(again.stdout) == {
        "store": str(store),
        "status": "unchanged",
        "digest": open_store(store).digest,
        "rows": 46,
        "rejected": 0,
        "forecast": None,
    }


@pytest.mark.parametrize("numbers", ["a,b,c", "0.5", "1,2"])
@pytest.mark.parametrize("option", ["--mean", "--std"])
def test_numbers_that_are_no_three_numbers_are_refused(tmp_path, images, option, numbers):
    result = coldtap("cache-features", images, tmp_path / "s", option, numbers)
    assert result.exit_code == 2
    assert option.removeprefix("--") in error_line(result)
    assert list(tmp_path.iterdir()) == []


def test_overrides_of_the_preprocessing_reach_the_recipe(tmp_path, images):
    options = ("--crop-pct", "0.5", "--crop-mode", "center", "--interpolation", "bilinear")
    numbers = ("--mean", "0.1,0.2,0.3", "--std", "1,2,3", "--device", "cpu", "--gather", "pooled")
    assert coldtap("cache-features", images, tmp_path / "s", *options, *numbers).exit_code == 0
    assert open_store(tmp_path / "s").recipe.extractor.preprocess == {
        "height": 32,
        "width": 32,
        "crop_pct": 0.5,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 2.0, 3.0],
    }


# inspect


def test_inspect_shows_recipe_splits_labels_arrays_and_ranges(store):
    result = coldtap("inspect", store)
    assert result.exit_code == 0
    opened = open_store(store)
    for text in (
        "state      complete, 46 rows",
        f"address    {opened.recipe.address}",
        f"digest     {opened.digest}",
        "format     2 (chunk-digests, escape-segments, manifest-parts)",
        "backbone   coldtap/vit-reference  (float32, weights ",
        "input      32 × 32, bicubic, squash crop 1.0",
        "views 1, seed 0",
        "encoding   float16, fast, 512 rows per block",
        "norm       layer_norm",
        "train        16 samples + 16 augmented rows   2 classes: day 8, night 8",
        "test          8 samples   2 classes: day 4, night 4",
        "layers/g8x8-p1-c192  (row 2048, tap 2, token 65, channel 192)  float16  49.9 kB per row",
        "tap   9 ",
    ):
        assert text in result.stdout


def test_inspect_as_json_holds_the_same_and_is_true(store):
    about = json.loads(coldtap("inspect", store, "--json").stdout)
    opened = open_store(store)
    assert (about["complete"], about["digest"], about["n_rows"]) == (True, opened.digest, 46)
    assert about["n_bytes"] == sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert about["splits"]["val"] == {"samples": 6, "augmented_rows": 0, "labels": {"day": 3, "night": 3}}
    assert about["recipe"]["extractor"] == opened.recipe.extractor.to_dict()
    rows = opened.samples["row"].to_pylist()
    for array in about["arrays"]:
        values = read(opened.arrays[array["name"]], rows)
        taps = values.swapaxes(0, 1) if array["name"].startswith("layers") else None
        for tap, (low, high) in zip(taps if taps is not None else [], array["ranges"], strict=False):
            # The ranges are of the features before they were rounded to float16.
            np.testing.assert_allclose([tap.min(), tap.max()], [low, high], rtol=2**-10)


def test_inspect_of_a_store_of_format_1_says_what_reading_does_not_check():
    about = json.loads(coldtap("inspect", FIXTURES / "float32", "--json").stdout)
    assert (about["format"], about["requires"]) == (1, [])
    assert _format(about).startswith("1: reading does not check that a chunk lies at its own place; `coldtap verify`")


def test_inspect_of_an_incomplete_store_says_so(tmp_path, store):
    begun = shutil.copytree(store, tmp_path / "s")
    (begun / MANIFEST).unlink()
    (begun / "journal/00000001.json").unlink()
    result = coldtap("inspect", begun)
    assert result.exit_code == 0
    assert "state      incomplete: 3 blocks finished; run the same cache-features command to go on" in result.stdout
    assert "digest" not in result.stdout
    about = json.loads(coldtap("inspect", begun, "--json").stdout)
    assert (about["complete"], about["finished_blocks"]) == (False, 3)


@pytest.fixture(scope="module")
def coded(tmp_path_factory, images):
    """Codes that were made by extraction."""
    store = tmp_path_factory.mktemp("coded") / "store"
    words = ("--device", "cpu", "--taps", "0,9", "--gather", "layers", "--gather", "sum", "--tier", "int8")
    result = coldtap("cache-features", images, store, *words)
    assert result.exit_code == 0, result.stderr
    return store


def test_inspect_of_codes_shows_their_bound_their_size_and_what_was_measured(coded):
    result = coldtap("inspect", coded)
    assert result.exit_code == 0
    about = json.loads(coldtap("inspect", coded, "--json").stdout)
    layers, total = about["arrays"]
    assert (layers["name"], total["name"]) == ("layers/g8x8-p1-c192", "sum/g8x8-p1-c192/9")
    for array in (layers, total):
        n_values = 30 * np.prod(array["shape"][1:])
        folders = [coded / part / array["name"] for part in ("features.zarr", "escapes", "features.zarr/scales")]
        n_bytes = [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders]
        metadata = (folders[0] / "zarr.json").stat().st_size
        assert array["bits_per_value"] == pytest.approx(8 * (sum(n_bytes) - metadata) / n_values)
        segments = [
            values
            for block in range(3)
            for *_, values in escapes_of(coded, array["name"], block, 512, len(array["taps"]))
        ]
        assert array["escapes"] == sum(array["escapes_by_tap"]) == sum(map(len, segments))
        assert array["escaped_share"] == array["escapes"] / n_values
        size = f"{array['bits_per_value']:.2f} bits per value on disk; {array['escapes']} escapes"
        assert f"    30 dB in every channel; {size}" in result.stdout
    assert (
        "layers/g8x8-p1-c192  (row 1536, tap 2, token 65, channel 192)  int8, compact  25 kB per row" in result.stdout
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("    tap")]
    assert len(lines) == 3
    for line, errors in zip(lines, [*layers["errors"], *total["errors"]], strict=True):
        for part in ("patch", "prefix"):
            found = errors[part]
            assert f"{part} {found['worst_snr_db']:.1f} dB in channel {found['worst_channel']} " in line
            assert f"median {found['median_snr_db']:.1f}" in line
    assert "converted " not in result.stdout


def test_inspect_of_a_converted_store_says_from_what(tmp_path, store, coded):
    for old, new, *words in (
        (store, "a", "--tier", "int8"),
        (tmp_path / "a", "b", "--tier", "int8", "--layout", "fast"),
        (tmp_path / "a", "c", "--tier", "int8", "--snr", "20"),
    ):
        assert coldtap("convert", old, tmp_path / new, *words).exit_code == 0
    shown = {name: coldtap("inspect", tmp_path / name).stdout for name in "abc"}
    digests = {name: open_store(path).digest[:12] for name, path in (("store", store), ("a", tmp_path / "a"))}
    assert f"converted  from float16, fast, digest {digests['store']}\n" in shown["a"]
    assert f"converted  from int8, compact, digest {digests['a']}, with its codes\n" in shown["b"]
    stay = "whose errors (30 dB in every channel) stay beside those below"
    assert f"converted  from int8, compact, digest {digests['a']}, {stay}\n" in shown["c"]
    origin = json.loads(coldtap("inspect", tmp_path / "b", "--json").stdout)["recorded"]["converted_from"]
    assert origin["address"] == open_store(tmp_path / "a").recipe.address
    assert origin["converted_from"]["tier"] == "float16"
    (tmp_path / "b" / MANIFEST).unlink()
    assert "run the same coldtap convert command to go on" in coldtap("inspect", tmp_path / "b").stdout


def test_an_adaptor_trains_from_a_converted_store_like_from_any(tmp_path, store):
    assert coldtap("convert", store, tmp_path / "s", "--tier", "int8").exit_code == 0
    options = ("--adaptor", "linear", "--out", tmp_path / "run", "--epochs", "10", "--lr", "0.01", "--device", "cpu")
    result = coldtap("train-adaptor", tmp_path / "s", *options)
    assert result.exit_code == 0, result.stderr
    assert "test 1.0000" in result.stdout


# train-adaptor


def test_the_help_of_an_adaptors_own_options_is_listed():
    words = ("train-adaptor", "nowhere", "--adaptor", "last", "--out", "nowhere", "--set", "help")
    result = coldtap(*words)
    assert result.exit_code == 0
    assert "rank=" in result.stdout


@pytest.mark.parametrize(
    ("setting", "message"),
    [("rank", "--set rank: expected NAME=VALUE"), ("=4", "--set =4: expected NAME=VALUE"), ("colour=red", "colour")],
)
def test_a_setting_that_no_adaptor_knows_is_refused(tmp_path, store, setting, message):
    result = coldtap("train-adaptor", store, "--adaptor", "last", "--out", tmp_path / "run", "--set", setting)
    assert result.exit_code == 2
    assert message in error_line(result)


def test_a_finished_run_says_so_and_is_left_as_it_is(store, run):
    before = files(run)
    options = ("--adaptor", "linear", "--out", run, "--epochs", "10", "--lr", "0.01", "--device", "cpu")
    result = coldtap("train-adaptor", store, *options)
    assert result.stdout.startswith(f"{run} is finished already; nothing to do\n")
    as_json = json.loads(coldtap("train-adaptor", store, *options, "--json").stdout)
    assert as_json["finished_before"] is True
    assert as_json["metrics"]["test"]["scores"]["top1"] == 1.0
    assert files(run) == before


WITHOUT_TIMM = """
import sys
from coldtap.cli.main import app

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("timm", "torchvision"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
store, out = sys.argv[1:]
for adaptor in ("linear", "mist", "last"):
    words = ["train-adaptor", store, "--adaptor", adaptor, "--out", f"{out}/{adaptor}", "--epochs", "2"]
    words += ["--device", "cpu"] + (["--set", "gap=9"] if adaptor == "last" else [])
    try:
        app(words)
    except SystemExit as end:
        assert not end.code, (adaptor, end.code)
assert not {"timm", "torchvision"} & set(sys.modules)
"""


@pytest.mark.slow
def test_adaptors_train_without_images_and_without_timm(tmp_path, images, store):
    """The images are gone, the store is somewhere else, and timm cannot be imported."""
    source = shutil.copytree(images, tmp_path / "images")
    words = ("cache-features", source, tmp_path / "begun", "--device", "cpu")
    assert coldtap(*words, "--taps", "0,9").exit_code == 0
    shutil.rmtree(source)
    moved = shutil.move(tmp_path / "begun", tmp_path / "elsewhere")
    code, one_thread = [sys.executable, "-c", WITHOUT_TIMM, moved, tmp_path], {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(code, capture_output=True, text=True, check=False, env=one_thread)
    assert ended.returncode == 0, ended.stderr
    for adaptor in ("linear", "mist", "last"):
        assert read_run(tmp_path / adaptor).metrics["test"].n_samples == 8


WITHOUT_TORCH = """
import json, sys
import numpy as np
from coldtap.stores import open_store
from coldtap.stores.reading.describe import describe_store
from coldtap.stores.verify.verify import verify_store

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("timm", "torch", "torchvision"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
store = open_store(sys.argv[1])
assert verify_store(sys.argv[1]).problems == ()
rows = store.rows("train")
sums = {}
for name, array in store.arrays.items():
    out = np.empty((len(rows), *array.row_shape), np.float32)
    array.read_into(out, rows)
    sums[name] = float(out.sum(dtype=np.float64))
labels, norm = store.targets(rows).tolist(), store.norm.weight.tolist()
assert describe_store(sys.argv[1])["complete"]
assert not {"torch", "timm", "torchvision"} & set(sys.modules)
print(json.dumps([sums, labels, norm]))
"""


def test_a_store_is_read_and_verified_in_a_process_without_torch(store):
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, store], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    sums, labels, norm = json.loads(ended.stdout)
    opened = open_store(store)
    rows = opened.rows("train")
    assert sums == {n: float(read(a, rows).sum(dtype=np.float64)) for n, a in opened.arrays.items()}
    assert labels == opened.targets(rows).tolist()
    assert norm == opened.norm.weight.tolist()


# predict


def test_predictions_on_a_labelled_folder_come_with_their_accuracy(images, run):
    result = coldtap("predict", run, images, "--split", "test", "--device", "cpu")
    lines = predicted(result)
    assert [line["id"] for line in lines] == [f"test/{name}/{i}.png" for name in ("day", "night") for i in range(4)]
    assert all(line["name"] == line["id"].split("/")[1] for line in lines)
    assert {line["predicted"] for line in lines} == {"0", "1"}
    assert all(0.5 <= float(line["probability"]) <= 1 for line in lines)
    assert result.stderr == "top-1 1.0000 on 8 labelled images\n"


def test_predictions_are_those_of_the_adaptor_on_stored_features(images, store, run):
    lines = {line["id"]: line for line in predicted(coldtap("predict", run, images, "--batch-size", "5"))}
    module, info = load_adaptor(run)
    opened = open_store(store)
    rows = np.concatenate([opened.rows(split) for split in ("train", "val", "test")])
    array = opened.arrays[info.features.array]
    features = np.empty((len(rows), *info.features.row_shape), np.float32)
    array.read_into(features, rows, info.features.taps)
    with torch.inference_mode():
        likely = module(torch.from_numpy(features)).softmax(1).max(1)
    assert len(lines) == len(rows) == 30
    for sample, label, probability in zip(opened.sample_ids(rows), likely.indices, likely.values, strict=True):
        assert int(lines[sample]["predicted"]) == label
        assert float(lines[sample]["probability"]) == pytest.approx(float(probability), abs=2e-3)  # float16 features


def test_predictions_on_labelled_parquet_are_compared_by_class_name(tmp_path, run):
    """Its classes are numbered the other way round."""
    names = ["night", "day", "night"]
    columns = {
        "image": [encoded(shade(name, 70 + i)) for i, name in enumerate(names)],
        "label": [0, 1, 0],
        "label_name": names,
        "id": ["a", "b", "c"],
    }
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    result = coldtap("predict", run, tmp_path / "images.parquet", "--device", "cpu")
    assert [(line["id"], line["name"]) for line in predicted(result)] == list(zip("abc", names, strict=True))
    assert result.stderr == "top-1 1.0000 on 3 labelled images\n"


def test_predictions_on_a_flat_folder_of_any_images_know_no_accuracy(tmp_path, run):
    for i, name in enumerate(("day", "night", "night")):
        shade(name, 80 + i).resize((50 + i, 40)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.jpg").write_bytes(b"no image")
    result = coldtap("predict", run, tmp_path, "--device", "cpu")
    lines = predicted(result)
    assert [line["name"] for line in lines] == ["day", "night", "night", ""]
    assert lines[3]["error"].startswith("not an image")
    assert result.stderr == "1 images could not be used; their lines say why\n"


def test_predictions_go_to_a_file_where_one_is_named(tmp_path, images, run):
    result = coldtap("predict", run, images, "--split", "val", "--out", tmp_path / "out.csv")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "id,predicted,name,probability,error"
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 7


def test_another_backbone_is_refused_with_the_fields_that_differ(images, run):
    result = coldtap("predict", run, images, "--model", "test_vit", "--random-weights", "--device", "cpu")
    assert result.exit_code == 4
    line = error_line(result)
    assert f"{run} was trained on features of another extractor" in line
    assert "architecture: coldtap/vit-reference → test_vit" in line
    assert "weights: " in line
    assert result.stdout == ""


def test_a_run_whose_extractor_was_another_is_refused_by_its_preprocessing(tmp_path, images):
    for name, options in (("a", ()), ("b", ("--crop-pct", "0.5", "--crop-mode", "center"))):
        words = ("cache-features", images, tmp_path / name, "--gather", "pooled", "--taps", "9", "--device", "cpu")
        assert coldtap(*words, *options).exit_code == 0
        train = ("train-adaptor", tmp_path / name, "--adaptor", "linear", "--out", tmp_path / f"run-{name}")
        assert coldtap(*train, "--epochs", "1", "--device", "cpu").exit_code == 0
    one, other = read_run(tmp_path / "run-a"), read_run(tmp_path / "run-b")
    assert one.extractor_digest != other.extractor_digest
    # Each is predicted with the preprocessing that it was trained with.
    assert coldtap("predict", tmp_path / "run-b", images, "--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{tmp}/none", "{images}"], 9, "there is no finished run at {tmp}/none"),
        (["{run}", "{tmp}/none"], 3, "{tmp}/none: no such file or folder"),
        (["{run}", "{tmp}"], 3, "no images"),
        (["{run}", "{images}", "--split", "dev"], 2, "--split dev: {images} has no such images"),
        (["{run}", "{images}", "--batch-size", "0"], 2, "--batch-size 0: give at least 1 image"),
        (["{run}", "{images}", "--out", "{tmp}/no/such/out.csv"], 7, "cannot write {tmp}/no/such/out.csv"),
    ],
)
def test_what_predict_cannot_do_is_said_in_one_line(tmp_path, images, run, words, code, message):
    known = {"tmp": tmp_path, "images": images, "run": run}
    result = coldtap("predict", *(word.format(**known) for word in words))
    line = error_line(result)
    assert result.exit_code == code, line
    assert message.format(**known) in line
