"""A finished run on another store: of its own extractor, and across quantisation, with a compensation and without."""

import json

import numpy as np
import pytest
import torch

from coldtap import add_targets, evaluate_adaptor, fit_compensation, open_store, train_adaptor
from coldtap.adaptors import read_run
from coldtap.errors import MissingFeaturesError, RunError, SourceError, StoreError
from tests.helpers.jobs import coldtap, error_line, files
from tests.helpers.twins import FIELDS, FLOAT_FIELDS, QUANTISED, make_twins

NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    twins = make_twins(
        tmp_path_factory.mktemp("twins"), class_names=NAMES, float_arguments={"class_names": NAMES}, tier="float16"
    )
    fit_compensation(twins.store, twins.float_store)
    return twins


@pytest.fixture(scope="module")
def runs(tmp_path_factory, twins):
    """Linear probes: of float features, of quantised ones, and of these through their compensation."""
    folder = tmp_path_factory.mktemp("runs")
    train(twins.float_store, folder / "float")
    train(twins.store, folder / "quantised")
    train(twins.store, folder / "compensated", compensation="cwac")
    return folder


def train(store, out, adaptor="linear", **arguments):
    how = {"epochs": 15, "batch_size": 8, "lr": 1e-2, "device": "cpu", **arguments}
    return train_adaptor(store, adaptor, out=out, **how)


def evaluate(run, store, **options):
    return evaluate_adaptor(run, store, device="cpu", **options)


# On its own extractor


@pytest.mark.parametrize("name", ["float", "quantised", "compensated"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_run_on_its_own_store_does_as_run_json_says(twins, runs, name, split):
    store = twins.float_store if name == "float" else twins.store
    found = evaluate(runs / name, store, split=split)
    assert found.metrics == read_run(runs / name).metrics[split]
    assert found.metric == "top1"
    assert found.compensation == ("the run's" if name == "compensated" else None)
    assert (found.split, found.differences) == (split, ())


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("labels", lambda i: [i % 3, 3] if i % 2 else [i % 3]),
        ("token-class", lambda i: np.full((2, 3), i % 3) - (i % 5 == 0)),
    ],
)
def test_other_kinds_of_target_are_evaluated_too(tmp_path, kind, target):
    twins = make_twins(tmp_path)
    ids = [f"sample-{i:03d}" for i in range(88)]
    add_targets(twins.store, "more", {sample: target(i) for i, sample in enumerate(ids)}, kind=kind)
    train(twins.store, tmp_path / "run", target="more", epochs=2)
    info = read_run(tmp_path / "run")
    found = evaluate(tmp_path / "run", twins.store)
    assert found.metrics == info.metrics["test"]
    assert found.metric == info.metric != "top1"


def test_nothing_is_written(twins, runs):
    before = files(runs), files(twins.store)
    evaluate(runs / "compensated", twins.store)
    assert (files(runs), files(twins.store)) == before


# Across quantisation


def test_another_quantisation_needs_leave_and_is_told(twins, runs):
    with pytest.raises(
        StoreError, match=r"quantisation: None → \{.*w6a6.*: with `across_quantisation=True` the run is"
    ):
        evaluate(runs / "float", twins.store)
    told = []
    found = evaluate(runs / "float", twins.store, across_quantisation=True, note=told.append)
    assert len(told) == 1
    assert "is of another arithmetic than" in told[0]
    assert "w6a6" in told[0]
    assert [field.partition(":")[0] for field in found.differences] == ["quantisation"]


def test_precision_and_the_parts_of_a_quantisation_are_named(tmp_path, twins, runs):
    fields = {**FIELDS, "precision": "bfloat16", "quantisation": {**QUANTISED, "scheme": "w8a8"}}
    other = make_twins(tmp_path, extractor=fields, class_names=NAMES)
    found = evaluate(runs / "quantised", other.store, across_quantisation=True)
    assert found.differences == ("precision: float32 → bfloat16", "quantisation.scheme: w6a6 → w8a8")


def test_a_compensation_brings_float_adaptors_back_on_quantised_features(twins, runs):
    plain = evaluate(runs / "float", twins.store, across_quantisation=True)
    mapped = evaluate(runs / "float", twins.store, across_quantisation=True, compensation="cwac")
    own = read_run(runs / "float").metrics["test"]
    assert (plain.compensation, mapped.compensation) == (None, "cwac")
    assert mapped.metrics.loss == pytest.approx(own.loss, abs=0.01)
    assert mapped.metrics.score == own.score == 1.0
    assert plain.metrics.loss > own.loss + 0.5
    assert plain.metrics.score < 0.8


def test_adaptors_of_compensated_features_go_on_float_ones_without_their_map(twins, runs):
    own = read_run(runs / "compensated").metrics["test"]
    found = evaluate(runs / "compensated", twins.float_store, across_quantisation=True)
    assert found.compensation is None
    assert found.metrics.loss == pytest.approx(own.loss, abs=0.01)


def test_a_named_compensation_takes_the_place_of_the_runs_own(tmp_path, twins, runs):
    again = evaluate(runs / "compensated", twins.store, compensation="cwac")
    assert again.metrics == read_run(runs / "compensated").metrics["test"]
    assert again.compensation == "cwac"


# Refused


@pytest.mark.parametrize("across", [True, False])
def test_another_backbone_is_refused_by_its_fields(tmp_path, runs, across):
    other = make_twins(tmp_path, extractor={**FLOAT_FIELDS, "weights": "0" * 64})
    with pytest.raises(StoreError, match=r"another extractor than .* trained on: weights: f+…f+ → 0+…0+: give a store"):
        evaluate(runs / "float", other.store, across_quantisation=across)


def test_features_that_the_store_lacks_are_named(tmp_path, runs):
    needed = read_run(runs / "float").features
    other = make_twins(tmp_path, extractor=FLOAT_FIELDS, gathers={"layers": [0, 1], "sum": [2]})
    message = rf"reads {needed.array} of taps \[2\]; .* does not hold them: cache again with `gather='{needed.gather}'`"
    with pytest.raises(MissingFeaturesError, match=message):
        evaluate(runs / "float", other.store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ["ant", "cow", "bee"]}, r"has other classes of 'label' than .* has learnt, or in another"),
        ({"targets": [i % 4 for i in range(88)]}, r"has 4 classes of 'label'; .* has learnt 3"),
    ],
)
def test_other_classes_are_refused(tmp_path, runs, arguments, message):
    other = make_twins(tmp_path, extractor=FLOAT_FIELDS, **arguments)
    with pytest.raises(StoreError, match=message):
        evaluate(runs / "float", other.store)


def test_targets_of_another_kind_or_none_are_refused(tmp_path, twins, runs):
    add_targets(twins.float_store, "more", {f"sample-{i:03d}": i % 3 for i in range(88)}, kind="class")
    train(twins.float_store, tmp_path / "run", target="more", epochs=1)
    other = make_twins(tmp_path, extractor=FLOAT_FIELDS)
    with pytest.raises(MissingFeaturesError, match=r"has no targets 'more'"):
        evaluate(tmp_path / "run", other.store)
    add_targets(other.store, "more", {f"sample-{i:03d}": [i % 3] for i in range(88)}, kind="labels")
    with pytest.raises(StoreError, match=r"has targets 'more' of kind labels; .* has learnt class"):
        evaluate(tmp_path / "run", other.store)


def test_missing_things_are_refused(tmp_path, twins, runs):
    with pytest.raises(RunError, match=r"there is no finished run at"):
        evaluate(tmp_path, twins.store)
    with pytest.raises(StoreError, match=r"there is no store at"):
        evaluate(runs / "float", tmp_path)
    with pytest.raises(MissingFeaturesError, match=r"no compensation 'qwt'; it has 'cwac'"):
        evaluate(runs / "quantised", twins.store, compensation="qwt")
    part = make_twins(tmp_path, sizes={"train": 40}, extractor=FLOAT_FIELDS)
    with pytest.raises(SourceError, match=r"has no test samples"):
        evaluate(runs / "float", part.store)


# The command


def test_the_command_prints_scores(twins, runs):
    words = (runs / "float", twins.store, "--split", "val", "--across-quantisation", "--compensation", "cwac")
    result = coldtap("evaluate", *words, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{runs / 'float'} on {twins.store}, val (20 samples), compensation cwac: top1 ")
    (line,) = result.stderr.splitlines()
    assert "another arithmetic" in line
    about = json.loads(coldtap("evaluate", *words, "--json").stdout)
    assert about["metrics"]["n_samples"] == 20
    assert about["metrics"]["scores"]["top1"] == about["metrics"]["score"]
    assert (about["compensation"], about["metric"]) == ("cwac", "top1")
    assert about["differences"][0].startswith("quantisation: None → ")


def test_the_command_refuses_in_one_line(twins, runs):
    result = coldtap("evaluate", runs / "float", twins.store)
    assert result.exit_code == 5
    assert "with --across-quantisation the run is evaluated all the same" in error_line(result)
    assert open_store(twins.store).compensations == ("cwac",)
