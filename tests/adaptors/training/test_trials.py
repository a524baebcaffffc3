"""Trials that share batches: each ends as its solo run does, whatever the others do and whoever interrupts them."""

import csv
import json
from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch
from safetensors.torch import load_file

from coldtap.adaptors import TrainingOptions, expand_grid, read_run, run_protocol, train_adaptor, train_trials
from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.data.devices import seeded
from coldtap.adaptors.networks.kinds import ADAPTORS
from coldtap.adaptors.training import finish as finishing_module
from coldtap.adaptors.training import runner as passes_module
from coldtap.adaptors.training.grouping import make_learner
from coldtap.adaptors.training.loop import SharedPass
from coldtap.adaptors.training.options import TrialOptions
from coldtap.adaptors.training.plan import plan_trial
from coldtap.adaptors.training.stacked import CPU_STACK_VALUES
from coldtap.adaptors.training.trial_memory import TrialMemory, _LiveBytes, forecast_trial, how_many_fit
from coldtap.errors import InterruptedRunError, OptionError, RunError, SourceError
from coldtap.stores import open_store
from tests.helpers.jobs import coldtap
from tests.helpers.synthetic import three_directions

TRAINING = TrainingOptions(epochs=4, batch_size=8)
# Of stacked trials: their operations round otherwise than a solo run's.
STACK_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return three_directions(tmp_path_factory.mktemp("trials") / "store", class_names=["ant", "bee", "cat"], views=1)


def trials_of(store, out, adaptor, grid, *, training=TRAINING, **arguments):
    return train_trials(
        store, adaptor, expand_grid(grid), out=out, training=training, **{"seeds": 2, "device": "cpu", **arguments}
    )


def solo(store, out, adaptor, result):
    fields = vars(result.setting.training)
    return train_adaptor(store, adaptor, out=out, settings=result.setting.options, device="cpu", **fields)


def table_without_seconds(out):
    with (out / "trials.csv").open() as file:
        return [{key: value for key, value in line.items() if key != "seconds"} for line in csv.DictReader(file)]


# Equality with solo runs


@pytest.mark.parametrize(
    ("adaptor", "grid"),
    [
        ("mist", {"lr": [1e-3, 1e-2], "depth": [1, 2]}),
        ("mist", {"dropout": [0.3], "drop_path": [0.2], "weight_decay": [0, 0.1], "epochs": [2, 4]}),
        ("last", {"modules": [1], "label_smoothing": [0, 0.1], "patience": [1, 3]}),
        ("linear", {"tap": [1, 3]}),  # other features: two passes
        ("head2toe", {"lr": [1e-2, 1e-3]}),  # changes with the epochs, and adds to its loss
    ],
)
def test_trials_side_by_side_end_in_the_bits_of_their_solo_runs(store, tmp_path, monkeypatch, adaptor, grid):
    monkeypatch.setattr("coldtap.adaptors.training.stacked.CPU_STACK_VALUES", 0)
    trials = trials_of(store, tmp_path / "out", adaptor, grid)
    assert len(trials.results) == 2 * len(expand_grid(grid))
    for number, result in enumerate(trials.results):
        alone = solo(store, tmp_path / str(number), adaptor, result).info
        assert result.info.settings == alone.settings
        assert result.info.adaptor_sha256 == alone.adaptor_sha256
        assert result.info.best_epoch == alone.best_epoch
        assert result.info.metrics["val"] == alone.metrics["val"]
    assert len({result.info.adaptor_sha256 for result in trials.results}) > 1


@pytest.mark.parametrize(
    ("adaptor", "grid"),
    [
        ("linear", {"lr": [1e-3, 1e-2], "weight_decay": [0, 0.5]}),
        ("linear", {"pool": ["both", "patch-mean"], "epochs": [2, 4], "warmup": [0, 0.5]}),
        ("mist", {"lr": [1e-3, 1e-2], "patience": [1, 4]}),
        ("last", {"modules": [1], "label_smoothing": [0, 0.1]}),
        ("attentive", {"lr": [1e-3, 1e-2], "queries": [2]}),
    ],
)
def test_stacked_trials_equal_their_solo_runs_to_rounding(store, tmp_path, adaptor, grid):
    notes = []
    trials = trials_of(store, tmp_path / "out", adaptor, grid, note=notes.append)
    assert any("in one computation" in note for note in notes)
    for number, result in enumerate(trials.results):
        alone = solo(store, tmp_path / str(number), adaptor, result)
        weights = [load_file(path / "adaptor.safetensors") for path in (result.path, alone.path)]
        assert weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][name], rtol=STACK_TOLERANCE, atol=STACK_TOLERANCE)
        assert result.info.best_epoch == alone.info.best_epoch
        assert result.info.metrics["val"].score == alone.info.metrics["val"].score
        assert result.info.metrics["val"].loss == pytest.approx(alone.info.metrics["val"].loss, rel=1e-4)


def test_a_trial_of_another_seed_shares_the_order_but_not_the_start(store, tmp_path):
    trials = trials_of(store, tmp_path / "out", "linear", {}, seeds=3)
    assert [result.info.settings.seed for result in trials.results] == [0, 1, 2]
    assert {result.info.settings.order_seed for result in trials.results} == {0}
    assert len({result.info.adaptor_sha256 for result in trials.results}) == 3


def test_features_of_many_values_are_not_stacked_on_a_cpu(store, tmp_path, monkeypatch):
    monkeypatch.setattr("coldtap.adaptors.training.stacked.CPU_STACK_VALUES", 7 * 8 - 1)
    notes = []
    trials_of(store, tmp_path / "out", "mist", {}, note=notes.append)
    assert any("one after the other on each batch" in note for note in notes)
    assert CPU_STACK_VALUES > 7 * 8


# The choice, and the test split


def test_only_the_setting_that_val_chose_is_tested(store, tmp_path):
    trials = trials_of(store, tmp_path / "out", "linear", {"lr": [1e-5, 1e-2]})
    assert [result.setting.varied["lr"] for result in trials.chosen] == [1e-2, 1e-2]
    for result in trials.results:
        written = read_run(result.path)
        assert written == result.info
        assert ("test" in written.metrics) == (result in trials.chosen)
    alone = solo(store, tmp_path / "solo", "linear", trials.chosen[1])
    assert trials.chosen[1].info.metrics["test"].score == alone.info.metrics["test"].score
    lines = table_without_seconds(tmp_path / "out")
    assert [bool(line["test"]) for line in lines] == [True, True, False, False]
    assert (tmp_path / "out" / "trials.png").read_bytes().startswith(b"\x89PNG")


# A trial that diverges


@pytest.mark.parametrize("adaptor", ["linear", "mist"])
def test_a_diverging_trial_ends_with_its_reason_and_the_others_go_on(store, tmp_path, monkeypatch, adaptor):
    if adaptor == "mist":
        monkeypatch.setattr("coldtap.adaptors.training.stacked.CPU_STACK_VALUES", 0)
    # A weight decay of 1e30 at this rate overflows where it acts, on matrices, within two steps.
    grid = {"weight_decay": [0.05, 1e30]}
    trials = trials_of(store, tmp_path / "out", adaptor, grid)
    good, bad = trials.results[:2], trials.results[2:]
    assert all(result.info is None and "loss is" in result.failure and "lower one" in result.failure for result in bad)
    assert [json.loads((result.path / "failed.json").read_text())["reason"] for result in bad] == [
        result.failure for result in bad
    ]
    assert trials.chosen == good
    for number, result in enumerate(good):
        alone = solo(store, tmp_path / str(number), adaptor, result).info
        assert result.info.metrics["val"].score == alone.metrics["val"].score
    told = []
    again = trials_of(store, tmp_path / "out", adaptor, grid, progress=lambda *_, **more: told.append(more))
    assert (again, told) == (trials, [])


def test_where_every_trial_diverges_the_table_says_why(store, tmp_path):
    with pytest.raises(
        RunError, match=r"every setting has a trial without a result; .*trials.csv says why; the first: the .* loss"
    ):
        trials_of(store, tmp_path / "out", "linear", {"weight_decay": [1e30]})
    assert all("loss is" in line["failure"] for line in table_without_seconds(tmp_path / "out"))


# Interruptions


@pytest.mark.parametrize("adaptor", ["linear", "mist"])
@pytest.mark.parametrize("die_at", [3, 8, 14])
def test_interrupted_trials_go_on_to_the_same_table(store, tmp_path, monkeypatch, adaptor, die_at):
    # Six steps an epoch: inside the first, between two, and after the first trials have ended.
    if adaptor == "mist":
        monkeypatch.setattr("coldtap.adaptors.training.stacked.CPU_STACK_VALUES", 0)
    grid = {"lr": [1e-3, 1e-2], "epochs": [2, 4], "weight_decay": [0.05, 1e30]}
    whole = trials_of(store, tmp_path / "whole", adaptor, grid)
    step = SharedPass._step

    def stopping(self, batch):
        if self.steps == die_at:
            raise KeyboardInterrupt
        step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(SharedPass, "_step", stopping)
        with pytest.raises(InterruptedRunError, match=r"same command again"):
            trials_of(store, tmp_path / "out", adaptor, grid, checkpoint_every_s=0)
    taken = []
    monkeypatch.setattr(SharedPass, "_step", lambda self, batch: (taken.append(self.steps), step(self, batch))[1])
    resumed = trials_of(store, tmp_path / "out", adaptor, grid)
    assert taken == list(range(die_at, 24))
    assert table_without_seconds(tmp_path / "out") == table_without_seconds(tmp_path / "whole")
    digests = [[r.info.adaptor_sha256 for r in trials.results if r.info] for trials in (resumed, whole)]
    assert digests[0] == digests[1]
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_a_checkpoint_of_other_trials_is_refused_and_kept(store, tmp_path):
    def stop(*_, **more):
        if more["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match=r"after epoch 1 of 4"):
        trials_of(store, tmp_path / "out", "linear", {"lr": [1e-3, 1e-2]}, progress=stop)
    with pytest.raises(RunError, match=r"lr: 0\.001 → 0\.01"):
        trials_of(store, tmp_path / "out", "linear", {"lr": [1e-2]})
    # More trials than before: those that were under way go first, then the others.
    both = trials_of(store, tmp_path / "out", "linear", {"lr": [1e-1, 1e-3, 1e-2]})
    assert len(both.results) == 6


def test_a_larger_grid_trains_only_what_is_new(store, tmp_path, monkeypatch):
    first = trials_of(store, tmp_path / "out", "mist", {"lr": [1e-3]})
    trained = []
    run = SharedPass.run

    def counted(self, *args, **kwargs):
        trained.extend(trial.name for trial in self.trials)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(SharedPass, "run", counted)
    both = trials_of(store, tmp_path / "out", "mist", {"lr": [1e-3, 2e-3]})
    assert trained == ["lr=0.002,seed=0", "lr=0.002,seed=1"]
    assert [r.info.adaptor_sha256 for r in both.results[:2]] == [r.info.adaptor_sha256 for r in first.results]


@pytest.mark.parametrize("written", [1, 2, 4])
@pytest.mark.parametrize("checkpoint_every_s", [0, 1e9])
def test_a_death_between_two_run_folders_is_mended_by_the_same_command(
    store, tmp_path, monkeypatch, written, checkpoint_every_s
):
    grid = {"lr": [1e-3, 1e-2], "weight_decay": [0.05, 1e30]}
    whole = trials_of(store, tmp_path / "whole", "linear", grid)
    write, done = finishing_module.write_run, []

    def dying(folder, *arguments, **more):
        if len(done) == written:
            raise KeyboardInterrupt("death")  # nothing below it catches it, as nothing catches a SIGKILL
        done.append(folder)
        write(folder, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(finishing_module, "write_run", dying)
        if written < 4:
            with pytest.raises(KeyboardInterrupt, match="death"):
                trials_of(store, tmp_path / "out", "linear", grid, checkpoint_every_s=checkpoint_every_s)
        else:  # after the last folder, before the checkpoint is removed
            patched.setattr(passes_module, "write_failure", lambda *_, **__: dying(None))
            with pytest.raises(KeyboardInterrupt, match="death"):
                trials_of(store, tmp_path / "out", "linear", grid, checkpoint_every_s=checkpoint_every_s)
    digests = {folder: read_run(folder).adaptor_sha256 for folder in done}
    again = trials_of(store, tmp_path / "out", "linear", grid)
    assert table_without_seconds(tmp_path / "out") == table_without_seconds(tmp_path / "whole")
    assert [r.info.adaptor_sha256 for r in again.chosen] == [r.info.adaptor_sha256 for r in whole.chosen]
    assert {folder: read_run(folder).adaptor_sha256 for folder in done} == digests
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_two_trainings_into_one_folder_are_kept_apart(store, tmp_path):
    refused = []

    def second(*_, **__):
        if not refused:
            with pytest.raises(RunError, match=r"another training writes into .*out: wait for it") as caught:
                trials_of(store, tmp_path / "out", "linear", {"lr": [1e-3]})
            refused.append(caught)

    trials_of(store, tmp_path / "out", "linear", {"lr": [1e-3]}, progress=second)
    assert refused


# Networks that cannot be stacked


class RandomProjection(torch.nn.Module):
    """A probe behind a projection that is drawn and not trained."""

    def __init__(self, spec, n_classes):
        super().__init__()
        self.register_buffer("projection", torch.randn(spec.geometry.channels, 4))
        self.classifier = torch.nn.Linear(4, n_classes)

    def forward(self, features):
        return self.classifier(features[:, 0, -1] @ self.projection)


class Branching(torch.nn.Module):
    """A probe whose way depends on its numbers, which vmap refuses."""

    def __init__(self, spec, n_classes):
        super().__init__()
        self.classifier = torch.nn.Linear(spec.geometry.channels, n_classes)

    def forward(self, features):
        logits = self.classifier(features[:, 0, -1])
        return logits if float(self.classifier.weight.detach().sum()) > 1e9 else 2 * logits


def a_kind(module, **arguments):
    return replace(ADAPTORS["linear"], build=lambda spec, _, *, n_classes: module(spec, n_classes), **arguments)


PROJECTION, BRANCHING = a_kind(RandomProjection), a_kind(Branching, cannot_stack="it looks at its numbers")


@pytest.mark.parametrize("name", ["PROJECTION", "BRANCHING"])
def test_trials_with_buffers_of_their_own_or_that_cannot_be_stacked_equal_their_solo_runs(store, tmp_path, name):
    trials = trials_of(store, tmp_path / "out", f"{__name__}:{name}", {"lr": [1e-2]}, seeds=3)
    for number, result in enumerate(trials.results):
        alone = solo(store, tmp_path / str(number), f"{__name__}:{name}", result).info
        assert result.info.adaptor_sha256 == alone.adaptor_sha256


# Memory


def test_trials_that_do_not_fit_together_come_in_groups_to_the_same_results(store, tmp_path, monkeypatch):
    together = trials_of(store, tmp_path / "together", "mist", {"lr": [1e-3, 1e-2]})
    monkeypatch.setattr(passes_module, "how_many_fit", lambda trials, **_: min(3, len(trials)))
    sizes = []
    make = SharedPass.__init__

    def counting(self, store, plans, **arguments):
        sizes.append(len(plans))
        make(self, store, plans, **arguments)

    monkeypatch.setattr(SharedPass, "__init__", counting)
    groups = trials_of(store, tmp_path / "groups", "mist", {"lr": [1e-3, 1e-2]})
    assert sizes == [3, 1]
    for a, b in zip(together.results, groups.results, strict=True):
        assert a.info.metrics["val"].score == b.info.metrics["val"].score


def test_as_many_trials_fit_as_the_memory_allows():
    alone, stacked = (TrialMemory(state=10, step=100, stacked=each) for each in (False, True))
    large = TrialMemory(state=10, step=300, stacked=False)
    assert how_many_fit([alone] * 20, free=400) == 10
    assert how_many_fit([stacked] * 20, free=440) == 2
    assert how_many_fit([alone, alone, large, alone], free=400) == 2
    assert how_many_fit([alone, large, alone], free=10_000) == 3
    assert how_many_fit([alone] * 3, free=0) == 1


@pytest.mark.parametrize(("adaptor", "stacked"), [("linear", True), ("mist", False), ("mist", True), ("last", False)])
def test_the_forecast_is_what_a_step_takes_in_the_way_it_is_trained(store, tmp_path, monkeypatch, adaptor, stacked):
    if not stacked:
        monkeypatch.setattr("coldtap.adaptors.training.stacked.CPU_STACK_VALUES", 0)
    opened, device = open_store(store), torch.device("cpu")
    plan = plan_trial(
        opened, TrialOptions(adaptor=adaptor, training=TrainingOptions(batch_size=32)), folder=tmp_path / "x"
    )
    batches = FeatureBatches(opened, plan.features, "train", batch_size=32)
    batch = next(batches.shuffled(seed=0, epoch=1))
    networks = [plan.network(opened, n_classes=3, device=device) for _ in range(5)]
    memory = forecast_trial(plan, networks[0], batches.task, batch, device=device)
    assert memory.stacked == stacked
    assert memory.state == 8 * sum(p.numel() * 4 for p in networks[1].parameters())
    # Four trials, as they are trained: their weights and moments are there before the step that is counted.
    learner = make_learner([plan] * 4, networks[1:], batches.task, device)
    learner.step(batch.features, batch.targets, [0.0] * 4)
    with _LiveBytes() as counter:
        learner.step(batch.features, batch.targets, [0.0] * 4)
    expected = memory.step * (4 if stacked else 1)
    # The gradients of trials side by side stay, and are in their state; the forecast's step makes moments besides.
    gradients = 0 if stacked else 4 * memory.state // 8
    assert counter.peak - gradients <= expected <= counter.peak + 4 * memory.state + 2000


# Protocols


def test_vtab_chooses_on_val_and_refits_on_both(store, tmp_path):
    grid = {"lr": [1e-5, 1e-2]}
    result = run_protocol(
        store,
        "linear",
        expand_grid(grid),
        protocol="vtab",
        out=tmp_path / "out",
        seeds=2,
        training=TRAINING,
        device="cpu",
    )
    assert result.setting == {"lr": 1e-2}
    assert (len(result.val), len(result.test)) == (1, 2)
    search = [read_run(path.parent) for path in sorted((tmp_path / "out" / "search").glob("*/run.json"))]
    assert [(run.settings.seed, run.settings.fit, run.settings.keep, set(run.metrics)) for run in search] == [
        (0, "train", "last", {"val"})
    ] * 2
    fields = vars(replace(TRAINING, lr=1e-2, seed=1, order_seed=0, fit="train+val", keep="last"))
    alone = train_adaptor(store, "linear", out=tmp_path / "alone", device="cpu", **fields)
    refit = read_run(result.runs[1])
    assert refit.settings == alone.info.settings
    assert set(refit.metrics) == {"test"}
    assert refit.best_epoch == 4
    assert result.test[1] == alone.info.metrics["test"].score
    weights = [load_file(path / "adaptor.safetensors") for path in (result.runs[1], alone.path)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=STACK_TOLERANCE, atol=STACK_TOLERANCE)


@pytest.mark.parametrize("arguments", [{"training": replace(TRAINING, patience=1)}, {"trials": [{"patience": 2}]}])
def test_vtab_refuses_patience_before_it_searches(store, tmp_path, arguments):
    with pytest.raises(OptionError, match=r"vtab keeps the last epoch, .* leave patience out"):
        run_protocol(store, "linear", **{"trials": [{}], **arguments}, protocol="vtab", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_lost_in_the_last_step_are_a_reason(store, tmp_path):
    with pytest.raises(RunError, match=r"training loss is nan in epoch 1 of 1"):
        train_adaptor(
            store,
            "mist",
            out=tmp_path / "run",
            fit="train+val",
            keep="last",
            lr=1e38,
            batch_size=2000,
            epochs=1,
            warmup=0.0,
            device="cpu",
        )


def test_a_refit_learns_from_val_too(tmp_path):
    # Class 2 is in val alone: only who learns from val can know it.
    sizes = {"train": 24, "val": 24, "test": 24}
    targets = [i % 2 for i in range(24)] + [2] * 24 + [2] * 24
    path = three_directions(tmp_path / "s", sizes=sizes, targets=targets)
    notes = []
    common = {"device": "cpu", "epochs": 20, "batch_size": 8, "lr": 1e-2}
    one = train_adaptor(path, "linear", out=tmp_path / "train", note=notes.append, **common)
    both = train_adaptor(path, "linear", out=tmp_path / "both", fit="train+val", keep="last", **common)
    assert one.info.metrics["test"].score < 0.5
    assert both.info.metrics["test"].score == 1.0
    assert any("no train sample has class 2, which other splits have: it cannot be learnt" in note for note in notes)


def test_the_val_protocol_tests_the_chosen_trials_as_they_are(store, tmp_path):
    result = run_protocol(
        store,
        "linear",
        expand_grid({"lr": [1e-5, 1e-2]}),
        out=tmp_path / "out",
        seeds=3,
        training=TRAINING,
        device="cpu",
    )
    assert (len(result.val), len(result.test)) == (3, 3)
    assert result.parameters == ADAPTORS["linear"].count(*_planned(store, "linear"), n_classes=3)
    assert result.bytes_per_sample == 2 * 8 * 4  # prefix token and patch mean, eight channels, float32


def _planned(store, adaptor):
    kind = ADAPTORS[adaptor]
    return kind.plan(open_store(store), kind.options())


def test_a_protocol_needs_a_test_split(tmp_path):
    path = three_directions(tmp_path / "s", sizes={"train": 24, "val": 12})
    with pytest.raises(SourceError, match=r"no test split, which a protocol ends with"):
        run_protocol(path, "linear", [{}], out=tmp_path / "out")


# Another way to trials than a grid


def test_optuna_asks_and_is_told(store, tmp_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for round_ in range(2):
        asked = [study.ask() for _ in range(4)]
        settings = [{"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)} for trial in asked]
        trials = train_trials(
            store, "linear", settings, out=tmp_path / str(round_), training=TRAINING, test=False, device="cpu"
        )
        for trial, result in zip(asked, trials.results, strict=True):
            study.tell(trial, result.info.metrics["val"].score)
    assert len(study.trials) == 8
    assert study.best_value == max(trial.value for trial in study.trials)


# Bad input


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"rank": [4]}, r"`grid\['rank'\]`: adaptor linear has no such setting; it knows .*lr.*pool"),
        ({"lr": ["fast"]}, r"lr=fast: it must be a number"),
        ({"epochs": [2.5]}, r"epochs=2.5: it must be a whole number"),
        ({"pool": ["middle"]}, r"pool=middle: it must be one of patch-mean"),
        ({"lr": [1e-3, "0.001"]}, r"the trial lr=0.001,seed=0 is asked for twice"),
        ({"lr": []}, r"`grid\['lr'\]`: give at least one value"),
        ({"lr": [-1]}, r"lr=-1.0: it must be above 0"),
        ({"patience": [0]}, r"patience=0: it must be 1 or more"),
        ({"tap": [9]}, r"linear needs tap 9"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_is_written(store, tmp_path, grid, message):
    from coldtap.errors import ColdtapError

    with pytest.raises(ColdtapError, match=message):
        trials_of(store, tmp_path / "out", "linear", grid)
    assert not (tmp_path / "out").exists()


def test_a_setting_given_to_all_and_to_one_is_refused(store, tmp_path):
    with pytest.raises(OptionError, match=r"pool is given twice"):
        trials_of(store, tmp_path / "out", "linear", {"pool": ["both"]}, settings={"pool": "both"})


def test_splits_of_one_sample(tmp_path):
    path = three_directions(tmp_path / "one", sizes={"train": 1, "val": 8})
    with pytest.raises(SourceError, match=r"has 1 train sample: there is nothing to tell apart"):
        train_adaptor(path, "linear", out=tmp_path / "run", device="cpu")
    path = three_directions(tmp_path / "val", sizes={"train": 24, "val": 1})
    notes = []
    train_adaptor(path, "linear", out=tmp_path / "run", device="cpu", epochs=2, note=notes.append)
    assert any("val has 1 sample: its score is 0 or 1" in note for note in notes)


def test_the_command_line_trains_a_grid(store, tmp_path):
    options = ("--adaptor", "linear", "--out", tmp_path / "out", "--epochs", "2", "--device", "cpu")
    result = coldtap("train-adaptor", store, *options, "--grid", "lr=1e-3, 1e-2", "--grid", "pool=both", "--seeds", "2")
    assert result.exit_code == 0, result.stderr
    assert "4 trials of linear; chosen on val: lr=" in result.stdout
    assert "pool=both" in result.stdout
    assert "4 trials, in one computation: a forecast of" in result.stderr
    as_json = json.loads(
        coldtap(
            "train-adaptor", store, *options, "--grid", "lr=1e-3,1e-2", "--grid", "pool=both", "--seeds", "2", "--json"
        ).stdout
    )
    assert [trial["trial"] for trial in as_json][:2] == ["lr=0.001,pool=both,seed=0", "lr=0.001,pool=both,seed=1"]
    assert sum(trial["chosen"] for trial in as_json) == 2


def test_the_command_line_follows_a_protocol(store, tmp_path):
    options = ("--adaptor", "linear", "--out", tmp_path / "out", "--epochs", "2", "--device", "cpu", "--seeds", "2")
    result = coldtap("train-adaptor", store, *options, "--grid", "lr=1e-3,1e-2", "--protocol", "vtab")
    assert result.exit_code == 0, result.stderr
    assert "linear by protocol vtab: test top1 " in result.stdout
    assert "over 2 seeds; chosen on val" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "lr"), "--grid lr: expected NAME=VALUE, such as lr=1e-3,3e-3"),
        (("--grid", "lr=1e-3", "--grid", "lr=1e-2"), "lr is given twice: put all its values into one, with commas"),
        (("--grid", "lr="), "--grid lr: give at least one value"),
        (("--seeds", "0"), "seeds=0: it must be 1 or more"),
        (("--protocol", "best"), "protocol=best: it must be one of val, vtab"),
    ],
)
def test_the_command_line_refuses(store, tmp_path, arguments, message):
    result = coldtap("train-adaptor", store, "--adaptor", "linear", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_random_numbers_of_a_step_depend_on_its_number_alone():
    with seeded(3, 7, torch.device("cpu")):
        first = torch.rand(3)
    with seeded(3, 7, torch.device("cpu")):
        assert np.array_equal(first, torch.rand(3))
