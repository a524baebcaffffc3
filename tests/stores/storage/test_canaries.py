"""Commands on stores and runs that a stranger has filled with links: nothing outside is read, written or removed."""

import json
import os
import shutil
import socket

import pytest

from coldtap.adaptors import train_adaptor
from tests.helpers.jobs import cache, coldtap, error_line, in_memory

PRECIOUS = b"precious"
TRAIN = ("--adaptor", "linear", "--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store and a finished run on it."""
    place = tmp_path_factory.mktemp("made")
    cache(in_memory(train=12, val=4, test=4), place / "store", tier="float32")
    train_adaptor(place / "store", "linear", out=place / "run", epochs=2, device="cpu")
    return place


@pytest.fixture
def outside(tmp_path):
    """A folder with files of names that coldtap uses, which must stay as they are."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    names = (
        "file",
        "a.partial",
        ".lock",
        "run.json",
        "recipe.json",
        "manifest",
        "deep/00000000.json",
        "deep/x.partial",
    )
    for name in names:
        (folder / name).write_bytes(PRECIOUS)
    yield folder
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == dict.fromkeys(names, PRECIOUS)


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def refused(result, name):
    """The command ended with one line that names the link."""
    assert result.exit_code in (1, 5, 6, 7, 9), result.stderr
    said = result.stdout + result.stderr
    assert f"{name}" in said
    assert "is a link" in said or "is not a regular file" in said
    assert "Traceback" not in said


READERS = {
    "inspect": lambda store, tmp: coldtap("inspect", store),
    "verify": lambda store, tmp: coldtap("verify", store),
    "train": lambda store, tmp: coldtap("train-adaptor", store, "--out", tmp / "new-run", *TRAIN),
    "convert": lambda store, tmp: coldtap("convert", store, tmp / "new", "--tier", "float16"),
}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((command, name) for command in READERS for name in ("recipe.json", "manifest")),
        *(("verify", name) for name in ("samples.parquet", "features.zarr/zarr.json", "journal/00000000.json")),
        *((command, "targets/label.parquet") for command in ("verify", "train", "convert")),
    ],
)
def test_no_command_reads_a_linked_file_of_a_store(store, outside, tmp_path, command, name):
    (store / name).unlink()
    (store / name).symlink_to(outside / "file")
    refused(READERS[command](store, tmp_path), name)


@pytest.mark.parametrize("folder", ["journal", "targets", "features.zarr"])
def test_no_command_reads_or_sweeps_a_linked_folder_of_a_store(store, outside, tmp_path, folder):
    shutil.rmtree(store / folder)
    (store / folder).symlink_to(outside / "deep", target_is_directory=True)
    refused(coldtap("verify", store), folder)
    if folder != "journal":  # which nobody else reads in a complete store
        for command in ("convert", "train"):
            refused(READERS[command](store, tmp_path), folder)


def test_links_to_files_are_read_where_the_user_says_so_and_held_against_the_manifest(store, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in store.rglob("*") if path.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))
    refused(coldtap("verify", store), "manifest")
    assert coldtap("verify", store, "--follow-links").exit_code == 0
    assert coldtap("inspect", store, "--follow-links").exit_code == 0
    assert coldtap("train-adaptor", store, "--out", tmp_path / "r", "--follow-links", *TRAIN).exit_code == 0
    evaluated = coldtap("evaluate", tmp_path / "r", store, "--follow-links", "--device", "cpu", "--json")
    assert json.loads(evaluated.stdout)["split"] == "test"
    converted = coldtap("convert", store, tmp_path / "new", "--tier", "float16", "--follow-links")
    assert converted.exit_code == 0, converted.stderr
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    samples = next(path for path in blobs.iterdir() if (store / "samples.parquet").resolve() == path)
    samples.write_bytes(samples.read_bytes()[:-1] + b"x")
    assert coldtap("verify", store, "--follow-links").exit_code == 1


@pytest.mark.parametrize("name", ["run.json", "adaptor.safetensors", "checkpoint.safetensors"])
def test_no_training_reads_or_writes_through_links_of_its_folder(made, run, outside, name):
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "file")
    if name == "checkpoint.safetensors":
        (run / "run.json").unlink()
    result = coldtap("train-adaptor", made / "store", "--out", run, *TRAIN)
    if name != "adaptor.safetensors":  # of a finished run its record is enough
        refused(result, name)
    if name != "checkpoint.safetensors":
        refused(coldtap("evaluate", run, made / "store", "--device", "cpu"), name)


def test_trials_do_not_write_into_linked_run_folders(made, outside, tmp_path):
    grid = ("--grid", "lr=0.1,0.2")
    assert coldtap("train-adaptor", made / "store", "--out", tmp_path / "t", *TRAIN, *grid).exit_code == 0
    first = next(path for path in sorted((tmp_path / "t").iterdir()) if path.is_dir())
    shutil.rmtree(first)
    first.symlink_to(outside / "deep", target_is_directory=True)
    refused(coldtap("train-adaptor", made / "store", "--out", tmp_path / "t", *TRAIN, *grid), first.name)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("name", ["recipe.json", "manifest"])
def test_pipes_and_devices_never_hang_a_command(store, tmp_path, monkeypatch, name, kind):
    (store / name).unlink()
    if kind == "pipe":
        os.mkfifo(store / name)
    elif kind == "device":
        (store / name).symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(store)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as held:
            held.bind(name)
    for command in READERS:
        result = READERS[command](store, tmp_path)
        assert result.exit_code in (1, 5, 6, 7), result.stderr
        assert "Traceback" not in result.stderr


def test_an_export_replaces_a_link_and_leaves_what_it_leads_to(run, outside):
    pytest.importorskip("onnx")
    (run / "adaptor.onnx").symlink_to(outside / "nowhere")
    result = coldtap("export", run)
    assert (result.exit_code, (outside / "nowhere").exists()) == (0, False), error_line(result)
