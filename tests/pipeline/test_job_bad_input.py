"""Whatever is wrong with what a user gives: one line that says it, the documented exit code, and nothing lost."""

import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from coldtap.errors import TooManyRejectedError
from coldtap.stores import open_store
from coldtap.stores.format.manifest import MANIFEST
from coldtap.stores.format.targets import targets_bytes
from coldtap.stores.storage.atomic import TEMPORARY_SUFFIX
from coldtap.stores.verify.verify import verify_store
from coldtap.stores.writing.updates import update_targets
from tests.helpers.jobs import TinyNet, cache, coldtap, error_line, files, in_memory
from tests.helpers.pictures import encoded, picture, write_classes, write_pictures

SMALL_VIT = ("--model", "test_vit", "--input-size", "32", "--device", "cpu")
RANDOM = (*SMALL_VIT, "--random-weights")
NO_ROOM_BYTES = 20_000  # enough for every file but the shards


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_classes(folder / "train", 4, "ant", "bee")
    write_classes(folder / "val", 2, "ant", "bee")
    return folder


@pytest.fixture(scope="module")
def cached(tmp_path_factory, images):
    """A finished store of these images; tests copy it before they touch it."""
    store = tmp_path_factory.mktemp("cached") / "store"
    result = coldtap("cache-features", images, store, *RANDOM)
    assert result.exit_code == 0, result.stderr
    return store


def refused(code, *arguments):
    """Run a command that must fail with this code, and return its one line."""
    result = coldtap(*arguments)
    line = error_line(result)
    assert result.exit_code == code, line
    assert result.stdout == ""
    return line


# The backbone


def test_an_unknown_model_is_refused_with_close_names(tmp_path, images):
    line = refused(4, "cache-features", images, tmp_path / "s", "--model", "vit_tiny_patch61_224")
    assert "timm has no model 'vit_tiny_patch61_224'; close names: vit_tiny_patch16_224" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("option", ["--taps", "--sum-at"])
def test_an_unknown_tap_is_refused_with_the_taps_that_there_are(tmp_path, images, option):
    line = refused(4, "cache-features", images, tmp_path / "s", *RANDOM, option, "3,12")
    assert f"{option} 3,12: the backbone has taps 0 to 6; there is no tap 12" in line
    assert not (tmp_path / "s").exists()


def missing(path):
    pass


def damaged_safetensors(path):
    save_file(timm.create_model("test_vit").state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def text(path):
    path.write_text("no weights\n" * 100)


def empty(path):
    path.write_bytes(b"")


def damaged_state_dict(path):
    torch.save(timm.create_model("test_vit").state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def code_in_a_pickle(path):
    torch.save({"weights": Path("/")}, path)  # any object that is no tensor


def other_architecture(path):
    save_file(timm.create_model("test_resnet").state_dict(), path)


def other_width(path):
    save_file(timm.create_model("test_vit3").state_dict(), path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("gone.safetensors", missing, "no such file"),
        ("folder", Path.mkdir, "no such file"),
        ("short.safetensors", damaged_safetensors, "cannot be read"),
        ("text.safetensors", text, "cannot be read"),
        ("empty.safetensors", empty, "cannot be read"),
        ("short.pth", damaged_state_dict, "cannot be read"),
        ("text.pth", text, "cannot be read"),
        ("empty.pth", empty, "cannot be read"),
        ("code.pth", code_in_a_pickle, "cannot be read"),
        ("other.safetensors", other_architecture, "is of another architecture than test_vit"),
        ("wider.safetensors", other_width, "is of another architecture than test_vit"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(tmp_path, images, name, write, message):
    write(tmp_path / name)
    line = refused(4, "cache-features", images, tmp_path / "s", *SMALL_VIT, "--checkpoint", tmp_path / name)
    assert f"--checkpoint {tmp_path / name}" in line
    assert message in line
    assert not (tmp_path / "s").exists()


def test_pretrained_weights_that_cannot_be_had_say_what_else_to_do(tmp_path, images, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    line = refused(4, "cache-features", images, tmp_path / "s", "--model", "test_vit")
    assert "the pretrained weights of test_vit cannot be had" in line
    assert "--checkpoint FILE" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["cache-features", "train-adaptor"])
def test_a_gpu_where_there_is_none_is_refused(tmp_path, images, cached, command):
    source = (images, tmp_path / "s") if command == "cache-features" else (cached, "--adaptor", "linear", "--out")
    rest = RANDOM[:-3] if command == "cache-features" else (tmp_path / "s",)
    line = refused(7, command, *source, *rest, "--device", "cuda:0")
    assert "cuda:0" in line
    assert "0 GPUs" in line
    assert "--device cpu" in line
    assert files(tmp_path) == {}


# The images


def no_images(folder):
    folder.mkdir()


def class_without_images(folder):
    write_classes(folder, 3, "ant", "bee")
    (folder / "cat").mkdir()


def single_class(folder):
    write_classes(folder, 3, "ant")


def unknown_split(folder):
    write_classes(folder / "train", 3, "ant", "bee")
    write_classes(folder / "dev", 3, "ant", "bee")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (missing, "no such file or folder"),
        (no_images, "found no class folders"),
        (class_without_images, "cat: class folder without images"),
        (single_class, "a single class, 0 (ant)"),
        (unknown_split, "unknown split 'dev' beside train; accepted: train, training, val"),
        (text, "is no source"),
    ],
)
def test_a_folder_that_cannot_be_trained_from_is_refused(tmp_path, write, message):
    write(tmp_path / "source")
    line = refused(3, "cache-features", tmp_path / "source", tmp_path / "s", *RANDOM)
    assert str(tmp_path / "source") in line
    assert message in line
    assert not (tmp_path / "s").exists()


def table(**columns):
    n = 8
    base = {"image": [encoded(picture(i)) for i in range(n)], "label": [i % 2 for i in range(n)]}
    return pa.table({name: values for name, values in {**base, **columns}.items() if values is not None})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": None}, "no column image; found label"),
        ({"label": None}, "no column label; found image"),
        ({"label": [0, 2] * 4}, "labels have gaps: of the classes 0 … 2 no image has 1"),
        ({"label": [0, 1, None, 1] * 2}, "2 of 8 labels are null or negative, first null at"),
        ({"label": [0, -1] * 4}, "4 of 8 labels are null or negative, first -1 at"),
        ({"label": [0] * 8}, "a single class, 0"),
        ({"label": ["a", "b"] * 4}, "label"),
        ({"image": ["a.png"] * 8}, "column image is string; wanted bytes"),
        ({"split": ["train", "dev"] * 4}, "unknown split 'dev', in 4 images, first"),
        ({"split": ["train", None] * 4}, "unknown split null, in 4 images, first"),
        ({"split": ["test", "val"] * 4}, "no train split; found only test, val"),
        ({"id": ["same"] * 8}, "id 'same' is there twice"),
    ],
)
def test_a_parquet_file_that_cannot_be_trained_from_is_refused(tmp_path, columns, message):
    pq.write_table(table(**columns), tmp_path / "images.parquet")
    line = refused(3, "cache-features", tmp_path / "images.parquet", tmp_path / "s", *RANDOM)
    assert f"{tmp_path}/images.parquet" in line
    assert message in line
    assert not (tmp_path / "s").exists()


def test_a_damaged_parquet_file_is_refused(tmp_path):
    pq.write_table(table(), tmp_path / "images.parquet")
    data = (tmp_path / "images.parquet").read_bytes()
    (tmp_path / "images.parquet").write_bytes(data[: len(data) // 2])
    line = refused(3, "cache-features", tmp_path / "images.parquet", tmp_path / "s", *RANDOM)
    assert f"{tmp_path}/images.parquet: not a Parquet file" in line
    assert not (tmp_path / "s").exists()


def bomb():
    """A PNG of a few hundred kilobytes that claims, and holds, 225 million pixels."""
    return encoded(Image.new("1", (15_000, 15_000)))


BAD_IMAGES = {
    "truncated.jpg": (lambda: encoded(picture(0, 64, 64), "JPEG")[:600], "truncated: 600 bytes of a JPEG"),
    "text.jpg": (lambda: b"this is not a picture", "not an image: starts with"),
    "empty.png": (lambda: b"", "empty: 0 bytes"),
    "bomb.png": (bomb, "decompression bomb: "),
}
GOOD_IMAGES = {
    "one-bit.png": lambda: encoded(picture(0).convert("1")),
    "cmyk.jpg": lambda: encoded(Image.new("CMYK", (8, 8), (10, 200, 30, 40)), "JPEG"),
    "grey.png": lambda: encoded(picture(0).convert("L")),
    "palette.png": lambda: encoded(picture(0).convert("P")),
}


def with_odd_images(folder, names):
    write_classes(folder / "train", 8, "ant", "bee")
    write_classes(folder / "val", 2, "ant", "bee")
    for name in names:
        (folder / "train/ant" / name).write_bytes({**GOOD_IMAGES, **dict_of_bad()}[name]())


def dict_of_bad():
    return {name: make for name, (make, _) in BAD_IMAGES.items()}


def test_odd_images_are_kept_and_bad_ones_rejected_with_their_reasons(tmp_path):
    with_odd_images(tmp_path / "images", [*GOOD_IMAGES, *BAD_IMAGES])
    result = coldtap(
        "cache-features", tmp_path / "images", tmp_path / "s", *RANDOM, "--max-rejected", "0.5", "--gather", "pooled"
    )
    assert result.exit_code == 0, result.stderr
    assert f"24 rows, {len(BAD_IMAGES)} rejected (see rejected.parquet)" in result.stdout
    lines = pq.read_table(tmp_path / "s/rejected.parquet").to_pylist()
    reasons = {Path(line["source"]).name: line["reason"] for line in lines}
    assert set(reasons) == set(BAD_IMAGES)
    for name, (_, message) in BAD_IMAGES.items():
        assert message in reasons[name]
    kept = open_store(tmp_path / "s").samples["sample_id"].to_pylist()
    assert {f"train/ant/{name}" for name in GOOD_IMAGES} <= set(kept)
    assert verify_store(tmp_path / "s").problems == ()


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_too_many_bad_images_end_the_run_in_one_line(tmp_path, name):
    with_odd_images(tmp_path / "images", [name])
    line = refused(8, "cache-features", tmp_path / "images", tmp_path / "s", *RANDOM, "--gather", "pooled")
    assert "1 of 21 samples cannot be used, more than --max-rejected 0.01 allows: " in line
    assert f"{tmp_path}/images/train/ant/{name}: {BAD_IMAGES[name][1]}" in line
    assert not (tmp_path / "s" / MANIFEST).exists()


def test_on_bad_image_fail_ends_the_run_in_one_line(tmp_path):
    with_odd_images(tmp_path / "images", ["text.jpg"])
    options = ("--gather", "pooled", "--on-bad-image", "fail")
    line = refused(3, "cache-features", tmp_path / "images", tmp_path / "s", *RANDOM, *options)
    assert "images/train/ant/text.jpg cannot be used: not an image" in line


def test_the_whole_folder_being_bad_ends_in_one_line(tmp_path):
    for name in ("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"nothing")
    line = refused(8, "cache-features", tmp_path / "images", tmp_path / "s", *RANDOM)
    assert "samples cannot be used" in line


# Features


class Poisoned(TinyNet):
    """Its tap 1 is not finite where an image is white."""

    def __init__(self, poison):
        super().__init__()
        self.poison = poison
        self.odd = nn.Identity()

    def forward(self, images):
        maps = self.patch(images)
        white = images.mean((1, 2, 3), keepdim=True) > 0.99
        return self.blocks(self.odd(torch.where(white, self.poison, maps)))


POISONS = {"NaN": float("nan"), "infinity": float("inf"), "-infinity": float("-inf")}


@pytest.mark.parametrize("tier", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("poison", POISONS)
def test_features_that_are_not_finite_are_rejected_with_their_tap(tmp_path, poison, tier):
    images = in_memory(train=8, val=4)
    images["train"][5] = (Image.new("RGB", (8, 8), "white"), 1)
    model = Poisoned(POISONS[poison])
    taps = ["patch", "odd", "blocks.1"]
    report = cache(images, tmp_path / "s", model=model, tap_names=taps, max_rejected=0.1, tier=tier)
    assert report.n_rejected == 1
    (line,) = pq.read_table(tmp_path / "s/rejected.parquet").to_pylist()
    assert (line["source"], line["tap"]) == ("item 5 of train", 1)
    assert line["reason"] == f"{poison.removeprefix('-')} in layers at tap 1"
    assert verify_store(tmp_path / "s").problems == ()


def test_features_that_are_not_finite_beyond_the_share_fail_the_run(tmp_path):
    images = in_memory(train=8, val=4)
    images["train"][5] = (Image.new("RGB", (8, 8), "white"), 1)
    model = Poisoned(POISONS["NaN"])
    with pytest.raises(TooManyRejectedError, match=r"1 of 12 samples.*item 5 of train: NaN in layers at tap 1") as end:
        cache(images, tmp_path / "s", model=model, tap_names=["patch", "odd", "blocks.1"])
    assert end.value.exit_code == 8
    assert not (tmp_path / "s" / MANIFEST).exists()


class Twice(nn.Module):
    """Two taps of 3e38 where an image is white; float32 ends at 3.4e38."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.MaxPool2d(4), nn.Identity()

    def forward(self, images):
        white = images.mean((1, 2, 3), keepdim=True) > 0.99
        return self.second(self.first(torch.where(white, 3e38, images)))


def test_a_sum_that_overflows_float32_is_rejected_at_its_tap(tmp_path):
    images = in_memory(train=8, val=4)
    images["val"][1] = (Image.new("RGB", (8, 8), "white"), 1)
    options = {"tap_names": ["first", "second"], "max_rejected": 0.1, "tier": "float32", "sum_at": "0,1"}
    cache(images, tmp_path / "s", model=Twice(), gather=["sum"], **options)
    (line,) = pq.read_table(tmp_path / "s/rejected.parquet").to_pylist()
    assert (line["source"], line["reason"], line["tap"]) == ("item 1 of val", "infinity in sum at tap 1", 1)


# The store


def foreign_zarr(path):
    zarr.create_group(path).create_array("x", shape=(2,), dtype="f4")


def a_folder_of_papers(path):
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (text, "is a file: give the path of a store"),
        (foreign_zarr, "is a Zarr store that coldtap did not write (it holds "),
        (a_folder_of_papers, "is no store (it holds thesis.txt and no recipe.json)"),
    ],
)
def test_a_path_that_holds_something_else_is_refused_and_left_as_it_was(tmp_path, images, write, message):
    write(tmp_path / "s")
    before = files(tmp_path)
    line = refused(5, "cache-features", images, tmp_path / "s", *RANDOM)
    assert f"{tmp_path / 's'} {message}" in line
    assert files(tmp_path) == before


def test_a_path_below_a_file_is_refused(tmp_path, images):
    text(tmp_path / "file")
    before = files(tmp_path)
    line = refused(5, "cache-features", images, tmp_path / "file/s", *RANDOM)
    assert f"{tmp_path}/file/s lies below a file, not a folder" in line
    assert files(tmp_path) == before


def test_a_store_of_another_recipe_is_refused_with_each_field_old_and_new(tmp_path, images, cached):
    store = shutil.copytree(cached, tmp_path / "s")
    before = files(store)
    options = (*RANDOM, "--tier", "float32", "--crop-pct", "1", "--taps", "0,6")
    line = refused(5, "cache-features", images, store, *options)
    assert f"{store} holds another recipe; choose another path, or the old settings." in line
    assert "extractor.preprocess.crop_pct: 0.95 → 1.0" in line
    assert "encoding.tier: float16 → float32" in line
    assert "encoding.gathers.layers: [0, 1, 2, 3, 4, 5, 6] → [0, 6]" in line
    assert files(store) == before


def test_other_images_are_another_recipe(tmp_path, images, cached):
    store = shutil.copytree(cached, tmp_path / "s")
    more = shutil.copytree(images, tmp_path / "images")
    write_pictures(more / "train", "ant/new.png")
    before = files(store)
    line = refused(5, "cache-features", more, store, *RANDOM)
    assert "rows.listing: " in line
    assert "rows.splits.train: 8 → 9" in line
    assert files(store) == before


def test_an_incomplete_store_is_not_trained_from(tmp_path, cached):
    store = shutil.copytree(cached, tmp_path / "s")
    (store / MANIFEST).unlink()
    before = files(store)
    for arguments in (("train-adaptor", store, "--adaptor", "linear", "--out", tmp_path / "run"), ("verify", store)):
        line = refused(6, *arguments)
        assert f"{store} is incomplete (it has no manifest): run the same `cache-features` command again" in line
    assert files(store) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", ["train-adaptor --adaptor linear --out run", "verify", "inspect"])
def test_no_store_at_all_is_said_in_one_line(tmp_path, words):
    name, *options = words.split()
    line = refused(5, name, tmp_path / "s", *options)
    assert f"there is no store at {tmp_path / 's'}: make one with `cache-features SOURCE " in line


@pytest.mark.parametrize(
    ("gather", "adaptor", "message"),
    [
        ("layers", "mist", "MIST needs `sum`; {store} holds layers: cache again with --gather sum"),
        ("pooled", "mist", "MIST needs `sum`; {store} holds pooled: cache again with --gather sum"),
        ("sum", "last", "LAST needs `layers`; {store} holds sum: cache again with --gather layers"),
        ("pooled", "last", "LAST needs `layers`; {store} holds pooled: cache again with --gather layers"),
        ("sum", "linear", "in `pooled` or `layers`; {store} holds sum"),
    ],
)
def test_a_store_without_the_gather_that_an_adaptor_needs_is_refused(tmp_path, gather, adaptor, message):
    store = tmp_path / "s"
    cache(in_memory(train=8, val=4), store, gather=[gather])
    before = files(store)
    line = refused(5, "train-adaptor", store, "--adaptor", adaptor, "--out", tmp_path / "run", "--device", "cpu")
    assert message.format(store=store) in line
    assert files(store) == before
    assert not (tmp_path / "run").exists()


def test_a_store_of_a_single_class_is_not_trained_from(tmp_path):
    store = tmp_path / "s"
    cache(in_memory(train=8, val=4), store)
    labels = pq.read_table(store / "targets/label.parquet")
    update_targets(store, "label", targets_bytes(labels["sample_id"].to_pylist(), [0] * 12, None))
    line = refused(3, "train-adaptor", store, "--adaptor", "linear", "--out", tmp_path / "run", "--device", "cpu")
    assert "every train sample is of class" in line
    assert not (tmp_path / "run/run.json").exists()


# The machine


def ended(job, code):
    """The one line of a job that must end with this code."""
    assert job.wait() == code, job.err
    assert "Traceback" not in job.err
    errors = [line for line in job.err.splitlines() if line.startswith("error: ")]
    assert errors == job.err.splitlines()[-1:]
    return errors[0]


def test_a_file_size_limit_ends_the_job_in_one_line_and_with_room_it_goes_on(server, tmp_path, images, cached):
    command = ("cache-features", images, tmp_path / "s", *RANDOM)
    line = ended(server.start(*command, file_bytes=NO_ROOM_BYTES), 7)
    assert f"error: cannot write {tmp_path}/s/features.zarr/" in line
    assert "the file-size limit of this process is reached: raise it (ulimit -f), then run the same command" in line
    assert not (tmp_path / "s" / MANIFEST).exists()
    assert not list((tmp_path / "s").rglob(f"*{TEMPORARY_SUFFIX}"))
    again = server.start(*command)
    assert again.wait() == 0, again.err
    assert files(tmp_path / "s") == files(cached)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of its own that has room for bytes, and for 30 files alone."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m,nr_inodes=30", "tmpfs", place]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_job_in_one_line_and_with_room_it_goes_on(server, tiny_disk, images, cached):
    command = ("cache-features", images, tiny_disk / "s", *RANDOM)
    line = ended(server.start(*command), 7)
    assert f"error: cannot write {tiny_disk}/s/" in line
    assert "the disk is full: free some space, then run the same command again" in line
    assert not (tiny_disk / "s" / MANIFEST).exists()
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", tiny_disk], check=True)
    again = server.start(*command)
    assert again.wait() == 0, again.err
    assert files(tiny_disk / "s") == files(cached)


def test_a_disk_that_is_too_small_is_refused_before_the_job_starts(tiny_disk, images):
    subprocess.run(["mount", "-o", "remount,size=64k", tiny_disk], check=True)
    line = refused(7, "cache-features", images, tiny_disk / "s", *RANDOM)
    assert f"{tiny_disk}/s needs " in line
    assert " MB are free there: free some space, choose another path, or keep less" in line
    assert list(tiny_disk.iterdir()) == []


@pytest.fixture
def place(tmp_path):
    """A folder that a test can close; it is opened again at its end."""
    write_classes(tmp_path / "place/images", 4, "ant", "bee")
    yield tmp_path / "place"
    for path in [tmp_path / "place", *(tmp_path / "place").rglob("*")]:
        path.chmod(0o755)


def close(place):
    """Take away the right to write; the job must then heed modes, which root does not."""
    for path in [place, *place.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return {"heed_modes": True}


def test_a_place_that_may_not_be_written_is_refused(server, place):
    how = close(place)
    line = ended(server.start("cache-features", place / "images", place / "s", *RANDOM, **how), 7)
    assert f"error: cannot write {place}/s: no permission to write there: choose another path" in line
    assert not (place / "s").exists()


def test_a_begun_store_that_may_not_be_written_is_refused_and_left_as_it_was(server, place):
    command = ("cache-features", place / "images", place / "s", *RANDOM)
    server.start(*command, fault="journal-written:1").wait()
    before = files(place / "s")
    line = ended(server.start(*command, **close(place)), 7)
    assert f"error: cannot write {place}/s" in line
    assert "no permission to write there" in line
    assert files(place / "s") == before


def test_a_finished_store_that_may_not_be_written_still_has_nothing_to_do(server, place):
    command = ("cache-features", place / "images", place / "s", *RANDOM)
    assert server.start(*command).wait() == 0
    again = server.start(*command, **close(place))
    assert again.wait() == 0, again.err
    assert "nothing to do" in again.out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_store_that_may_not_be_read_is_said_in_one_line(server, place, command):
    assert server.start("cache-features", place / "images", place / "s", *RANDOM).wait() == 0
    for name in ("recipe.json", MANIFEST):
        (place / "s" / name).chmod(0)
    line = ended(server.start(command, place / "s", heed_modes=True), 7)
    assert "Permission denied" in line
    assert str(place / "s") in line
