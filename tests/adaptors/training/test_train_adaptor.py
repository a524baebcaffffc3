"""Training from a store: it learns, it chooses on val, it reads test once, and it says what is wrong."""

import csv
import json
import math
import struct
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import pytest
import torch

from coldtap.adaptors import load_adaptor, read_run, train_adaptor
from coldtap.adaptors.data.devices import seeded
from coldtap.adaptors.runs.record import EpochRecord
from coldtap.adaptors.training import checkpoint as checkpoint_module
from coldtap.adaptors.training.checkpoint import read_checkpoint
from coldtap.adaptors.training.loop import SharedPass
from coldtap.adaptors.training.optimizer import learning_rate_at, make_optimizer
from coldtap.adaptors.training.state import choose_epoch
from coldtap.errors import (
    IncompleteStoreError,
    InterruptedRunError,
    MachineError,
    MissingFeaturesError,
    OptionError,
    RunError,
    SourceError,
    StoreError,
)
from coldtap.stores import StoredArray, open_store
from coldtap.stores.format.targets import Targets
from tests.helpers.jobs import coldtap
from tests.helpers.synthetic import three_directions as toy

FILES = {"adaptor.safetensors", "run.json", "epochs.csv", "curves.png", "predictions.parquet"}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy") / "store", class_names=["ant", "bee", "cat"])


def train(store, out, adaptor="linear", **arguments):
    return train_adaptor(store, adaptor, out=out, **{"epochs": 6, "batch_size": 8, "device": "cpu", **arguments})


@pytest.mark.parametrize(
    ("adaptor", "settings"), [("linear", {"pool": "both"}), ("mist", {"depth": 2}), ("last", {"modules": 1})]
)
def test_each_adaptor_learns_a_separable_toy(store, tmp_path, adaptor, settings):
    result = train(store, tmp_path / "run", adaptor, settings=settings, lr=1e-2)
    assert result.info.metrics["test"].score >= 0.95
    assert result.info.metrics["val"].score >= 0.95
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_targets_without_a_pattern_are_not_learnt(tmp_path):
    rng = np.random.default_rng(1)
    path = toy(tmp_path / "s", noise=1e-3, targets=[0] * 88)
    store = open_store(path)
    targets = Targets(values=rng.integers(0, 3, 88), class_names=("ant", "bee", "cat"), order=None)
    store._labels._tables["label"] = targets
    result = train(store, tmp_path / "run")
    assert result.info.metrics["test"].score < 0.7


def test_a_loaded_adaptor_gives_the_accuracy_that_was_reported(store, tmp_path):
    result = train(store, tmp_path / "run", "last", settings={"modules": 1})
    module, info = load_adaptor(tmp_path / "run")
    assert info == result.info == read_run(tmp_path / "run")
    opened = open_store(store)
    rows = opened.rows("test")
    features = np.empty((len(rows), *info.features.row_shape), np.float32)
    opened.arrays[info.features.array].read_into(features, rows, info.features.taps)
    with torch.inference_mode():
        right = (module(torch.from_numpy(features)).argmax(1).numpy() == opened.targets(rows)).mean()
    assert right == info.metrics["test"].score
    assert info.class_names == ("ant", "bee", "cat")
    assert not module.training


def test_run_json_says_what_was_trained_on_what_and_how_well(store, tmp_path):
    result = train(store, tmp_path / "run", "mist", settings={"rank": "2", "depth": 1}, seed=5)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    opened = open_store(store)
    assert record["format"] == 4
    assert record["adaptor"] == "mist"
    assert record["seed"] == 5
    assert record["extractor_digest"] == opened.recipe.extractor_digest
    assert record["extractor"] == opened.recipe.extractor.to_dict()
    assert result.info.model == "synthetic"
    assert record["store_digest"] == opened.digest
    assert record["settings"]["options"]["rank"] == 2
    assert record["settings"]["options"]["norm"] == "new"
    assert record["metrics"]["val"]["scores"]["top1"] == result.info.metrics["val"].score
    assert 0 <= record["metrics"]["test"]["scores"]["top1"] <= 1
    # LSA 4·8·2 + 2·8, entry norm 16, head norm 16, classifier 8·3 + 3.
    assert record["parameters"] == 80 + 16 + 16 + 27
    assert record["versions"]["torch"] == version("torch")
    with (tmp_path / "run" / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    best = rows[record["best_epoch"] - 1]
    assert (
        float(best["val_score"])
        == record["metrics"]["val"]["scores"]["top1"]
        == max(float(row["val_score"]) for row in rows)
    )


def test_the_curves_are_a_picture(store, tmp_path):
    train(store, tmp_path / "run", epochs=2)
    data = (tmp_path / "run" / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1100, 440)


@pytest.mark.parametrize("resident", [True, False])
def test_the_test_split_is_read_once_and_after_everything_else(store, tmp_path, monkeypatch, resident):
    opened = open_store(store)
    test = set(opened.rows("test").tolist())
    read = []
    original = StoredArray.read_stored_into
    monkeypatch.setattr(
        StoredArray,
        "read_stored_into",
        lambda self, out, rows, taps=None: (read.extend(rows), original(self, out, rows, taps))[1],
    )
    train(opened, tmp_path / "run", epochs=3, resident=resident)
    assert sorted(row for row in read if row in test) == sorted(test)
    assert all(row in test for row in read[-len(test) :])
    read.clear()
    assert train(opened, tmp_path / "run", epochs=3, resident=resident).was_finished
    assert read == []


def test_memory_or_disk_makes_no_difference(store, tmp_path):
    a, b = (train(store, tmp_path / str(resident), resident=resident) for resident in (True, False))
    assert a.info.adaptor_sha256 == b.info.adaptor_sha256


def test_seeds_differ_and_the_same_seed_does_not(store, tmp_path):
    state = torch.get_rng_state()
    digests = [
        train(store, tmp_path / name, "mist", settings={"dropout": 0.2}, seed=seed, epochs=2).info.adaptor_sha256
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), state), "training moved the caller's random numbers"


def test_random_numbers_depend_on_seed_and_stream_alone():
    def drawn(seed, stream):
        torch.rand(3)  # what happened before must not matter
        with seeded(seed, stream, torch.device("cpu")):
            return torch.rand(4).tolist()

    assert drawn(0, 1) == drawn(0, 1)
    assert len({tuple(drawn(seed, stream)) for seed in (0, 1) for stream in (0, 1, 2)}) == 6


def test_the_best_epoch_is_kept_not_the_last(store, tmp_path):
    # A rate that wrecks what the first epochs learnt: the kept weights must be those of the best epoch.
    result = train(store, tmp_path / "run", "mist", lr=2.0, warmup=0.9, epochs=5)
    with (tmp_path / "run" / "epochs.csv").open() as file:
        accuracies = [float(row["val_score"]) for row in csv.DictReader(file)]
    assert accuracies[-1] < max(accuracies)
    assert result.info.metrics["val"].score == max(accuracies)
    module, info = load_adaptor(tmp_path / "run")
    opened = open_store(store)
    rows = opened.rows("val")
    features = np.empty((len(rows), *info.features.row_shape), np.float32)
    opened.arrays[info.features.array].read_into(features, rows)
    with torch.inference_mode():
        predicted = module(torch.from_numpy(features)).argmax(1).numpy()
    assert (predicted == opened.targets(rows)).mean() == max(accuracies)


@pytest.mark.parametrize(
    ("epochs", "best"),
    [
        ([(0.5, 1.0), (0.9, 1.0), (0.8, 0.1)], 2),  # accuracy before loss
        ([(0.9, 1.0), (0.9, 0.8), (0.9, 0.9)], 2),  # then the lower loss
        ([(0.9, 0.8), (0.9, 0.8), (0.1, 0.8)], 1),  # then the earlier
    ],
)
def test_the_epoch_to_keep(epochs, best):
    records = tuple(
        EpochRecord(epoch=i, lr=0, train_loss=0, val_loss=loss, val_score=top1, seconds=0)
        for i, (top1, loss) in enumerate(epochs, start=1)
    )
    assert choose_epoch(records) == best


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_half_cosine():
    rates = [learning_rate_at(step, steps=100, peak=1.0, warmup=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert learning_rate_at(0, steps=1, peak=1.0, warmup=0.5) == 1.0


def test_weight_decay_spares_biases_and_norms():
    model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    groups = make_optimizer(model, weight_decay=0.05).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {name: decay[id(parameter)] for name, parameter in model.named_parameters()} == {
        "0.weight": 0.0,
        "0.bias": 0.0,
        "1.weight": 0.05,
        "1.bias": 0.0,
    }


def test_progress_is_told_of_every_epoch(store, tmp_path):
    told = []
    train(store, tmp_path / "run", epochs=3, progress=lambda trials, **more: told.append((trials[0].best, more)))
    assert [more["epoch"] for _, more in told] == [1, 2, 3]
    assert all(more["epochs"] == 3 and 1 <= best <= more["epoch"] and more["seconds"] > 0 for best, more in told)


def test_a_store_without_test_has_no_test_metrics(tmp_path):
    result = train(toy(tmp_path / "s", sizes={"train": 24, "val": 12}), tmp_path / "run", epochs=1)
    assert set(result.info.metrics) == {"val"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 24, "test": 12}, r"no val split to choose the best epoch on; it holds train \(24\), test \(12\)"),
        ({"val": 24}, r"no train split to learn from; it holds val \(24\)"),
    ],
)
def test_a_missing_split_is_named_with_its_use(tmp_path, sizes, message):
    with pytest.raises(SourceError, match=message):
        train(toy(tmp_path / "s", sizes=sizes), tmp_path / "run")


def test_a_single_class_is_refused(tmp_path):
    path = toy(tmp_path / "s", targets=[1] * 88, class_names=["ant", "bee"])
    with pytest.raises(SourceError, match=r"every train sample is of class 'bee': there is nothing to tell apart"):
        train(path, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, OptionError, r"epochs=0: it must be 1 or more"),
        ({"batch_size": 0}, OptionError, r"batch_size=0"),
        ({"lr": -1.0}, OptionError, r"lr=-1.0: it must be above 0"),
        ({"lr": math.nan}, OptionError, r"lr=nan"),
        ({"warmup": 1.0}, OptionError, r"warmup=1.0: it must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, OptionError, r"weight_decay=-0.1"),
        ({"seed": -1}, OptionError, r"seed=-1"),
        ({"adaptor": "lora"}, OptionError, r"unknown adaptor 'lora'"),
        ({"settings": {"rank": 2}}, OptionError, r"adaptor linear has no option 'rank'; it knows pool="),
        ({"device": "tpu"}, OptionError, r"`device='tpu'`: choose auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, MachineError, r"`device='cuda:99'`: this machine has \d+ GPUs"),
        ({"adaptor": "mist", "settings": {"at": 1}}, MissingFeaturesError, r"MIST needs the sum at tap 1"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(store, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        train(store, tmp_path / "run", **arguments)
    assert not list(tmp_path.glob("run/*"))


def test_no_store_and_an_unfinished_store_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"there is no store at .*nowhere"):
        train(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(IncompleteStoreError, match=r"is incomplete"):
        train(toy(tmp_path / "s", finish=False), tmp_path / "run")


def test_out_may_not_be_a_file(store, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"is a file, or lies in one: choose a folder"):
            train(store, out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_no_longer_finite_ends_the_run(store, tmp_path):
    with pytest.raises(RunError, match=r"loss is (nan|inf) in epoch \d of 6, at lr=1e\+30: .*lr=3e\+29, into another"):
        train(store, tmp_path / "run", "mist", lr=1e30)
    assert not (tmp_path / "run" / "run.json").exists()


def test_another_run_is_not_overwritten(store, tmp_path):
    train(store, tmp_path / "run", epochs=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunError, match=r"run holds a run of other settings: adaptor: linear → mist\. Choose another"):
        train(store, tmp_path / "run", "mist", epochs=1)
    with pytest.raises(RunError, match=r"run of other settings: pool: patch-mean → both; lr: 0.02 → 0.1; seed: 0 → 1"):
        train(store, tmp_path / "run", epochs=1, seed=1, lr=0.1, settings={"pool": "both"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_another_store_is_another_run(store, tmp_path):
    train(store, tmp_path / "run", epochs=1)
    other = toy(tmp_path / "other", noise=0.6)
    with pytest.raises(RunError, match=r"store_digest: [0-9a-f]{64} → [0-9a-f]{64}\. Choose another `out`"):
        train(other, tmp_path / "run", epochs=1)


def interrupt_after(epoch):
    def progress(_trials, **more):
        if more["epoch"] == epoch:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(store, tmp_path):
    arguments = {"settings": {"dropout": 0.3, "drop_path": 0.2}, "checkpoint_every_s": 1e9}
    with pytest.raises(InterruptedRunError, match=r"after epoch 2 of 6; .*run keeps .* same command again"):
        train(store, tmp_path / "run", "mist", progress=interrupt_after(2), **arguments)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.safetensors"]
    told = []
    again = train(store, tmp_path / "run", "mist", progress=lambda _, **more: told.append(more["epoch"]), **arguments)
    whole = train(store, tmp_path / "whole", "mist", **arguments)
    assert told == [3, 4, 5, 6]
    assert (again.resumed_after, whole.resumed_after) == (2, 0)
    assert again.info.adaptor_sha256 == whole.info.adaptor_sha256
    assert again.info.metrics == whole.info.metrics
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_ctrl_c_while_features_are_loaded_is_one_line_too(store, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(StoredArray, "read_stored_into", interrupted)
    with pytest.raises(InterruptedRunError, match=r"interrupted while .*store was read: run the same command again"):
        train(store, tmp_path / "run", resident=True)


def test_an_unfinished_run_of_other_settings_is_refused(store, tmp_path):
    with pytest.raises(InterruptedRunError, match=r"after epoch 1"):
        train(store, tmp_path / "run", progress=interrupt_after(1))
    with pytest.raises(RunError, match=r"epochs: 6 → 7"):
        train(store, tmp_path / "run", epochs=7)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text"])
def test_a_damaged_checkpoint_is_refused(store, tmp_path, damage):
    with pytest.raises(InterruptedRunError, match=r"after epoch 1"):
        train(store, tmp_path / "run", progress=interrupt_after(1))
    path = tmp_path / "run" / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes({"truncated": data[:-40], "flipped": data, "text": b"not a checkpoint"}[damage])
    with pytest.raises(RunError, match=r"checkpoint.safetensors is damaged .*delete it to start again"):
        train(store, tmp_path / "run")


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), r"there is no finished run at .*run: make one"),
        (lambda run: (run / "run.json").write_text("{"), r"run.json is damaged"),
        (lambda run: (run / "run.json").write_text("[]"), r"run.json is damaged"),
        (lambda run: _edit(run / "run.json", format=5), r"run format 5; this coldtap reads formats 1 to 4"),
        (lambda run: _edit(run / "run.json", colour="red"), r"run.json is damaged .*colour"),
        (lambda run: _edit(run / "run.json", n_classes=9), r"adaptor.safetensors does not fit the settings"),
        (lambda run: (run / "adaptor.safetensors").unlink(), r"adaptor.safetensors cannot be read \(No such file"),
        (lambda run: _flip(run / "adaptor.safetensors"), r"adaptor.safetensors is not what run.json says"),
    ],
)
def test_a_damaged_run_folder_is_refused(store, tmp_path, damage, message):
    train(store, tmp_path / "run", epochs=1)
    damage(tmp_path / "run")
    with pytest.raises(RunError, match=message):
        load_adaptor(tmp_path / "run")


def test_a_run_of_an_adaptor_from_the_future_is_refused(store, tmp_path):
    train(store, tmp_path / "run", epochs=1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    _edit(tmp_path / "run" / "run.json", settings={**record["settings"], "adaptor": "tomorrow"})
    with pytest.raises(RunError, match=r"does not know: unknown adaptor 'tomorrow'"):
        load_adaptor(tmp_path / "run")


# Shuffles, and where features are kept


def test_a_block_shuffle_is_a_setting_and_states_how_far_it_is_from_uniform(store, tmp_path):
    notes = []
    result = train(store, tmp_path / "run", epochs=2, shuffle="block", resident=False, note=notes.append)
    kept, mixing = notes
    assert kept.startswith("features read batch by batch, as asked: ")
    # 48 samples in blocks of 16: a single pool.
    assert mixing == "block shuffle: all 48 samples are mixed together, as by a uniform shuffle"
    assert read_run(tmp_path / "run").mixing == mixing
    uniform = train(store, tmp_path / "uniform", epochs=2, note=notes.append)
    assert uniform.info.mixing is None
    assert len(notes) == 3
    assert uniform.info.adaptor_sha256 != result.info.adaptor_sha256
    with pytest.raises(RunError, match=r"run of other settings: shuffle: block → uniform\. Choose another"):
        train(store, tmp_path / "run", epochs=2)


def test_the_command_line_has_both_choices(store, tmp_path):
    options = ("--adaptor", "linear", "--out", tmp_path / "run", "--epochs", "1", "--device", "cpu")
    result = coldtap("train-adaptor", store, *options, "--shuffle", "block", "--stream")
    assert result.exit_code == 0, result.stderr
    assert "read batch by batch, as asked" in result.stderr
    assert "block shuffle: all 48 samples are mixed together" in result.stderr
    info = read_run(tmp_path / "run")
    assert (info.settings.shuffle, info.residency.resident) == ("block", False)
    refused = coldtap("train-adaptor", store, *options, "--shuffle", "none")
    assert refused.exit_code == 2
    assert "shuffle=none: it must be one of uniform, block" in refused.stderr


# Runs of earlier versions


def test_a_run_of_format_1_is_read_as_one_with_a_uniform_shuffle(store, tmp_path):
    train(store, tmp_path / "run", epochs=1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("shuffle", "order_seed", "target", "label_smoothing", "patience", "fit", "keep"):
        del record["settings"][name]
    for name in ("mixing", "metric", "target_kind", "trials", "seconds", "bytes_per_sample"):
        del record[name]
    del record["residency"]["on_gpu"]
    for metrics in record["metrics"].values():
        metrics["top1"] = metrics.pop("scores")["top1"]
        del metrics["score"]
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "format": 1}))
    assert load_adaptor(tmp_path / "run")[1].settings.shuffle == "uniform"
    assert train(store, tmp_path / "run", epochs=1).was_finished
    with pytest.raises(RunError, match=r"shuffle: uniform → block"):
        train(store, tmp_path / "run", epochs=1, shuffle="block")


def _edit_checkpoint(path, change):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    state = json.loads(header["__metadata__"]["coldtap"])
    change(state)
    header["__metadata__"]["coldtap"] = json.dumps(state)
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])


@pytest.mark.parametrize("version", [2, 4])
def test_a_checkpoint_of_another_format_is_refused_and_kept(store, tmp_path, version):
    with pytest.raises(InterruptedRunError, match=r"after epoch 1"):
        train(store, tmp_path / "run", progress=interrupt_after(1))
    _edit_checkpoint(tmp_path / "run" / "checkpoint.safetensors", lambda state: state.update(format=version))
    with pytest.raises(RunError, match=rf"of checkpoint format {version}; this coldtap reads format 3: go on with"):
        train(store, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


# Inside an epoch


@pytest.mark.parametrize(
    ("die_at", "shuffle", "resident"),
    [(1, "uniform", True), (5, "block", False), (6, "uniform", False), (10, "block", True), (17, "uniform", False)],
)
def test_a_run_stopped_inside_an_epoch_goes_on_from_the_last_step(tmp_path, monkeypatch, shuffle, resident, die_at):
    store = toy(tmp_path / "store", views=1)
    arguments = {
        "adaptor": "last",
        "settings": {"modules": 1, "dropout": 0.3, "drop_path": 0.2},
        "epochs": 3,
        "shuffle": shuffle,
        "resident": resident,
        "checkpoint_every_s": 0,
    }
    step = SharedPass._step

    def stopping(self, batch):
        if self.steps == die_at:
            raise KeyboardInterrupt
        return step(self, batch)

    # Six steps an epoch; after the last of them the epoch's own checkpoint follows.
    epochs, batches = divmod(die_at, 6)
    more = rf" and {batches} of 6 batches" if batches else ""
    with monkeypatch.context() as patched:
        patched.setattr(SharedPass, "_step", stopping)
        with pytest.raises(InterruptedRunError, match=rf"interrupted after epoch {epochs} of 3{more}; "):
            train(store, tmp_path / "run", **arguments)
    assert read_checkpoint(tmp_path / "run").batches == batches
    taken = []
    monkeypatch.setattr(SharedPass, "_step", lambda self, batch: (taken.append(self.steps), step(self, batch))[1])
    resumed = train(store, tmp_path / "run", **arguments)
    assert taken == list(range(die_at, 18))
    whole = train(store, tmp_path / "whole", **{**arguments, "checkpoint_every_s": 1e9})
    assert resumed.info.adaptor_sha256 == whole.info.adaptor_sha256
    assert resumed.info.metrics == whole.info.metrics
    assert lines_without_seconds(tmp_path / "run") == lines_without_seconds(tmp_path / "whole")


def lines_without_seconds(run):
    return [line.rpartition(",")[0] for line in (run / "epochs.csv").read_text().splitlines()]


def test_checkpoints_that_are_slow_to_write_are_rarer(store, tmp_path, monkeypatch):
    clock, writes = [0.0], []
    step, write = SharedPass._step, checkpoint_module.write_checkpoint

    def stepping(self, batch):
        clock[0] += 0.125
        return step(self, batch)

    def writing(folder, checkpoint):
        writes.append(checkpoint.steps)
        clock[0] += 1
        write(folder, checkpoint)

    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(SharedPass, "_step", stepping)
    monkeypatch.setattr(checkpoint_module, "write_checkpoint", writing)
    train(store, tmp_path / "run", epochs=5, checkpoint_every_s=0.25)
    # After a quarter of a second, and then, as a write takes a second, after one each.
    assert writes == [2, 10, 18, 26]


def test_a_run_that_diverges_ends_with_its_reason_and_leaves_nothing(store, tmp_path):
    for _ in range(2):
        with pytest.raises(
            RunError, match=r"training loss is (nan|inf) in epoch 1 of 6, at lr=1e\+30: train again with a l"
        ):
            train(store, tmp_path / "run", "mist", lr=1e30, warmup=0.0, checkpoint_every_s=0)
        assert list((tmp_path / "run").iterdir()) == []


def test_the_seconds_of_an_epoch_count_both_of_its_parts(store, tmp_path, monkeypatch):
    step = SharedPass._step

    def slow(self, batch):
        if self.steps == 4 and "stop" not in done:
            done.append("stop")
            raise KeyboardInterrupt
        time.sleep(0.05)
        return step(self, batch)

    done = []
    monkeypatch.setattr(SharedPass, "_step", slow)
    with pytest.raises(InterruptedRunError, match=r"and 4 of 6 batches"):
        train(store, tmp_path / "run", epochs=1, checkpoint_every_s=0)
    time.sleep(1)  # what lies between the two calls does not count
    result = train(store, tmp_path / "run", epochs=1)
    assert 0.3 <= result.info.epoch_seconds < 1.3


CHILD = """
import os, signal, sys
import torch
from coldtap.adaptors import train_adaptor
from coldtap.adaptors.training.loop import SharedPass
store, out, die_at_step, die_at_write = *sys.argv[1:3], *map(int, sys.argv[3:])
step, rename, renamed = SharedPass._step, os.rename, []
def stepping(self, batch):
    if self.steps == die_at_step:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
def renaming(source, target, **folders):
    renamed.append(os.path.basename(target))
    if renamed.count("checkpoint.safetensors") == die_at_write:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, **folders)
SharedPass._step, os.rename = stepping, renaming
torch.set_num_threads(1)
train_adaptor(store, "last", out=out, epochs=6, batch_size=8, device="cpu", checkpoint_every_s=0,
              settings={"modules": 1, "dropout": 0.3, "drop_path": 0.2})
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"timm", "torchvision"}, loaded
assert "coldtap.pipeline" not in sys.modules
print("finished")
"""


def run_child(store, out, *, step=-1, write=-1):
    command = [sys.executable, "-c", CHILD, str(store), str(out), str(step), str(write)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_killed_again_and_again_ends_in_the_same_bits_without_timm(tmp_path):
    store = toy(tmp_path / "store", views=2)
    settings = {"modules": 1, "dropout": 0.3, "drop_path": 0.2}
    whole = train(store, tmp_path / "whole", "last", settings=settings, checkpoint_every_s=0)
    # Six steps an epoch: killed before a step of epochs 1 and 5, and between them in the fifth write of a checkpoint,
    # which is that of step 8: two steps of epoch 1 were left, then came its end and step 7.
    for die_at, kept, inside in (({"step": 3}, 0, 3), ({"write": 5}, 1, 1), ({"step": 29}, 4, 5)):
        child = run_child(store, tmp_path / "run", **die_at)
        assert child.returncode == -9, child.stderr
        last = read_checkpoint(tmp_path / "run")
        assert (last.epochs, last.batches) == (kept, inside)
        left = {path.name for path in (tmp_path / "run").iterdir()}
        assert left == {"checkpoint.safetensors", *(["checkpoint.safetensors.partial"] if "write" in die_at else [])}
    # What a death inside a checkpoint's write leaves must not matter.
    (tmp_path / "run" / "checkpoint.safetensors.partial").write_bytes(b"half a checkpoint")
    child = run_child(store, tmp_path / "run")
    assert child.stdout == "finished\n", child.stderr
    weights = [(tmp_path / run / "adaptor.safetensors").read_bytes() for run in ("run", "whole")]
    assert weights[0] == weights[1]
    resumed = read_run(tmp_path / "run")
    assert resumed.metrics == whole.info.metrics
    assert resumed.best_epoch == whole.info.best_epoch
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
