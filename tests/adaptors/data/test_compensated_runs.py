"""Adaptors behind a compensation: features are restored and mapped, the run carries the map, and all that reads it."""

import csv
import io
import json
import re

import numpy as np
import onnxruntime
import pytest
import torch

from coldtap import fit_compensation, open_store
from coldtap.adaptors import (
    FeatureBatches,
    TrainingOptions,
    export_onnx,
    load_adaptor,
    run_protocol,
    train_adaptor,
    train_trials,
)
from coldtap.adaptors.data.compensated import maps_of
from coldtap.adaptors.data.restore import StoredTaps
from coldtap.adaptors.networks.contract import spec_of
from coldtap.adaptors.runs.load import load_run
from coldtap.errors import InterruptedRunError, MissingFeaturesError, RunError
from tests.helpers.jobs import coldtap, error_line, read
from tests.helpers.pictures import write_pictures
from tests.helpers.synthetic import GEOMETRY
from tests.helpers.twins import make_twins

NAME = GEOMETRY.name


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    twins = make_twins(tmp_path_factory.mktemp("twins"), common=48)
    fit_compensation(twins.store, twins.float_store)
    return twins.store


def train(store, out, adaptor="linear", **arguments):
    how = {"epochs": 4, "batch_size": 8, "device": "cpu", "compensation": "cwac", **arguments}
    return train_adaptor(store, adaptor, out=out, **how)


def stored_rows(store, info, split):
    """Features of a split as the store has them (sample, *row shape), and targets."""
    rows = store.rows(split)
    values = np.empty((len(rows), *info.features.row_shape), np.float32)
    taps = None if info.features.gather == "sum" else info.features.taps
    store.arrays[info.features.array].read_into(values, rows, taps)
    return torch.from_numpy(values), torch.from_numpy(store.targets(rows))


# Batches


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("array", "taps"), [("layers", (2, 0)), ("layers", (0, 1, 2)), ("sum", (2,)), ("pooled", (1,))]
)
@pytest.mark.parametrize("tier", ["float32", "float16", "bfloat16", "int8"])
def test_batches_are_restored_and_then_mapped(tmp_path, tier, array, taps, resident):
    twins = make_twins(tmp_path, sizes={"train": 40}, noise=0.3, massive=500, tier=tier)
    fit_compensation(twins.store, twins.float_store)
    store = open_store(twins.store)
    found = store.arrays[f"{array}/{NAME}" + ("/2" if array == "sum" else "")]
    spec = spec_of(store, found, taps)
    maps = maps_of(store, spec, "cwac")
    exceptions = StoredTaps(store, spec).read(np.empty((40, *spec.row_shape), found.spec.dtype), store.rows("train"))
    assert (len(exceptions.value) > 0) == (tier == "int8" and array != "pooled")  # what codes do not hold is mapped too
    batches = FeatureBatches(store, spec, "train", batch_size=16, resident=resident, maps=maps)
    values = np.concatenate([batch.features.numpy().copy() for batch in batches.ordered()])
    whole = read(found, store.rows("train"))
    plain = whole if array == "sum" else whole[:, [found.taps.index(tap) for tap in taps]]
    scale, offset = ((of[0] if array == "sum" else of[:, None]) for of in (maps.scale, maps.offset))
    np.testing.assert_allclose(values, plain * scale + offset, rtol=1e-5, atol=1e-5)
    assert np.abs(values - plain).mean() > 0.1


def test_large_exponents_and_maps_go_together(tmp_path):
    twins = make_twins(tmp_path, sizes={"train": 40}, tier="float16")
    fit_compensation(twins.store, twins.float_store)
    store = open_store(twins.store)
    array = store.arrays[f"layers/{NAME}"]
    object.__setattr__(array.numbers, "exponents", (0, 3, 5))
    spec = spec_of(store, array, (0, 1, 2))
    maps = maps_of(store, spec, "cwac")
    (batch,) = FeatureBatches(store, spec, "train", batch_size=40, maps=maps).ordered()
    expected = read(array, store.rows("train")) * maps.scale[:, None] + maps.offset[:, None]
    np.testing.assert_allclose(batch.features.numpy(), expected, rtol=1e-5, atol=1e-5)


# Runs


@pytest.mark.parametrize(("adaptor", "settings"), [("linear", {"pool": "both"}), ("mist", {"depth": 1}), ("last", {})])
def test_a_run_carries_its_map_and_says_so(store, tmp_path, adaptor, settings):
    train(store, tmp_path / "run", adaptor, settings=settings)
    module, info = load_adaptor(tmp_path / "run")
    assert info.settings.compensation == "cwac"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["compensation"] == "cwac"
    opened = open_store(store)
    features, targets = stored_rows(opened, info, "test")
    with torch.inference_mode():
        right = (module(features).argmax(1) == targets).double().mean()
        bare = load_run(tmp_path / "run")
        maps = maps_of(opened, info.features, "cwac")
        np.testing.assert_array_equal(bare.maps.scale, maps.scale)
        np.testing.assert_array_equal(bare.maps.offset, maps.offset)
        shape = (1, 8) if info.features.gather == "sum" else (-1, 1, 8)
        mapped = features * torch.from_numpy(maps.scale.reshape(shape)) + torch.from_numpy(maps.offset.reshape(shape))
        torch.testing.assert_close(module(features), bare.adaptor(mapped))
        assert not torch.allclose(module(features), bare.adaptor(features), atol=0.1)
    assert float(right) == pytest.approx(info.metrics["test"].score)


def test_a_run_without_one_is_what_it_was(store, tmp_path):
    train(store, tmp_path / "run", compensation=None)
    assert not (tmp_path / "run" / "compensation.safetensors").exists()
    assert load_run(tmp_path / "run").maps is None
    assert type(load_adaptor(tmp_path / "run")[0]) is type(load_run(tmp_path / "run").adaptor)


def test_with_and_without_are_runs_of_other_settings(store, tmp_path):
    train(store, tmp_path / "run")
    assert train(store, tmp_path / "run").was_finished
    with pytest.raises(RunError, match=r"holds a run of other settings: compensation: cwac → None"):
        train(store, tmp_path / "run", compensation=None)
    with pytest.raises(InterruptedRunError, match=r"after epoch 1"):
        train(store, tmp_path / "half", progress=interrupt)
    with pytest.raises(RunError, match=r"compensation: cwac → None"):
        train(store, tmp_path / "half", compensation=None)


def interrupt(trials, *, epoch, epochs, seconds):
    raise KeyboardInterrupt


def test_an_interrupted_run_ends_in_the_same_bits(store, tmp_path):
    train(store, tmp_path / "whole")
    with pytest.raises(InterruptedRunError, match=r"after epoch 1"):
        train(store, tmp_path / "half", progress=interrupt)
    assert train(store, tmp_path / "half").resumed_after == 1
    for name in ("adaptor.safetensors", "compensation.safetensors"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_trials_and_a_protocol_go_through_it(store, tmp_path):
    training = TrainingOptions(epochs=3, batch_size=8, compensation="cwac")
    how = {"training": training, "device": "cpu", "seeds": 1}
    trials = train_trials(store, "linear", [{"lr": 1e-2}, {"lr": 1e-3}], out=tmp_path / "trials", **how)
    result = run_protocol(
        store, "linear", [{"lr": 1e-2}, {"lr": 1e-3}], protocol="vtab", out=tmp_path / "protocol", **how
    )
    opened = open_store(store)
    for run in (trials.chosen[0].path, result.runs[0]):
        module, info = load_adaptor(run)
        assert info.settings.compensation == "cwac"
        features, targets = stored_rows(opened, info, "test")
        with torch.inference_mode():
            right = (module(features).argmax(1) == targets).double().mean()
        assert float(right) == pytest.approx(info.metrics["test"].score)


def test_a_run_of_format_3_is_read(store, tmp_path):
    train(store, tmp_path / "run", compensation=None)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["settings"]["compensation"], record["compensation_sha256"]
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "format": 3}))
    assert load_adaptor(tmp_path / "run")[1].settings.compensation is None
    assert train(store, tmp_path / "run", compensation=None).was_finished


# Refused


def test_an_unknown_one_is_refused_before_anything_is_written(store, tmp_path):
    with pytest.raises(MissingFeaturesError, match=r"no compensation 'qwt'; it has 'cwac'"):
        train(store, tmp_path / "run", compensation="qwt")
    assert not (tmp_path / "run").exists()


def test_one_without_a_map_of_the_array_is_refused(tmp_path):
    twins = make_twins(tmp_path, common=48, float_arguments={"gathers": {"pooled": [0, 1, 2]}})
    fit_compensation(twins.store, twins.float_store)
    with pytest.raises(MissingFeaturesError, match=rf"'cwac' of .* has no map of sum/{NAME}/2, only of pooled/{NAME}:"):
        train(twins.store, tmp_path / "run", "mist")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), r"compensation\.safetensors cannot be read"),
        (lambda file: file.write_bytes(b"x"), r"compensation\.safetensors is not what run\.json says"),
    ],
)
def test_a_run_whose_map_is_damaged_is_refused(store, tmp_path, spoil, message):
    train(store, tmp_path / "run", epochs=1)
    spoil(tmp_path / "run" / "compensation.safetensors")
    with pytest.raises(RunError, match=message):
        load_adaptor(tmp_path / "run")


# What reads a run


def test_an_exported_file_takes_features_as_the_extractor_gives_them(store, tmp_path):
    train(store, tmp_path / "run")
    export = export_onnx(tmp_path / "run")
    assert export.agreement is not None
    module, info = load_adaptor(tmp_path / "run")
    features, _ = stored_rows(open_store(store), info, "test")
    (found,) = onnxruntime.InferenceSession(export.path).run(["logits"], {"features": features.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(found, module(features).numpy(), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    places = (("train", 20), ("val", 3), ("test", 4))
    names = [
        f"{split}/{name}/{i}.png" for split, n_images in places for name in ("ant", "bee") for i in range(n_images)
    ]
    write_pictures(folder, *names)
    return folder


def test_predictions_of_a_quantised_backbone_go_through_the_map(tmp_path, images):
    calibrated = ("--calibration", images, "--scheme", "w4a4", "--compensate", "none")
    done("quantize", "coldtap/vit-reference", *calibrated, "--out", tmp_path / "w4a4")
    gathered = ("--taps", "9", "--gather", "pooled", "--device", "cpu")
    done("cache-features", images, tmp_path / "store", "--quantized", tmp_path / "w4a4", *gathered)
    done("cache-features", images, tmp_path / "float", *gathered)
    done("compensate", tmp_path / "store", tmp_path / "float")
    words = ("--adaptor", "linear", "--epochs", 3, "--device", "cpu", "--compensation", "cwac")
    done("train-adaptor", tmp_path / "store", "--out", tmp_path / "run", *words)
    asked = ("predict", tmp_path / "run", images, "--split", "test", "--device", "cpu")
    shown = done(*asked, "--quantized", tmp_path / "w4a4")
    lines = list(csv.DictReader(io.StringIO(shown.stdout)))
    opened = open_store(tmp_path / "store")
    module, info = load_adaptor(tmp_path / "run")
    features, _ = stored_rows(opened, info, "test")
    with torch.inference_mode():
        likely = module(features).softmax(1).max(1).values.tolist()
    of_store = dict(zip(opened.sample_ids(opened.rows("test")), likely, strict=True))
    assert {line["id"] for line in lines} == set(of_store)
    for line in lines:
        assert float(line["probability"]) == pytest.approx(of_store[line["id"]], abs=2e-3)
    refused = coldtap(*asked)
    assert refused.exit_code == 4
    assert re.search(r"features of a quantised backbone \(w4a4, artefact \w{12}\): give its", error_line(refused))


def done(*words):
    result = coldtap(*words)
    assert result.exit_code == 0, result.stderr
    return result


def test_the_command_refuses_an_unknown_one_in_one_line(store, tmp_path):
    words = ("--adaptor", "linear", "--out", tmp_path / "run", "--compensation", "qwt")
    result = coldtap("train-adaptor", store, *words)
    assert result.exit_code == 5
    assert "has no compensation 'qwt'; it has 'cwac'" in error_line(result)
