"""A job that dies at any moment goes on where it was, and ends in the bytes of a job that never died."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coldtap.errors import IncompleteStoreError
from coldtap.stores import open_store
from coldtap.stores.format.manifest import MANIFEST
from coldtap.stores.storage.atomic import TEMPORARY_SUFFIX
from coldtap.stores.storage.faults import FAULT_POINTS
from coldtap.stores.storage.lock import LOCK_NAME
from coldtap.stores.verify.verify import verify_store
from tests.helpers.pictures import write_classes

pytestmark = pytest.mark.slow

# 12 train, 3 val and 3 test images with six more views of train: nine blocks, of three shards each.
N_BLOCKS, SHARDS_A_BLOCK = 9, 3
SMALL_NETWORK = ("--model", "test_vit", "--random-weights", "--input-size", "64")  # half of a job's time goes with it
OPTIONS = (*SMALL_NETWORK, "--views", "6", "--taps", "0,5", "--batch-size", "8", "--device", "cpu")
LONG_S = 120

# Where the first life of a job is ended. Three blocks are in flight at a time, so the tenth shard belongs to
# the fourth block at the earliest, and that one begins when another has its journal line.
FIRST_DEATH = {
    "recipe-written": 1,
    "array-created": 1,
    "arrays-created": 1,
    "shard-temporary": 3 * SHARDS_A_BLOCK + 1,
    "shard-renamed": 3 * SHARDS_A_BLOCK + 1,
    "digests-renamed": 3 * SHARDS_A_BLOCK + 1,
    "block-renamed": 4,
    "journal-written": 2,
    "index-written": 1,
    "manifest-temporary": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split, n_images in (("train", 4), ("val", 1), ("test", 1)):
        write_classes(folder / split, n_images, "ant", "bee", "cat")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source, server):
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    job = server.start("cache-features", str(source), str(store), *OPTIONS)
    assert job.wait() == 0, job.err
    assert len(finished(store)) == N_BLOCKS
    yield files_of(store)
    shutil.rmtree(store)


@pytest.fixture
def store(tmp_path):
    yield tmp_path / "store"
    shutil.rmtree(tmp_path / "store")


@pytest.fixture
def start(server, source, store):
    """Start the job, the same each time."""

    def begin(fault=None):
        return server.start("cache-features", str(source), str(store), *OPTIONS, fault=fault)

    return begin


def files_of(store):
    """Every file with its bytes, but for the lock, which names a process."""
    names = {path.relative_to(store): path for path in store.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in names.items() if name.name != LOCK_NAME}


def finished(store):
    return {path.name for path in (store / "journal").glob("*.json")}


def dies_at(start, store, point, count=1):
    """Run until the fault point, and check that the job died there with what it must leave."""
    before = finished(store)
    job = start(f"{point}:{count}")
    assert job.wait() == -signal.SIGKILL, job.err
    assert not (store / MANIFEST).exists()
    assert before <= finished(store)
    with pytest.raises(IncompleteStoreError, match="incomplete"):
        open_store(store)


def wait_for(condition, job):
    """Wait until something is true of a running job."""
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert not job.has_ended(), job.err
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.002)


def is_stopped(job):
    """Whether every thread stands still: one that was waiting for the disk ends its write first."""
    states = Path(f"/proc/{job.pid}/task").glob("*/stat")
    return all(state.read_text().rpartition(")")[2].split()[0] == "T" for state in states)


def ends_as_undisturbed(start, store, undisturbed):
    job = start()
    assert job.wait() == 0, job.err
    assert (store / MANIFEST).read_bytes() == undisturbed[MANIFEST]
    assert files_of(store) == undisturbed
    assert verify_store(store).problems == ()


def test_every_fault_point_has_a_first_death():
    # A float store has no escapes: tests/stores/convert/test_convert.py.
    assert {*FIRST_DEATH, "escapes-renamed"} == set(FAULT_POINTS)


@pytest.mark.parametrize(
    ("point", "count"), [("recipe-written", 1), *(("array-created", n) for n in (1, 4, 9)), ("arrays-created", 1)]
)
def test_a_death_before_the_first_block_is_mended(start, store, undisturbed, point, count):
    dies_at(start, store, point, count)
    assert finished(store) == set()
    ends_as_undisturbed(start, store, undisturbed)


@pytest.mark.parametrize("point", [point for point in FIRST_DEATH if point != "array-created"])
def test_a_death_at_each_fault_point_after_the_first_block_ends_in_the_same_bytes(start, store, undisturbed, point):
    if point in ("recipe-written", "arrays-created"):  # passed by each life, but before its blocks
        dies_at(start, store, "journal-written")
    dies_at(start, store, point, FIRST_DEATH[point])
    n_finished = len(finished(store))
    assert n_finished >= 1
    if point in ("shard-temporary", "shard-renamed", "digests-renamed", "block-renamed", "journal-written"):
        assert n_finished < N_BLOCKS
    if point in ("shard-temporary", "manifest-temporary"):
        assert list(store.rglob(f"*{TEMPORARY_SUFFIX}")), "the temporary file was to be left behind"
    ends_as_undisturbed(start, store, undisturbed)


def test_many_deaths_in_one_life_end_in_the_same_bytes(start, store, undisturbed):
    dies_at(start, store, "journal-written")
    n_kills = 1
    for point in ("recipe-written", "arrays-created", "shard-temporary", "shard-renamed", "block-renamed"):
        dies_at(start, store, point)
        n_kills += 1
    while len(finished(store)) < N_BLOCKS:
        dies_at(start, store, "journal-written")
        n_kills += 1
    for point in ("index-written", "manifest-temporary"):
        dies_at(start, store, point)
        n_kills += 1
    assert n_kills >= 10
    ends_as_undisturbed(start, store, undisturbed)


def test_deaths_at_random_moments_after_the_first_block_end_in_the_same_bytes(start, store, undisturbed):
    moments = random.Random(0)
    n_kills = 0
    for _ in range(5):
        before = finished(store)
        if len(before) > N_BLOCKS - 2:
            break
        job = start()
        wait_for(lambda: finished(store) > before, job)  # noqa: B023 # called at once
        time.sleep(moments.uniform(0, 0.02))
        if not job.has_ended():
            job.send(signal.SIGKILL)
        if job.wait() == 0:
            break
        n_kills += 1
        assert not (store / MANIFEST).exists()
    assert n_kills >= 2
    if not (store / MANIFEST).exists():
        ends_as_undisturbed(start, store, undisturbed)
    assert files_of(store) == undisturbed


def test_the_installed_script_is_killed_and_resumed_like_any_job(start, source, store, undisturbed):
    script = Path(sys.executable).parent / "cache-features"
    environment = {**os.environ, "COLDTAP_FAULT": "shard-renamed:10", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([script, source, store, *OPTIONS], env=environment, capture_output=True, timeout=LONG_S)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert 1 <= len(finished(store)) < N_BLOCKS
    ends_as_undisturbed(start, store, undisturbed)


def half_zero(path):
    """Leave a file of the right length, as a disk does that lost its power."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.mark.parametrize("loss", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 1), half_zero])
def test_a_shard_that_the_disk_lost_after_the_death_is_written_again(start, store, undisturbed, loss):
    dies_at(start, store, "journal-written", 3)
    block = int(min(finished(store)).removesuffix(".json"))
    shards = [path for path in store.glob(f"features.zarr/*/*/**/c/{block}/**/0") if path.is_file()]
    assert len(shards) == SHARDS_A_BLOCK
    loss(shards[1])
    ends_as_undisturbed(start, store, undisturbed)


def test_a_damaged_journal_line_is_named_and_its_block_done_again_without_it(start, store, undisturbed):
    dies_at(start, store, "journal-written", 2)
    line = store / "journal" / min(finished(store))
    line.write_bytes(b"")
    job = start()
    assert job.wait() == 6
    assert f"{line} is damaged" in job.err
    assert "remove it, and the block is done again" in job.err
    line.unlink()
    ends_as_undisturbed(start, store, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_job_cleanly_and_says_how_to_go_on(start, store, undisturbed, number, code):
    job = start()
    wait_for(lambda: finished(store), job)
    job.send(signal.SIGSTOP)  # so that it cannot be done before the signal comes
    job.send(number)
    job.send(signal.SIGCONT)
    assert job.wait() == code
    n_finished = len(finished(store))
    assert 1 <= n_finished < N_BLOCKS
    last = job.err.splitlines()[-1]
    there = f"{n_finished} of {N_BLOCKS} blocks of {store} are there and stay"
    assert last == f"error: stopped: {there}; run the same command to go on"
    assert "Traceback" not in job.err
    assert not list(store.rglob(f"*{TEMPORARY_SUFFIX}"))
    ends_as_undisturbed(start, store, undisturbed)


def test_the_same_command_twice_has_nothing_to_do(start, store, undisturbed):
    ends_as_undisturbed(start, store, undisturbed)
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file() and path.name != LOCK_NAME}
    job = start()
    assert job.wait() == 0, job.err
    assert job.out.strip() == f"{store} is complete: 90 rows; nothing to do"
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert files_of(store) == undisturbed


def test_a_second_job_is_refused_while_the_first_one_writes_and_not_after_its_death(start, store, undisturbed):
    first = start()
    wait_for(lambda: finished(store), first)
    first.send(signal.SIGSTOP)
    wait_for(lambda: is_stopped(first), first)
    before = files_of(store)
    second = start()
    assert second.wait() == 5
    assert f"{store} is being written by process {first.pid} on " in second.err.splitlines()[-1]
    assert files_of(store) == before
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert f"process {first.pid}" in (store / LOCK_NAME).read_text()
    ends_as_undisturbed(start, store, undisturbed)
