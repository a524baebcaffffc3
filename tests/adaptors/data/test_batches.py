"""Batches: every sample once, in an order that (seed, epoch) alone decides, in bounded memory."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coldtap.adaptors.data import batches as batches_module
from coldtap.adaptors.data.batches import FeatureBatches, _rows_by_view
from coldtap.adaptors.data.epoch_order import epoch_draw
from coldtap.adaptors.data.memory import available_memory_bytes, decide_residency
from coldtap.adaptors.data.read_ahead import PREFETCH
from coldtap.adaptors.networks.contract import spec_of
from coldtap.errors import CorruptStoreError, MissingFeaturesError, SourceError
from coldtap.stores import StoredArray, open_store
from coldtap.stores.format.geometry import Geometry
from tests.helpers.synthetic import GEOMETRY, synthetic_store

N_TRAIN, N_VAL = 21, 6
SPLITS = ["train"] * N_TRAIN + ["val"] * N_VAL
TARGETS = [i % 3 for i in range(N_TRAIN + N_VAL)]
LAYERS, SUM = "layers/g2x3-p1-c8", "sum/g2x3-p1-c8/3"


def write_store(path, *, views=0, **arguments):
    """Every number of a row says which sample, view and tap it is: 100 · sample + 10 · view + tap."""
    sample, view, tap = np.ogrid[: len(SPLITS), : views + 1, :4]
    codes = (100 * sample + 10 * view + tap).transpose(1, 0, 2)[..., None, None]
    features = np.broadcast_to(codes, (views + 1, len(SPLITS), 4, GEOMETRY.tokens, GEOMETRY.channels))
    synthetic_store(path, features, TARGETS, SPLITS, views=views, block_rows=4, **arguments)
    return open_store(path)


def batches_of(store, split="train", *, resident, taps=(1, 3), batch_size=4, **arguments):
    spec = spec_of(store, store.arrays[LAYERS], taps)
    return FeatureBatches(store, spec, split, batch_size=batch_size, resident=resident, **arguments)


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
    spec = spec_of(store, store.arrays[SUM], (3,))
    for resident in (True, False):
        batch = next(iter(FeatureBatches(store, spec, "val", batch_size=4, resident=resident).ordered()))
        assert batch.features.shape == (4, 7, 8)
        # Four taps: 4 · 100 · sample + (0 + 1 + 2 + 3).
        assert ((batch.features - 6) % 400 == 0).all()


def test_resident_features_are_read_once_and_others_every_epoch(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s")
    read = []
    original = StoredArray.read_stored_into
    monkeypatch.setattr(
        StoredArray,
        "read_stored_into",
        lambda self, out, rows, taps=None: (read.extend(rows), original(self, out, rows, taps))[1],
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
    original = StoredArray.read_stored_into

    def noting(self, out, rows, taps=None):
        buffers.add(out.__array_interface__["data"][0])
        return original(self, out, rows, taps)

    monkeypatch.setattr(StoredArray, "read_stored_into", noting)
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
    with pytest.raises(SourceError, match=r"train targets 'label' from 0 to 2; its classes are 0 to 1"):
        batches_of(store, resident=False)


@pytest.mark.parametrize(
    ("n_bytes", "gpu_bytes", "asked", "resident", "on_gpu", "reason"),
    [
        (400, 0, None, True, False, r"kept in memory: 0\.0 MB of features, 0 MB allowed \(40% of free memory\)"),
        (401, 0, None, False, False, r"read batch by batch: 0\.0 MB of features, 0 MB allowed"),
        (401, 0, True, True, False, r"kept in memory, as asked: 0\.0 MB"),
        (400, 0, False, False, False, r"read batch by batch, as asked: 0\.0 MB"),
        (400, 1000, None, True, True, r"kept on the GPU: 0\.0 MB of features"),
        (400, 999, None, True, False, r"kept in memory: "),
        (401, 1000, True, True, False, r"kept in memory, as asked: "),
        (401, 1002, None, False, False, r"read batch by batch: "),
        (400, 1000, False, False, False, r"read batch by batch, as asked: "),
        (400, 1000, True, True, True, r"kept on the GPU: "),
    ],
)
def test_features_stay_where_they_take_two_fifths_of_the_memory(n_bytes, gpu_bytes, asked, resident, on_gpu, reason):
    found = decide_residency(n_bytes, ram_bytes=1000, gpu_bytes=gpu_bytes, asked=asked)
    assert (found.resident, found.on_gpu, found.n_bytes) == (resident, on_gpu, n_bytes)
    assert re.match(reason, found.reason)


def test_sizes_are_said_in_megabytes():
    reason = decide_residency(4 * 10**9, ram_bytes=10**9).reason
    assert reason == "read batch by batch: 4000.0 MB of features, 400 MB allowed (40% of free memory)"
    assert 10**6 < available_memory_bytes() < 2**50


@pytest.mark.parametrize(("tier", "n_bytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1)])
def test_the_size_of_a_split_counts_every_view_as_it_is_stored(tmp_path, tier, n_bytes):
    batches = batches_of(write_store(tmp_path / "s", views=2, tier=tier), resident=None)
    assert batches.residency.n_bytes == N_TRAIN * 3 * 2 * 7 * 8 * n_bytes
    assert batches.residency.resident


# Stored numbers and what they stand for

TIERS = ["float32", "float16", "bfloat16", ("int8", "fast"), ("int8", "compact")]
CASES = [(LAYERS, (0, 1, 2, 3)), (LAYERS, (3, 1)), ("pooled/g2x3-p1-c8", (2,)), (SUM, (3,))]


def massive_store(path, tier, **arguments):
    """Random features with values, some single and some of one channel, far beyond what int8 codes hold."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((arguments.get("views", 0) + 1, len(SPLITS), 4, 7, 8)).astype(np.float32)
    features += np.arange(4, dtype=np.float32)[:, None, None]
    features[..., 5] *= np.where(rng.random(features.shape[:-1]) < 0.1, 100, 1)
    features[rng.random(features.shape) < 0.02] *= 300
    features *= 0.02  # float16 ends at 65,504
    tier, layout = (tier, "fast") if isinstance(tier, str) else tier
    synthetic_store(path, features, TARGETS, SPLITS, block_rows=4, tier=tier, layout=layout, **arguments)
    return open_store(path)


def expected(store, spec, rows):
    out = np.empty((len(rows), *spec.row_shape), np.float32)
    store.arrays[spec.array].read_into(out, rows, None if spec.gather == "sum" else spec.taps)
    return out


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("tier", TIERS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("part_values", [1, 2**19])
def test_kept_or_read_ahead_features_have_the_bits_of_the_store(tmp_path, monkeypatch, tier, case, part_values):
    monkeypatch.setattr("coldtap.adaptors.data.restore.PART_VALUES", part_values)
    monkeypatch.setattr("coldtap.adaptors.data.resident.LOAD_BYTES", 1000)  # several calls
    store = massive_store(tmp_path / "s", tier, views=1, rejected=[2])
    array, taps = case
    spec = spec_of(store, store.arrays[array], taps)
    for split, n_views in (("train", 2), ("val", 1)):
        rows = np.stack([store.rows(split, view) for view in range(n_views)])
        order, views = epoch_draw(rows.shape[1], n_views, seed=0, epoch=1)
        wanted = bits(expected(store, spec, rows[views, order]))
        for resident in (True, False):
            batches = FeatureBatches(store, spec, split, batch_size=4, resident=resident)
            got = [batch.features.numpy().copy() for batch in batches.shuffled(seed=0, epoch=1)]
            np.testing.assert_array_equal(bits(np.concatenate(got)), wanted)


@pytest.mark.parametrize("name", [LAYERS, SUM])
def test_the_massive_store_has_exceptions(tmp_path, name):
    # Else the test above would not show that they are put in.
    array = massive_store(tmp_path / "s", ("int8", "fast")).arrays[name]
    rows = np.arange(N_TRAIN)
    found = array.read_stored_into(np.empty((N_TRAIN, *array.row_shape), np.int8), rows)
    assert len(found.position) > N_TRAIN
    assert len(np.unique(found.position)) == len(found.position)


@pytest.mark.parametrize("exponents", [(0, 3, 1, 0), (5, 5, 5, 5)])
def test_powers_of_two_are_undone_a_tap(tmp_path, exponents):
    store = massive_store(tmp_path / "s", "float16")
    array = store.arrays[LAYERS]
    object.__setattr__(array.numbers, "exponents", exponents)
    spec = spec_of(store, array, (3, 1))
    got = next(iter(FeatureBatches(store, spec, "val", batch_size=9, resident=False).ordered())).features
    np.testing.assert_array_equal(bits(got), bits(expected(store, spec, store.rows("val"))))
    stored = np.empty(got.shape, "<f2")
    array.read_stored_into(stored, store.rows("val"), (3, 1))
    scale = 2.0 ** np.array([exponents[3], exponents[1]])[:, None, None]
    np.testing.assert_array_equal(got.numpy(), stored.astype(np.float32) * scale)


def test_a_view_that_a_sample_lacks_is_its_view_0():
    rows = {0: np.array([0, 1, 3, 6]), 1: np.array([17, 22]), 2: np.array([], np.int64), 3: np.array([32, 33, 35, 38])}
    store = SimpleNamespace(
        views=3, rows=lambda _, view=0: rows[view], sample_numbers=lambda wanted: np.asarray(wanted) % 16
    )
    by_view = [[0, 1, 3, 6], [0, 17, 3, 22], [0, 1, 3, 6], [32, 33, 35, 38]]
    assert _rows_by_view(store, "train").tolist() == by_view
    assert _rows_by_view(store, "val").tolist() == by_view[:1]


# Orders


@pytest.mark.parametrize("shuffle", ["uniform", "block"])
@pytest.mark.parametrize("resident", [True, False])
def test_an_epoch_goes_on_from_any_batch(tmp_path, shuffle, resident):
    batches = batches_of(write_store(tmp_path / "s", views=1), resident=resident, shuffle=shuffle)
    epoch = {"seed": 1, "epoch": 2}
    whole = [(batch.features.tolist(), batch.targets.tolist()) for batch in batches.shuffled(**epoch)]
    assert len(whole) == batches.n_batches == 6
    for start in range(len(whole) + 1):
        tail = batches.shuffled(**epoch, start_batch=start)
        assert [(batch.features.tolist(), batch.targets.tolist()) for batch in tail] == whole[start:]


@pytest.mark.parametrize("shuffle", ["uniform", "block"])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_share_each_step_of_a_single_one(tmp_path, shuffle, world_size):
    store = write_store(tmp_path / "s", views=1)
    alone = batches_of(store, resident=False, batch_size=6, shuffle=shuffle)
    whole = [drawn([batch]) for batch in alone.shuffled(seed=0, epoch=1)]
    parts = []
    for rank in range(world_size):
        batches = batches_of(
            store, resident=False, batch_size=6 // world_size, shuffle=shuffle, rank=rank, world_size=world_size
        )
        parts.append([drawn([batch]) for batch in batches.shuffled(seed=0, epoch=1)])
        assert batches.n_batches == len(parts[-1])
        # Evaluation is not divided: each process sees the split.
        assert sorted(drawn(batches.ordered())[0]) == list(range(N_TRAIN))
    steps = [
        tuple([value for part in column for value in part] for column in zip(*step, strict=True))
        for step in zip(*parts, strict=True)
    ]
    # 21 samples: the last step has three, too few for six processes.
    assert steps == (whole[:-1] if world_size == 6 else whole)


def test_a_block_shuffle_states_how_far_it_is_from_uniform(tmp_path):
    store = write_store(tmp_path / "s")
    assert batches_of(store, resident=False).mixing is None
    mixing = batches_of(store, resident=False, shuffle="block").mixing
    # 21 samples in blocks of four: one pool.
    assert (mixing.n_samples, mixing.pool_samples, mixing.pool_blocks, mixing.likelier) == (21, 21, 6, 1.0)


def test_a_block_shuffle_reads_a_pool_of_blocks_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("coldtap.adaptors.data.epoch_order.MIN_POOL_BLOCKS", 2)
    monkeypatch.setattr("coldtap.adaptors.data.epoch_order.POOL_SAMPLES", 8)
    read = []
    original = StoredArray.read_stored_into
    monkeypatch.setattr(
        StoredArray,
        "read_stored_into",
        lambda self, out, rows, taps=None: (read.extend(rows), original(self, out, rows, taps))[1],
    )
    drawn(batches_of(write_store(tmp_path / "s"), resident=False, shuffle="block").shuffled(seed=0, epoch=1))
    blocks = np.array(read) // 4
    assert len(np.unique(blocks)) == 6
    # Six blocks in pools of two; where the short last block lies decides where the second pool begins.
    first = next(i for i in range(1, 9) if len(set(blocks[: i + 1])) == 3)
    assert {*blocks[:first]}.isdisjoint(blocks[first:])


def test_the_kernel_is_told_of_each_batch_before_it_is_read(tmp_path, monkeypatch):
    told, seen = [], []
    original = StoredArray.read_stored_into

    def noting(self, out, rows, taps=None):
        seen.append((tuple(rows), taps, len(told)))
        return original(self, out, rows, taps)

    monkeypatch.setattr(StoredArray, "read_stored_into", noting)
    monkeypatch.setattr(StoredArray, "will_need", lambda self, rows, taps=None: told.append((tuple(rows), taps)))
    drawn(batches_of(write_store(tmp_path / "s"), resident=False).shuffled(seed=0, epoch=1))
    assert [(rows, taps) for rows, taps, _ in seen] == told
    # Five batches are announced when the first is read; six are all there are.
    assert [n_told for *_, n_told in seen] == [5, 6, 6, 6, 6, 6]


# Memory and threads


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


def test_reading_ahead_takes_a_few_batches_of_memory(tmp_path):
    geometry = Geometry(grid=(8, 8), prefix_tokens=0, channels=100)
    n_samples, n_taps = 1000, 4
    features = np.broadcast_to(np.float32(1), (n_samples, n_taps, geometry.tokens, geometry.channels))
    synthetic_store(
        tmp_path / "s",
        features,
        [0] * n_samples,
        ["train"] * n_samples,
        geometries=dict.fromkeys(range(n_taps), geometry),
        gathers={"layers": range(n_taps)},
        block_rows=100,
    )
    store = open_store(tmp_path / "s")
    array = store.arrays["layers/g8x8-p0-c100"]
    n_bytes = n_samples * array.bytes_per_row
    assert n_bytes > 100e6
    batches = FeatureBatches(store, spec_of(store, array, array.taps), "train", batch_size=20, resident=False)
    before = anonymous_bytes()
    most = max(anonymous_bytes() for _ in batches.shuffled(seed=0, epoch=1))
    # A ring of three batches of 2 MB, and one for the result.
    assert most - before < n_bytes / 5


def test_an_error_of_the_order_itself_reaches_the_caller(tmp_path):
    batches = batches_of(write_store(tmp_path / "s"), resident=False)
    batches._rows = batches._rows + 10_000
    with pytest.raises(MissingFeaturesError, match=r"row \d+ was asked for"):
        list(batches.shuffled(seed=0, epoch=1))
    assert reading_threads() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tier", TIERS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("place", ["gpu", "ram", "disk"])
def test_a_gpu_gets_the_batches_of_the_cpu(tmp_path, monkeypatch, tier, case, place):
    store = massive_store(tmp_path / "s", tier, views=1)
    array, taps = case
    spec = spec_of(store, store.arrays[array], taps)
    if place == "ram":
        monkeypatch.setattr(batches_module, "free_gpu_bytes", lambda device: 0)
    device = torch.device("cuda", 0)
    on_cpu = FeatureBatches(store, spec, "train", batch_size=2, resident=False)
    on_gpu = FeatureBatches(store, spec, "train", batch_size=2, resident=place != "disk", device=device)
    assert on_gpu.residency.on_gpu == (place == "gpu")
    # Work that keeps the GPU behind: a buffer that is written again too early would show.
    busy = torch.randn(2048, 2048, device=device)
    kept = []
    for batch in on_gpu.shuffled(seed=0, epoch=1):
        busy = (busy @ busy).clamp(-1, 1)
        assert batch.features.device == batch.targets.device == device
        kept.append((batch.features.clone(), batch.targets.clone()))
    for wanted, (features, targets) in zip(on_cpu.shuffled(seed=0, epoch=1), kept, strict=True):
        assert torch.equal(wanted.features, features.cpu())
        assert torch.equal(wanted.targets, targets.cpu())
