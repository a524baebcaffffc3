"""Batches: every sample once, in an order that (seed, epoch) alone decides, in bounded memory."""

import threading

import numpy as np
import pytest
import torch

from coldtap.adaptors.batches import PREFETCH, FeatureBatches, epoch_draw
from coldtap.adaptors.contract import spec_of
from coldtap.adaptors.memory import available_memory_bytes, decide_residency
from coldtap.stores import StoredArray, open_store
from coldtap.stores.errors import CorruptStoreError, SourceError
from tests.synthetic import GEOMETRY, synthetic_store

N_TRAIN, N_VAL = 21, 6
SPLITS = ["train"] * N_TRAIN + ["val"] * N_VAL
TARGETS = [i % 3 for i in range(N_TRAIN + N_VAL)]
LAYERS = "layers/g2x3-p1-c8"


def write_store(path, *, views=0, **arguments):
    """Every number of a row says which sample, view and tap it is: 100 · sample + 10 · view + tap."""
    sample, view, tap = np.ogrid[: len(SPLITS), : views + 1, :4]
    codes = (100 * sample + 10 * view + tap).transpose(1, 0, 2)[..., None, None]
    features = np.broadcast_to(codes, (views + 1, len(SPLITS), 4, GEOMETRY.tokens, GEOMETRY.channels))
    synthetic_store(path, features, TARGETS, SPLITS, views=views, block_rows=4, **arguments)
    return open_store(path)


def batches_of(store, split="train", *, resident, taps=(1, 3), batch_size=4):
    spec = spec_of(store, store.arrays[LAYERS], taps)
    return FeatureBatches(store, spec, split, batch_size=batch_size, resident=resident)


def drawn(batches):
    """(samples, views, targets) of an epoch, with every number of its features checked."""
    samples, views, targets = [], [], []
    for batch in batches:
        code = batch.features[:, 0, 0, 0]
        expected = (code[:, None] + torch.tensor([0.0, 2.0]))[..., None, None]  # taps 1 and 3
        assert torch.equal(batch.features, expected.expand_as(batch.features))
        samples += (code // 100).int().tolist()
        views += (code % 100 // 10).int().tolist()
        targets += batch.targets.tolist()
    return samples, views, targets


@pytest.mark.parametrize("resident", [True, False])
def test_an_epoch_holds_every_sample_once_with_its_target(tmp_path, resident):
    batches = batches_of(write_store(tmp_path / "s"), resident=resident)
    samples, _, targets = drawn(batches.shuffled(seed=0, epoch=1))
    assert sorted(samples) == list(range(N_TRAIN))
    assert samples != sorted(samples)
    assert targets == [TARGETS[i] for i in samples]
    assert batches.n_batches == 6  # 21 samples: five batches of 4, one of 1


def test_the_order_is_a_pure_function_of_seed_and_epoch(tmp_path):
    store = write_store(tmp_path / "s", views=2)
    np.random.seed(7)  # global state must not matter
    torch.manual_seed(7)
    orders = {
        (resident, seed, epoch, batch_size): drawn(
            batches_of(store, resident=resident, batch_size=batch_size).shuffled(seed=seed, epoch=epoch)
        )
        for resident, batch_size in ((True, 4), (False, 4), (True, 5))
        for seed in (0, 1)
        for epoch in (2, 1)
    }
    assert orders[True, 0, 1, 4] == orders[False, 0, 1, 4] == orders[True, 0, 1, 5]
    different = [orders[True, seed, epoch, 4][0] for seed in (0, 1) for epoch in (1, 2)]
    assert len({tuple(order) for order in different}) == 4
    order, views = epoch_draw(21, 3, seed=0, epoch=1)
    again, views_again = epoch_draw(21, 3, seed=0, epoch=1)
    np.testing.assert_array_equal(order, again)
    np.testing.assert_array_equal(views, views_again)


def test_an_epoch_draws_one_view_a_sample_and_all_views_over_time(tmp_path):
    batches = batches_of(write_store(tmp_path / "s", views=2), resident=True)
    counts = np.zeros((N_TRAIN, 3), int)
    for epoch in range(30):
        samples, views, _ = drawn(batches.shuffled(seed=0, epoch=epoch))
        assert sorted(samples) == list(range(N_TRAIN))
        np.add.at(counts, (samples, views), 1)
    assert counts.min() >= 1
    # 630 draws of three views: 210 each, standard deviation 12.
    assert np.abs(counts.sum(axis=0) - 210).max() < 48


def test_val_is_read_in_order_and_from_view_0(tmp_path):
    store = write_store(tmp_path / "s", views=2)
    samples, views, targets = drawn(batches_of(store, "val", resident=False).ordered())
    assert sorted(samples) == list(range(N_TRAIN, N_TRAIN + N_VAL))
    assert [f"sample-{i:03d}" for i in samples] == store.sample_ids(store.rows("val"))
    assert set(views) == {0}
    assert targets == [TARGETS[i] for i in samples]


def test_rejected_samples_are_left_out(tmp_path):
    batches = batches_of(write_store(tmp_path / "s", views=1, rejected=[3, 17]), resident=False)
    assert sorted(drawn(batches.shuffled(seed=0, epoch=1))[0]) == [i for i in range(N_TRAIN) if i not in (3, 17)]


def test_a_sum_is_read_without_a_tap_axis(tmp_path):
    store = write_store(tmp_path / "s")
    spec = spec_of(store, store.arrays["sum/g2x3-p1-c8/3"], (3,))
    for resident in (True, False):
        batch = next(iter(FeatureBatches(store, spec, "val", batch_size=4, resident=resident).ordered()))
        assert batch.features.shape == (4, 7, 8)
        # Four taps: 4 · 100 · sample + (0 + 1 + 2 + 3).
        assert ((batch.features - 6) % 400 == 0).all()


def test_resident_features_are_read_once_and_others_every_epoch(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s")
    read = []
    original = StoredArray.read_into
    monkeypatch.setattr(
        StoredArray,
        "read_into",
        lambda self, out, rows, taps=None: (read.extend(rows), original(self, out, rows, taps)),
    )
    resident = batches_of(store, resident=True)
    for epoch in (1, 2):
        drawn(resident.shuffled(seed=0, epoch=epoch))
    assert sorted(read) == store.rows("train").tolist()
    read.clear()
    streamed = batches_of(store, resident=False)
    assert read == []
    for epoch in (1, 2):
        drawn(streamed.shuffled(seed=0, epoch=epoch))
    assert sorted(read) == sorted(2 * store.rows("train").tolist())


def test_reading_ahead_uses_a_ring_of_fixed_size(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s")
    buffers = set()
    original = StoredArray.read_into

    def noting(self, out, rows, taps=None):
        buffers.add(out.__array_interface__["data"][0])
        original(self, out, rows, taps)

    monkeypatch.setattr(StoredArray, "read_into", noting)
    drawn(batches_of(store, resident=False, batch_size=1).shuffled(seed=0, epoch=1))
    assert len(buffers) == PREFETCH + 1 < N_TRAIN


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name == "coldtap-read-ahead"]


def test_an_epoch_left_early_leaves_no_thread(tmp_path):
    epoch = batches_of(write_store(tmp_path / "s"), resident=False, batch_size=1).shuffled(seed=0, epoch=1)
    next(epoch)
    assert len(reading_threads()) == 1
    epoch.close()
    assert reading_threads() == []


def test_an_error_while_reading_ahead_reaches_the_caller(tmp_path):
    store = write_store(tmp_path / "s")
    batches = batches_of(store, resident=False)
    shard = store.path / "features.zarr" / store.arrays[LAYERS].spec.shard_key(2)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CorruptStoreError, match=r"c/2/.*shorter than its index"):
        list(batches.shuffled(seed=0, epoch=1))
    assert reading_threads() == []


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"s has no test samples"):
        batches_of(write_store(tmp_path / "s"), "test", resident=False)


def test_labels_outside_the_classes_are_refused(tmp_path):
    store = write_store(tmp_path / "s", class_names=["a", "b"])
    with pytest.raises(SourceError, match=r"train labels from 0 to 2; its classes are 0 to 1"):
        batches_of(store, resident=False)


def test_features_stay_in_memory_when_they_take_two_fifths_of_it():
    assert decide_residency(400, 1000).resident
    assert not decide_residency(401, 1000).resident
    reason = decide_residency(4 * 10**9, 10**9).reason
    assert reason == "read batch by batch: 4000.0 MB of features, 400 MB allowed (40% of free memory)"
    assert 10**6 < available_memory_bytes() < 2**50


def test_the_size_of_a_split_counts_every_view_as_float32(tmp_path):
    batches = batches_of(write_store(tmp_path / "s", views=2, tier="float16"), resident=None)
    assert batches.residency.n_bytes == N_TRAIN * 3 * 2 * 7 * 8 * 4
    assert batches.residency.resident
