"""What makes a store another store, and what does not: splits, labels, leftovers, tables of other stores."""

import csv
import shutil

import pytest
import torch
from timm import create_model

from coldtap import cache_features, open_store, train_adaptor
from coldtap.errors import (
    CorruptStoreError,
    ModelError,
    OptionError,
    RecipeMismatchError,
    RunError,
    StoreError,
)
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.images.sources import open_source
from coldtap.pipeline.plan.options import EncodingOptions, RowOptions
from coldtap.pipeline.plan.plan import plan_job
from coldtap.stores.verify.verify import verify_store
from tests.helpers.jobs import SMALL, cache, coldtap, error_line, files, in_memory
from tests.helpers.pictures import write_classes, write_pictures


def write_list(folder, splits, labels):
    """Eight images and their list; the listing's ids and sizes stay the same whatever the columns say."""
    names = [f"{i}.png" for i in range(len(labels))]
    if not (folder / names[0]).exists():
        write_pictures(folder, *names)
    with (folder / "list.csv").open("w", newline="") as file:
        rows = zip(names, labels, splits, strict=True) if splits else zip(names, labels, strict=True)
        csv.writer(file).writerows([["path", "label", "split"] if splits else ["path", "label"], *rows])
    return folder / "list.csv"


def test_samples_that_change_their_split_make_another_recipe_even_in_equal_numbers(tmp_path):
    labels, splits = [0, 1] * 4, ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    options = {"gather": ["pooled"], "device": "cpu"}
    cache_features(write_list(tmp_path, splits, labels), tmp_path.parent / "split-store", **options)
    swapped = ["test", *splits[1:7], "train"]
    with pytest.raises(RecipeMismatchError, match=r"rows\.order: "):
        cache_features(write_list(tmp_path, swapped, labels), tmp_path.parent / "split-store", **options)


def test_corrected_labels_leave_a_cut_val_split_and_every_feature_alone(tmp_path):
    folder, store = tmp_path / "images", tmp_path / "s"
    folder.mkdir()
    labels = [0] * 12 + [1] * 20
    cache_features(write_list(folder, None, labels), store, gather=["pooled"])
    before = files(store)
    corrected = [1, 1, 1, *labels[3:-6], *[0] * 6]
    report = cache_features(write_list(folder, None, corrected), store, gather=["pooled"])
    assert report.status == "relabelled"
    assert {name for name, data in files(store).items() if before[name] != data} == {
        "manifest",
        "targets/label.parquet",
    }
    assert verify_store(store).problems == ()


def test_a_row_order_digest_is_that_of_splits_and_ids(tmp_path):
    source = open_source(in_memory(train=6, val=3))
    backbone = load_backbone("coldtap/vit-reference")

    def order(splits, seed=0):
        plan = plan_job(source, backbone, splits=splits, rows=RowOptions(seed=seed), encoding=EncodingOptions())
        return plan.recipe.rows.order

    splits = source.listing.splits
    assert order(splits) == order(splits)
    assert order(splits) != order(splits, seed=1)
    assert order(splits) != order((splits[-1], *splits[1:-1], splits[0]))


def test_files_of_others_that_end_in_partial_are_not_touched(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/thesis.zip.partial").write_text("years of work")
    with pytest.raises(StoreError, match=r"is no store \(it holds thesis\.zip\.partial"):
        cache(in_memory(train=4, val=2), tmp_path / "s")
    assert (tmp_path / "s/thesis.zip.partial").read_text() == "years of work"


def test_tables_of_another_store_are_not_believed(tmp_path):
    cache(in_memory(train=6, val=2), tmp_path / "a")
    cache(in_memory(train=4, val=4), tmp_path / "b")
    for name in ("samples.parquet", "rejected.parquet"):
        store = tmp_path / f"with-{name}"
        shutil.copytree(tmp_path / "a", store)
        data = (tmp_path / "b" / name).read_bytes()
        (store / name).write_bytes(data + b"PAR1" if name == "rejected.parquet" else data)
        with pytest.raises(CorruptStoreError, match=f"{name} is not what the manifest says"):
            _ = open_store(store).splits_by_id()


def test_a_store_inside_its_own_source_is_refused(tmp_path):
    write_classes(tmp_path / "images", 3, "ant", "bee")
    with pytest.raises(OptionError, match=r"lies inside .* give a path outside it"):
        cache_features(tmp_path / "images", tmp_path / "images/store")
    assert not (tmp_path / "images/store").exists()


def test_a_run_into_a_store_is_refused_and_the_store_stays_whole(tmp_path):
    cache(in_memory(train=6, val=2), tmp_path / "s", gather="pooled")
    with pytest.raises(RunError, match="is a store: choose a folder of its own"):
        train_adaptor(tmp_path / "s", "linear", out=tmp_path / "s", epochs=1)
    assert verify_store(tmp_path / "s").problems == ()


def test_one_geometry_does_not_make_stages_a_stream(tmp_path):
    options = {"model": "mixer_s32_224", "random_weights": True, "preprocess": {"input_size": 64}}
    with pytest.raises(OptionError, match="`gather='sum'` needs taps of one geometry, z0 … zN"):
        cache_features(in_memory(train=4, val=2), tmp_path / "s", gather=["sum"], **options)
    report = cache_features(in_memory(train=4, val=2), tmp_path / "s", taps="last:1", **options)
    assert report.n_rows == 6
    for adaptor in ("mist", "last"):
        result = coldtap("train-adaptor", tmp_path / "s", "--adaptor", adaptor, "--out", tmp_path / "run")
        assert (result.exit_code, "stage network" in error_line(result)) == (5, True)


def test_a_model_that_fails_in_its_own_code_is_one_clear_error(monkeypatch):
    model = create_model("test_vit", pretrained=False)

    def broken(*_, **__):
        raise UnboundLocalError("a bug of somebody else")

    monkeypatch.setattr(type(model), "forward_intermediates", broken)
    with pytest.raises(ModelError, match=r"cannot give its taps for .* \(UnboundLocalError: a bug of somebody"):
        load_backbone(model)


def test_predict_runs_at_the_input_size_that_the_store_was_made_at(tmp_path):
    write_classes(tmp_path / "images", 8, "ant", "bee")
    torch.manual_seed(0)
    common = ["--model", "test_vit", "--random-weights"]
    made = coldtap("cache-features", tmp_path / "images", tmp_path / "s", *common, "--input-size", 64)
    assert made.exit_code == 0, made.output
    coldtap("train-adaptor", tmp_path / "s", "--adaptor", "linear", "--epochs", 1, "--out", tmp_path / "run")
    result = coldtap("predict", tmp_path / "run", tmp_path / "images", "--random-weights")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 17


def test_a_module_with_a_checkpoint_is_refused():
    model = create_model("test_vit", pretrained=False)
    with pytest.raises(OptionError, match="comes with its weights"):
        load_backbone(model, random_weights=True, preprocess=SMALL)
