"""`--workers N`: the bytes of one process, whoever dies, and errors as one process has them."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from coldtap.errors import OptionError
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.images.sources import open_source
from coldtap.pipeline.images.sources.spool import Spool
from coldtap.pipeline.plan.description import JobDescription
from coldtap.pipeline.run.same_threads import batch_sizes, threads_with_the_same_features
from coldtap.stores import open_store
from coldtap.stores.format.manifest import MANIFEST
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.storage.atomic import TEMPORARY_SUFFIX
from tests.helpers.jobs import SMALL, TAPS, TinyNet, cache, files, in_memory
from tests.helpers.pictures import picture, write_classes
from tests.helpers.places import ROOT

# 12 train, 3 val and 3 test images, and further views of train: a block for each view of 12 images.
VIEWS = 16
N_BLOCKS = VIEWS + 3
OPTIONS = ("--views", str(VIEWS), "--taps", "0,9", "--batch-size", "8", "--device", "cpu")
LONG_S = 180


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split, n_images in (("train", 4), ("val", 1), ("test", 1)):
        write_classes(folder / split, n_images, "ant", "bee", "cat")
    return folder


@pytest.fixture(scope="module")
def start(server, source):
    def begin(store, *options, **limits):
        return server.start("cache-features", source, store, *OPTIONS, *options, **limits)

    return begin


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, start):
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    job = start(store)
    assert job.wait() == 0, job.err
    assert len(finished(store)) == N_BLOCKS
    yield files(store)
    shutil.rmtree(store)


def finished(store):
    return {path.name for path in (store / "journal").glob("*.json")}


def workers_of(pid):
    """The worker processes of a job."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, job, limit_s=LONG_S):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for too long: {job.err}"
        time.sleep(0.01)


def begin_and_see_blocks(start, store, *options):
    """A job with two workers that has done some blocks, not all, and its workers."""
    before = finished(store)
    job = start(store, "--workers", "2", *options)
    wait_for(lambda: finished(store) > before or job.has_ended(), job)
    workers = workers_of(job.pid)
    assert len(workers) == 2, job.err
    assert not (store / MANIFEST).exists()
    return job, workers


def error_of(job):
    assert "Traceback" not in job.err
    errors = [line for line in job.err.splitlines() if line.startswith("error: ")]
    assert errors == job.err.splitlines()[-1:]
    return errors[0].removeprefix("error: ")


# Without a cluster.


def test_fewer_workers_than_one_is_an_option_error(tmp_path):
    for n_workers in (0, -1):
        with pytest.raises(OptionError, match=f"`workers={n_workers}`: give at least 1 process"):
            cache(in_memory(train=8, val=4), tmp_path / "s", workers=n_workers)


def test_one_worker_and_a_dry_run_import_no_dask(tmp_path):
    code = (
        "import sys\nfrom tests.helpers.jobs import cache, in_memory\n"
        f"cache(in_memory(train=8, val=4), {str(tmp_path / 'dry')!r}, workers=2, dry_run=True)\n"
        f"cache(in_memory(train=8, val=4), {str(tmp_path / 's')!r}, workers=1)\n"
        "assert not {'dask', 'distributed', 'tornado'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert not (tmp_path / "dry").exists()


class Locked(TinyNet):
    """A module that holds what cannot be pickled, until it is copied."""

    def __init__(self):
        super().__init__()
        self.generator = (number for number in range(3))

    def __deepcopy__(self, memo):
        return TinyNet()


def test_a_model_that_cannot_be_pickled_is_one_clear_error(tmp_path):
    with pytest.raises(OptionError, match=r"`workers` sends source and model .* cannot be pickled .*`workers=1`"):
        cache(in_memory(train=8, val=4), tmp_path / "s", model=Locked(), workers=2)
    assert not (tmp_path / "s").exists()


class Broken:
    """Can be pickled, but not made anew."""

    def __reduce__(self):
        return int, ("not a number",)


def test_a_source_that_cannot_be_made_anew_is_one_clear_error():
    with pytest.raises(OptionError, match=r"cannot make source or model anew \(ValueError: .*or use `workers=1`"):
        JobDescription.loads(pickle.dumps(Broken()))


class Summing(nn.Module):
    """A tap whose bits depend on the number of threads, as those of a mean over few images do."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, images):
        patches = self.patch(images)
        return patches + (1e-6 * torch.get_num_threads() if len(images) < 4 else 0.0)


@pytest.mark.parametrize(("sizes", "threads"), [({4, 8}, 1), ({3, 4}, 2)])
def test_a_worker_takes_fewer_threads_only_where_the_features_stay_the_same(sizes, threads):
    model = nn.Sequential(Summing(), nn.Identity())
    backbone = load_backbone(model, device="cpu", preprocess=SMALL, tap_names=("0", "1"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert threads_with_the_same_features(backbone, sizes, 1) == threads
        assert threads_with_the_same_features(backbone, sizes, 2) == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_size_of_a_batch_is_tried():
    ids = [str(number) for number in range(30)]
    plan = RowPlan.of(ids, ["train"] * 21 + ["val"] * 9, keep=["train", "val"], views=0, seed=0, block_rows=16)
    assert batch_sizes(plan, 8) == {8, 5, 1}  # train 16 and 5, val 9
    assert batch_sizes(plan, 32) == {16, 5, 9}


def write_parquet(path):
    images = []
    for number in range(24):
        data = io.BytesIO()
        picture(number).save(data, "PNG")
        images.append(data.getvalue())
    split = ["train"] * 16 + ["val"] * 8
    pq.write_table(pa.table({"image": images, "label": [n % 2 for n in range(24)], "split": split}), path)
    return images


def test_another_process_reads_a_spool_without_copying_it(tmp_path):
    images = write_parquet(tmp_path / "images.parquet")
    source = open_source(tmp_path / "images.parquet")
    shared = tmp_path / "shared"
    shared.write_bytes(pickle.dumps(source.share_spool()))
    code = (
        "import pickle, sys, tempfile\nfrom coldtap.pipeline.images.sources.spool import Spool\n"
        "tempfile.mkstemp = None\n"
        f"spool = Spool.join(pickle.load(open({str(shared)!r}, 'rb')))\n"
        "sys.stdout.buffer.write(spool.read(23))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert ran.stdout == images[23]


def test_a_spool_that_cannot_be_reached_is_made_again(tmp_path):
    images = write_parquet(tmp_path / "images.parquet")
    shared = open_source(tmp_path / "images.parquet").share_spool()  # closed with its source
    assert Spool.join(shared) is None
    again = open_source(tmp_path / "images.parquet")
    again.use_spool(shared)
    assert again.read(5) == images[5]


def test_sources_travel_with_their_listing(tmp_path):
    write_parquet(tmp_path / "images.parquet")
    for source in (open_source(tmp_path / "images.parquet"), open_source(in_memory(train=8, val=4))):
        source.read(0)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.listing == source.listing
        assert np.array_equal(np.asarray(copy.read(3)), np.asarray(source.read(3)))


# With a cluster.


@pytest.mark.slow
def test_two_workers_write_the_codes_and_escapes_of_one_process(tmp_path, start):
    """The bytes of a float store: the deaths below end in them."""
    options = ("--tier", "int8", "--layout", "compact", "--snr", "40", "--views", "6")
    for name, n_workers in (("one", 1), ("two", 2)):
        job = start(tmp_path / name, *options, "--workers", n_workers)
        assert job.wait() == 0, job.err
    assert files(tmp_path / "two") == files(tmp_path / "one")
    lines = [json.loads(path.read_text()) for path in (tmp_path / "two/journal").glob("*.json")]
    assert any("/escapes/" in name for line in lines for name in line["files"])
    rows = 12 * 7 + 6
    lines = job.err.splitlines()
    assert lines[0].startswith(f"forecast: {rows} rows")
    assert all(f"/{rows} rows" in line for line in lines[1:])
    assert f" {rows}/{rows} rows" in f" {lines[-1]}"


@pytest.mark.slow
def test_a_python_model_and_a_parquet_source_travel_to_workers(tmp_path, monkeypatch):
    write_parquet(tmp_path / "images.parquet")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    told = []
    reporter = type("Told", (), {"note": told.append, "forecast": told.append, "advance": told.append})()
    cache(tmp_path / "images.parquet", tmp_path / "one", views=2)
    cache(tmp_path / "images.parquet", tmp_path / "two", views=2, workers=2, reporter=reporter)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert sum(rows for rows in told if isinstance(rows, int)) == 3 * 16 + 8
    assert list(scratch.iterdir()) == []
    assert tuple(tap.name for tap in open_store(tmp_path / "two").recipe.extractor.taps) == TAPS


@pytest.mark.slow
def test_workers_end_with_a_killed_job_and_the_next_one_that_loses_a_worker_ends_in_the_same_bytes(
    tmp_path, start, undisturbed
):
    job, workers = begin_and_see_blocks(start, tmp_path / "s")
    job.send(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    wait_for(lambda: not any(map(is_alive, workers)), job, 10)
    assert 1 <= len(finished(tmp_path / "s")) < N_BLOCKS
    job, workers = begin_and_see_blocks(start, tmp_path / "s")
    os.kill(workers[0], signal.SIGKILL)
    assert job.wait() == 0, job.err
    assert files(tmp_path / "s") == undisturbed
    assert "Traceback" not in job.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_job_and_workers_and_one_process_goes_on(tmp_path, start, undisturbed, number, code):
    store = tmp_path / "s"
    job, workers = begin_and_see_blocks(start, store)
    began = time.monotonic()
    for pid in (*workers, job.pid) if number == signal.SIGINT else (job.pid,):  # Ctrl-C goes to all of a terminal
        os.kill(pid, number)
    assert job.wait() == code
    assert time.monotonic() - began < 20
    wait_for(lambda: not any(map(is_alive, workers)), job, 1)
    there = len(finished(store))
    assert 1 <= there < N_BLOCKS
    said = f"stopped: {there} of {N_BLOCKS} blocks of {store} are there and stay; run the same command to go on"
    assert error_of(job) == said
    assert not list(store.rglob(f"*{TEMPORARY_SUFFIX}"))
    job = start(store)
    assert job.wait() == 0, job.err
    assert files(store) == undisturbed


@pytest.mark.slow
def test_a_bad_image_in_a_worker_ends_the_job_as_in_one_process(tmp_path, server, source):
    images = tmp_path / "images"
    shutil.copytree(source, images)
    next((images / "train").rglob("*.png")).write_bytes(b"no image")
    for n_workers in (1, 2):
        job = server.start(
            "cache-features",
            images,
            tmp_path / f"s{n_workers}",
            *OPTIONS,
            "--on-bad-image",
            "fail",
            "--workers",
            n_workers,
        )
        assert job.wait() == 3
        assert "cannot be used" in error_of(job)
        assert "--on-bad-image fail" in error_of(job)


@pytest.mark.slow
def test_a_block_that_kills_its_workers_ends_the_job_with_its_number(tmp_path, start):
    job = start(tmp_path / "s", "--workers", "2", fault="shard-temporary:1")
    assert job.wait() == 7, job.err
    error = error_of(job)
    assert "worker processes died 3 times while they had block " in error
    assert "memory ran out" in error


@pytest.mark.slow
def test_a_full_disk_in_a_worker_is_the_error_of_one_process(tmp_path, start):
    job = start(tmp_path / "s", "--workers", "2", file_bytes=100_000)
    assert job.wait() == 7, job.err
    assert "the file-size limit of this process is reached" in error_of(job)
