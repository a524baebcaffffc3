"""A compensation in a store: fitted on rows that a float store has too, recorded, verified, shown and carried along."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from coldtap import fit_compensation, open_store
from coldtap.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    MissingFeaturesError,
    OptionError,
    StoreError,
    StoreLockedError,
)
from coldtap.stores.convert.convert import convert_store
from coldtap.stores.format.canonical import canonical_json
from coldtap.stores.format.compensation import FITTED
from coldtap.stores.reading.describe import describe_store
from coldtap.stores.storage.lock import StoreLock
from coldtap.stores.verify.verify import verify_store
from coldtap.stores.writing.updates import update_file
from tests.helpers.jobs import cache, coldtap, error_line, files, in_memory, read
from tests.helpers.places import ROOT
from tests.helpers.synthetic import GEOMETRY
from tests.helpers.twins import FIELDS, FLOAT_FIELDS, QUANTISED, make_twins

LAYERS, POOLED, SUM = (f"{gather}/{GEOMETRY.name}" for gather in ("layers", "pooled", "sum"))
SUM += "/2"


@pytest.fixture
def twins(tmp_path):
    return make_twins(tmp_path, common=48)


# The fit


@pytest.mark.parametrize("tier", ["float32", "float16", "bfloat16", "int8"])
def test_the_maps_between_the_stores_are_found(tmp_path, tier):
    twins = make_twins(tmp_path, common=48, tier=tier, layout="compact" if tier == "int8" else "fast")
    report = fit_compensation(twins.store, twins.float_store)
    maps = open_store(twins.store).compensation("cwac").maps
    assert set(maps) == {LAYERS, POOLED, SUM}
    for name in (LAYERS, POOLED):
        np.testing.assert_allclose(maps[name].scale, twins.scale, rtol=0.03)
        np.testing.assert_allclose(maps[name].offset, twins.offset, rtol=0.03, atol=0.1)
        assert maps[name].scale.dtype == maps[name].offset.dtype == np.float32
    assert (report.n_rows, report.n_samples, report.split, report.status) == (48, 48, "train", "written")
    assert [gain.tap for gain in report.arrays[LAYERS]] == [0, 1, 2]
    assert all(gain.after_db > 20 > gain.before_db and gain.mapped == 8 for gain in report.arrays[LAYERS])


def test_without_a_ridge_it_is_least_squares_of_each_channel(twins):
    fit_compensation(twins.store, twins.float_store, ridge=0)
    maps = open_store(twins.store).compensation("cwac").maps
    for name in (LAYERS, SUM):
        x, y = (train_values(path, name) for path in (twins.store, twins.float_store))
        for tap in range(x.shape[1]):
            for channel in range(8):
                slope, offset = np.polyfit(x[:, tap, :, channel].ravel(), y[:, tap, :, channel].ravel(), 1)
                assert maps[name].scale[tap, channel] == pytest.approx(slope, rel=1e-5)
                assert maps[name].offset[tap, channel] == pytest.approx(offset, rel=1e-4, abs=1e-5)


def train_values(path, name):
    """Values (sample, tap, token, channel) of the train split, in the order of the ids."""
    store = open_store(path)
    rows = store.rows("train")
    rows = rows[np.argsort(store.sample_ids(rows))]
    values = read(store.arrays[name], rows).astype(np.float64)
    return values.reshape(len(rows), -1, *values.shape[-2:])


def test_the_gain_is_that_of_samples_that_were_held_out(tmp_path):
    """Views of a sample are never in two folds: 34 samples of two views do not divide by 4."""
    twins = make_twins(tmp_path, sizes={"train": 34}, noise=3.0, views=1)
    report = fit_compensation(twins.store, twins.float_store, ridge=0)
    x, y = (both_views(path) for path in (twins.store, twins.float_store))  # (view, sample, tap, token, channel)
    for gain in report.arrays[LAYERS]:
        signal = before = after = 0.0
        for fold in range(4):
            held_out = np.arange(34) % 4 == fold
            for channel in range(8):
                at = (gain.tap, slice(None), channel)
                (x_fit, y_fit), (x_out, y_out) = (
                    [values[:, which][(slice(None), slice(None), *at)].ravel() for values in (x, y)]
                    for which in (~held_out, held_out)
                )
                slope, offset = np.polyfit(x_fit, y_fit, 1)
                signal += y_out.var() * len(y_out)
                before += np.square(y_out - x_out).sum()
                after += np.square(y_out - slope * x_out - offset).sum()
        assert gain.before_db == pytest.approx(10 * np.log10(signal / before), abs=0.006)
        assert gain.after_db == pytest.approx(10 * np.log10(signal / after), abs=0.006)


def both_views(path):
    store = open_store(path)
    array = store.arrays[LAYERS]
    return np.stack([read(array, store.rows("train", view)) for view in (0, 1)]).astype(np.float64)


def test_no_row_of_another_split_is_looked_at(tmp_path):
    whole = make_twins(tmp_path / "whole")
    part = make_twins(tmp_path / "part", common=48)
    for twins in (whole, part):
        fit_compensation(twins.store, twins.float_store)
    found = [open_store(twins.store).compensation("cwac") for twins in (whole, part)]
    assert {*open_store(whole.float_store).splits} == {"train", "val", "test"}
    for name in (LAYERS, POOLED, SUM):
        np.testing.assert_array_equal(found[0].maps[name].scale, found[1].maps[name].scale)
        np.testing.assert_array_equal(found[0].maps[name].offset, found[1].maps[name].offset)


def test_the_float_store_may_hold_the_samples_elsewhere(tmp_path):
    straight, moved = make_twins(tmp_path / "a"), make_twins(tmp_path / "b", float_split="val")
    reports = [fit_compensation(twins.store, twins.float_store) for twins in (straight, moved)]
    rows = [open_store(twins.float_store).rows("val") for twins in (straight, moved)]
    assert len(rows[0]) < len(rows[1])
    assert reports[0].arrays == reports[1].arrays


@pytest.mark.parametrize(("float_rows", "n_rows"), [({"seed": 7}, 96), ({"seed": 8}, 48)])
def test_views_are_pairs_where_both_stores_cut_them_alike(tmp_path, float_rows, n_rows):
    arguments = {"extractor": FLOAT_FIELDS, "rows": float_rows}
    twins = make_twins(tmp_path, common=48, views=1, rows={"seed": 7}, float_arguments=arguments)
    report = fit_compensation(twins.store, twins.float_store)
    assert (report.n_rows, report.n_samples) == (n_rows, 48)


def test_arrays_and_taps_that_the_float_store_lacks_stay_without_a_map(tmp_path):
    gathers = {"layers": [0, 1], "pooled": [0, 1, 2]}
    twins = make_twins(tmp_path, common=48, float_arguments={"gathers": gathers})
    assert set(fit_compensation(twins.store, twins.float_store).arrays) == {POOLED}
    assert set(open_store(twins.store).compensation("cwac").maps) == {POOLED}


def test_of_many_rows_the_first_ones_can_do(twins):
    report = fit_compensation(twins.store, twins.float_store, max_rows=40)
    assert (report.n_rows, report.n_samples) == (40, 40)
    assert open_store(twins.store).compensation("cwac").fitted["rows"] == 40


def test_real_features_of_two_precisions_are_paired(tmp_path):
    """The extractor that ran is that of the recipe: bfloat16 against float32 of the same tiny network."""
    cache(in_memory(train=36, val=4), tmp_path / "half", precision="bfloat16")
    cache(in_memory(train=34), tmp_path / "float")
    report = fit_compensation(tmp_path / "half", tmp_path / "float")
    assert report.n_samples == 34
    assert all(gain.after_db > 30 for of in report.arrays.values() for gain in of)
    assert verify_store(tmp_path / "half").problems == ()


# What is recorded


def test_features_stay_and_the_digest_changes(twins):
    before, digest = files(twins.store), open_store(twins.store).digest
    report = fit_compensation(twins.store, twins.float_store, name="mine")
    after, store = files(twins.store), open_store(twins.store)
    assert {name for name in after if after[name] != before.get(name)} == {"manifest", "compensation/mine.safetensors"}
    assert report.digest == store.digest != digest
    assert store.compensations == ("mine",)
    assert verify_store(twins.store).problems == ()


def test_a_stranger_reads_maps_and_origin_with_safetensors_alone(twins):
    report = fit_compensation(twins.store, twins.float_store)
    float_store = open_store(twins.float_store)
    with safe_open(twins.store / "compensation/cwac.safetensors", "numpy") as file:
        names = sorted(file.keys())
        scale = file.get_tensor(f"{LAYERS}/scale")
        fitted = json.loads(file.metadata()["coldtap"])
    assert names == sorted(f"{array}/{part}" for array in (LAYERS, POOLED, SUM) for part in ("scale", "offset"))
    assert scale.shape == (3, 8)
    assert set(fitted) == FITTED
    assert fitted["float_store"] == {"address": float_store.recipe.address, "digest": float_store.digest}
    assert fitted["store"] == {"address": open_store(twins.store).recipe.address, "tier": "float32"}
    assert (fitted["split"], fitted["rows"], fitted["samples"], fitted["ridge"]) == ("train", 48, 48, 1e-4)
    assert fitted["gate"] == {"held_out": "samples", "folds": 4}
    assert fitted["gain"][LAYERS][0]["after_db"] == report.arrays[LAYERS][0].after_db


def test_the_same_call_again_changes_nothing_and_another_replaces(twins):
    fit_compensation(twins.store, twins.float_store)
    before = files(twins.store)
    again = fit_compensation(twins.store, twins.float_store)
    assert again.status == "unchanged"
    assert files(twins.store) == before
    other = fit_compensation(twins.store, twins.float_store, ridge=0.5)
    assert other.status == "replaced"
    assert other.digest != again.digest
    assert open_store(twins.store).compensations == ("cwac",)
    assert open_store(twins.store).compensation("cwac").fitted["ridge"] == 0.5


DYING = "import sys; from coldtap.stores.compensation.fit import fit_compensation; fit_compensation(*sys.argv[1:])"


def test_a_call_that_died_is_mended_by_the_same_call(twins):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLDTAP_FAULT": "manifest-temporary"}
    command = [sys.executable, "-c", DYING, str(twins.store), str(twins.float_store)]
    died = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with pytest.raises(CorruptStoreError, match=r"cwac\.safetensors: the manifest does not list it"):
        open_store(twins.store).compensation("cwac")
    assert [problem.where for problem in verify_store(twins.store).problems if "safetensors" in problem.where]
    fit_compensation(twins.store, twins.float_store)
    assert verify_store(twins.store).problems == ()
    assert open_store(twins.store).compensations == ("cwac",)


@pytest.mark.parametrize(("tier", "layout"), [("float16", "fast"), ("int8", "compact")])
def test_a_converted_store_keeps_it_and_says_on_which_tier_it_was_fitted(tmp_path, twins, tier, layout):
    fit_compensation(twins.store, twins.float_store)
    convert_store(twins.store, tmp_path / "new", tier=tier, layout=layout)
    old, new = open_store(twins.store), open_store(tmp_path / "new")
    assert new.compensations == ("cwac",)
    name = "compensation/cwac.safetensors"
    assert new.read_file(name) == old.read_file(name)
    assert new.compensation("cwac").fitted["store"] == {"address": old.recipe.address, "tier": "float32"}
    assert verify_store(tmp_path / "new").problems == ()


# Refused


def test_an_unknown_name_is_told_with_those_that_are_there(twins):
    with pytest.raises(MissingFeaturesError, match=r"no compensation 'qwt'; it has none: fit one with"):
        open_store(twins.store).compensation("qwt")
    fit_compensation(twins.store, twins.float_store)
    with pytest.raises(MissingFeaturesError, match=r"no compensation 'qwt'; it has 'cwac'"):
        open_store(twins.store).compensation("qwt")


@pytest.mark.parametrize(
    ("fields", "float_fields", "message"),
    [
        (FIELDS, {**FLOAT_FIELDS, "weights": "0" * 64}, r"not of one backbone: weights: f+…f+ → 0+…0+: give"),
        (FIELDS, {**FLOAT_FIELDS, "preprocess": {"height": 8}}, r"not of one backbone: preprocess: \(absent\) →"),
        (FIELDS, {**FIELDS, "quantisation": {**QUANTISED, "scheme": "w8a8"}}, r"is of a quantised backbone itself"),
        (FLOAT_FIELDS, FLOAT_FIELDS, r"are of one extractor: there is nothing to compensate"),
    ],
)
def test_stores_that_are_no_twins_are_refused(tmp_path, fields, float_fields, message):
    twins = make_twins(tmp_path, extractor=fields, float_arguments={"extractor": float_fields})
    before = files(twins.store)
    with pytest.raises(StoreError, match=message):
        fit_compensation(twins.store, twins.float_store)
    assert files(twins.store) == before


def test_too_few_samples_in_common_are_refused_with_their_number(tmp_path):
    twins = make_twins(tmp_path, common=31)
    with pytest.raises(StoreError, match=r"have 31 train samples in common; a compensation needs 32 at least"):
        fit_compensation(twins.store, twins.float_store)
    with pytest.raises(StoreError, match=r"have 0 val samples in common"):
        fit_compensation(twins.store, twins.float_store, split="val")


def test_no_array_in_common_is_refused(tmp_path):
    twins = make_twins(tmp_path, gathers={"layers": [0, 1, 2]}, float_arguments={"gathers": {"layers": [0, 1]}})
    with pytest.raises(
        MissingFeaturesError, match=r"holds layers/\S+ of taps \[0, 1\], needed is one of .*\[0, 1, 2\]"
    ):
        fit_compensation(twins.store, twins.float_store)


def test_other_images_of_the_same_ids_are_refused(tmp_path):
    cache(in_memory(train=36, val=1), tmp_path / "half", precision="bfloat16")
    images = in_memory(train=36)["train"]
    cache({"train": [images[0], *reversed(images[1:])]}, tmp_path / "float")
    with pytest.raises(StoreError, match=r"from other images of the same id \(34 of 36, such as "):
        fit_compensation(tmp_path / "half", tmp_path / "float")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../cwac"}, r"name='\.\./cwac': compensations are named by letters"),
        ({"split": "all"}, r"split='all': it must be one of train, val, test"),
        ({"max_rows": 31}, r"max_rows=31: a compensation needs 32 samples at least"),
        ({"folds": 2}, r"folds=2: it must be 3 to 32"),
        ({"folds": 33}, r"folds=33: it must be 3 to 32"),
        ({"ridge": -1.0}, r"ridge=-1.0: it must be 0 or more"),
        ({"ridge": float("nan")}, r"ridge=nan: it must be 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        fit_compensation(tmp_path / "none", tmp_path / "none", **options)


def test_both_stores_must_be_there_complete_and_free(tmp_path, twins):
    with pytest.raises(StoreError, match=r"there is no store at .*none"):
        fit_compensation(tmp_path / "none", twins.float_store)
    assert not (tmp_path / "none").exists()
    with pytest.raises(StoreError, match=r"there is no store at .*none"):
        fit_compensation(twins.store, tmp_path / "none")
    (twins.float_store / "manifest").unlink()
    with pytest.raises(IncompleteStoreError, match=r"float is incomplete"):
        fit_compensation(twins.store, twins.float_store)
    with StoreLock(twins.store), pytest.raises(StoreLockedError, match=r"is being written by process"):
        fit_compensation(twins.store, twins.float_store)


def as_file(tensors, fitted=None):
    record = dict.fromkeys(FITTED, 0) if fitted is None else fitted
    return save(tensors, {"coldtap": canonical_json(record).decode()})


def of_layers(scale=1.0, shape=(3, 8), dtype=np.float32, array=LAYERS):
    values = np.full(shape, scale, dtype)
    return {f"{array}/scale": values, f"{array}/offset": values}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is not the file of a compensation"),
        (save(of_layers()), r"is not the file of a compensation"),
        (as_file(of_layers(), {"rows": 48}), r"does not say on what it was fitted"),
        (as_file({}), r"has tensors \[\]; expected a scale and an offset an array"),
        (as_file({f"{LAYERS}/scale": np.ones((3, 8), np.float32)}), r"expected a scale and an offset an array"),
        (as_file(of_layers(array="layers/g9x9-p0-c8")), r"g9x9-p0-c8, which is no array of this store"),
        (as_file(of_layers(shape=(2, 8))), r"is not float32 of shape \(3, 8\)"),
        (as_file(of_layers(dtype=np.float64)), r"is not float32 of shape \(3, 8\)"),
        (as_file(of_layers(0.0)), r"is not a positive number"),
        (as_file(of_layers(float("nan"))), r"is not a positive number"),
    ],
)
def test_a_file_that_is_no_map_of_this_store_is_refused_and_found(twins, data, message):
    update_file(twins.store, "compensation/cwac.safetensors", data)
    with pytest.raises(CorruptStoreError, match=message):
        open_store(twins.store).compensation("cwac")
    problems = verify_store(twins.store).problems
    assert [problem.where for problem in problems] == ["compensation/cwac.safetensors"]


def test_a_damaged_file_is_refused_and_found(twins):
    fit_compensation(twins.store, twins.float_store)
    file = twins.store / "compensation/cwac.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"is not what the manifest says"):
        open_store(twins.store).compensation("cwac")
    assert [problem.what for problem in verify_store(twins.store).problems] == ["its SHA-256 is not the manifest's"]
    fit_compensation(twins.store, twins.float_store)
    assert verify_store(twins.store).problems == ()


# The commands


def test_the_command_fits_and_says_the_gain(twins):
    result = coldtap("compensate", twins.store, twins.float_store, "--max-rows", 40)
    assert result.exit_code == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    assert head == f"{twins.store}: compensation cwac from 40 train rows (40 samples) written"
    gain = open_store(twins.store).compensation("cwac").fitted["gain"][LAYERS][0]
    expected = f"    {LAYERS}  tap   0  {gain['before_db']:.2f} → {gain['after_db']:.2f} dB, 8 channels mapped"
    assert expected in lines
    assert len(lines) == 3 + 3 + 1
    again = coldtap("compensate", twins.store, twins.float_store, "--max-rows", 40, "--json")
    about = json.loads(again.stdout)
    assert (about["status"], about["n_rows"], about["digest"]) == ("unchanged", 40, open_store(twins.store).digest)
    assert about["arrays"][LAYERS][0] == gain


def test_the_command_refuses_in_one_line(tmp_path):
    twins = make_twins(tmp_path, common=20)
    result = coldtap("compensate", twins.store, twins.float_store)
    assert result.exit_code == 5
    assert "have 20 train samples in common" in error_line(result)


def test_inspect_shows_what_it_was_fitted_on(tmp_path):
    cache(in_memory(train=36, val=1), tmp_path / "half", precision="bfloat16")
    cache(in_memory(train=36), tmp_path / "float")
    assert describe_store(tmp_path / "half")["compensations"] == {}
    fit_compensation(tmp_path / "half", tmp_path / "float")
    about = describe_store(tmp_path / "half")
    assert about["compensations"]["cwac"] == open_store(tmp_path / "half").compensation("cwac").fitted
    result = coldtap("inspect", tmp_path / "half")
    digest = open_store(tmp_path / "float").digest[:12]
    assert f"compensated by cwac: 36 train rows of the float store {digest}, ridge 0.0001" in result.stdout
    assert json.loads(coldtap("inspect", tmp_path / "half", "--json").stdout)["compensations"] == about["compensations"]
