"""Whole jobs on a storage in memory: the same bytes as on a disk, and everything can be read from it."""

import pickle

import numpy as np
import pytest

from coldtap.adaptors import evaluate_adaptor, load_adaptor, read_run, train_adaptor, train_trials
from coldtap.adaptors.training.checkpoint import CHECKPOINT
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.errors import (
    CorruptStoreError,
    InterruptedRunError,
    OptionError,
    RecipeMismatchError,
    RunError,
    StoreError,
    StoreLockedError,
)
from coldtap.stores import open_store
from coldtap.stores.compensation.fit import fit_compensation
from coldtap.stores.convert.convert import convert_store
from coldtap.stores.editing.add_targets import add_targets
from coldtap.stores.reading.describe import describe_store
from coldtap.stores.storage.memory import MemoryStorage
from coldtap.stores.verify.verify import verify_store
from tests.helpers.jobs import cache, files, in_memory, read
from tests.helpers.twins import make_twins

TRAINING = {"epochs": 2, "batch_size": 4, "device": "cpu", "seed": 0}


@pytest.fixture
def images():
    return in_memory(train=24, val=8, test=8)


def contents(storage):
    """All objects with their bytes."""
    return {key: storage.get(key, limit=None) for key in storage.list()}


def copied(folder):
    """A storage in memory with the files of a folder."""
    storage = MemoryStorage()
    for name, data in files(folder).items():
        storage.put(name, [data])
    return storage


def test_a_job_in_memory_writes_the_bytes_of_one_on_a_disk(tmp_path, images):
    storage = MemoryStorage()
    report, on_disk = cache(images, storage, views=1), cache(images, tmp_path / "s", views=1)
    assert contents(storage) == files(tmp_path / "s")
    assert (report.store, on_disk.store) == (storage, tmp_path / "s")
    assert report.forecast.free_bytes is None
    assert report.digest == on_disk.digest
    assert cache(images, storage, views=1).status == "unchanged"
    with pytest.raises(RecipeMismatchError, match="memory://"):
        cache(images, storage, views=2)


def test_what_reads_a_store_reads_it_from_memory(tmp_path, images):
    storage = MemoryStorage()
    cache(images, storage.below("s"))
    cache(images, tmp_path / "s")
    there, on_disk = open_store(storage.below("s")), open_store(tmp_path / "s")
    assert verify_store(storage.below("s")).problems == ()
    rows = on_disk.rows("train")
    for store in (there, pickle.loads(pickle.dumps(there))):
        np.testing.assert_array_equal(store.targets(rows), on_disk.targets(rows))
        assert store.sample_ids(rows) == on_disk.sample_ids(rows)
        for name, array in store.arrays.items():
            array.will_need(rows)
            np.testing.assert_array_equal(read(array, rows), read(on_disk.arrays[name], rows))
    about, expected = describe_store(storage.below("s")), describe_store(tmp_path / "s")
    lock = (tmp_path / "s/.lock").stat().st_size
    assert about | {"path": ""} == expected | {"path": "", "n_bytes": expected["n_bytes"] - lock}
    with pytest.raises(StoreError, match=r"memory://.*/s lies in no folder"):
        _ = there.path


def test_conversions_and_additions_in_memory_write_the_same_bytes(tmp_path, images):
    storage = MemoryStorage()
    old, new = storage.below("old"), storage.below("new")
    for store, other in ((old, new), (tmp_path / "old", tmp_path / "new")):
        cache(images, store, tier="float32")
        assert convert_store(store, other, tier="int8", snr=25).status == "written"
        ids = open_store(other).samples["sample_id"].to_pylist()
        add_targets(other, "odd", {sample: [i % 2] for i, sample in enumerate(ids)}, kind="labels")
    assert contents(new) == files(tmp_path / "new")
    assert verify_store(new).problems == ()
    assert convert_store(old, new, tier="int8", snr=25).status == "unchanged"
    for place in (old, old.below("in"), storage):
        with pytest.raises(OptionError, match="give a path outside it"):
            convert_store(old, place, tier="int8")


def test_a_compensation_in_memory_is_that_of_a_disk(tmp_path):
    twins = make_twins(tmp_path)
    store, float_store = copied(twins.store), copied(twins.float_store)
    report, on_disk = fit_compensation(store, float_store), fit_compensation(twins.store, twins.float_store)
    assert contents(store) == files(twins.store)
    assert (report.digest, report.store) == (on_disk.digest, store)


def test_damage_in_memory_is_told(images):
    storage = MemoryStorage()
    cache(images, storage)
    (shard, *_) = (key for key in storage.list() if "/c/" in key and "layers" in key)
    data = bytearray(storage.get(shard))
    data[40] ^= 1
    storage.put(shard, [data])
    (problem, *_) = verify_store(storage).problems
    assert problem.where.startswith(shard)
    storage.put(shard, [data[:-10]])
    store = open_store(storage)
    array = store.arrays[shard.removeprefix("features.zarr/").partition("/c/")[0]]
    with pytest.raises(CorruptStoreError, match="memory://"):
        read(array, store.rows("train"))
    storage.delete("manifest")
    storage.delete("recipe.json")
    with pytest.raises(StoreError, match=r"memory://.* is no store \(it holds digests, features.zarr, journal …"):
        cache(images, storage)


def test_one_job_at_a_time_writes_to_a_storage(images):
    storage = MemoryStorage()
    with storage.lock(), pytest.raises(StoreLockedError, match=r"memory://.* is being written by"):
        cache(images, storage)
    assert cache(images, storage).status == "written"


def test_a_training_in_memory_is_that_on_a_disk(tmp_path, images):
    storage = MemoryStorage()
    store, out = storage.below("store"), storage.below("run")
    cache(images, store)
    cache(images, tmp_path / "s")
    ours = train_adaptor(store, "linear", out=out, **TRAINING)
    theirs = train_adaptor(tmp_path / "s", "linear", out=tmp_path / "run", **TRAINING)
    assert (ours.path, theirs.path) == (out, tmp_path / "run")
    assert ours.info.metrics == theirs.info.metrics
    written, on_disk = contents(out), files(tmp_path / "run")
    assert set(written) == set(on_disk)
    for name in ("adaptor.safetensors", "predictions.parquet"):
        assert written[name] == on_disk[name]
    again = train_adaptor(store, "linear", out=out, **TRAINING)
    assert again.was_finished
    assert again.info == ours.info == read_run(out)
    here, there = evaluate_adaptor(out, store, device="cpu"), evaluate_adaptor(theirs.path, store, device="cpu")
    assert here.metrics == there.metrics == ours.info.metrics["test"]
    assert (here.run, there.run) == (out, tmp_path / "run")
    loaded, kept = load_adaptor(out)[0].state_dict(), load_adaptor(tmp_path / "run")[0].state_dict()
    assert all((loaded[name] == kept[name]).all() for name in kept)
    with pytest.raises(RunError, match=r"memory://.*/run holds a run of other settings"):
        train_adaptor(store, "linear", out=out, **TRAINING | {"epochs": 3})
    with pytest.raises(RunError, match="is a store"):
        train_adaptor(store, "linear", out=store, **TRAINING)
    with out.lock(named=False), pytest.raises(RunError, match=r"another training writes into memory://"):
        train_adaptor(store, "linear", out=out, **TRAINING)


def test_an_interrupted_training_in_memory_goes_on(images):
    storage = MemoryStorage()
    store, out = storage.below("store"), storage.below("run")
    cache(images, store)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        train_adaptor(store, "linear", out=out, progress=stop, checkpoint_every_s=0, **TRAINING)
    assert list(out.list()) == [CHECKPOINT]
    undisturbed = train_adaptor(store, "linear", out=storage.below("other"), **TRAINING)
    resumed = train_adaptor(store, "linear", out=out, **TRAINING)
    assert resumed.resumed_after == 1
    assert CHECKPOINT not in out.list()
    assert resumed.info.metrics == undisturbed.info.metrics


def test_trials_in_memory_have_run_folders_a_table_and_a_choice(images):
    storage = MemoryStorage()
    store, out = storage.below("store"), storage.below("trials")
    cache(images, store)
    training = TrainingOptions(epochs=2, batch_size=4)
    trials = train_trials(store, "linear", [{"lr": 0.1}, {"lr": 0.001}], out=out, training=training, device="cpu")
    assert trials.path == out
    written = {key.partition("/")[0] for key in out.list()}
    assert written == {*(result.plan.name for result in trials.results), "trials.csv", "trials.png"}
    (chosen,) = trials.chosen
    assert read_run(chosen.path) == chosen.info
    assert set(chosen.info.metrics) == {"val", "test"}
