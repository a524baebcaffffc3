"""A whole job in one process: what it forecasts, keeps, rejects, goes on with and replaces."""

import io
import json
import os
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import torch
import zarr
from PIL import Image

from coldtap.errors import (
    MachineError,
    ModelError,
    OptionError,
    RecipeMismatchError,
    SourceError,
    StoreError,
    StoreLockedError,
    TooManyRejectedError,
)
from coldtap.pipeline.backbones.batch_size import choose_batch_size
from coldtap.pipeline.images.preprocess import Augmentation
from coldtap.pipeline.job import cache_features
from coldtap.stores import open_store
from coldtap.stores.format.codes import SCALE_OF_STEP
from coldtap.stores.format.manifest import MANIFEST
from coldtap.stores.storage.lock import StoreLock
from coldtap.stores.verify.verify import verify_store
from coldtap.stores.writing.reporting import Silence
from coldtap.stores.writing.updates import update_targets
from tests.helpers.jobs import TAPS, TinyNet, cache, files, in_memory, read
from tests.helpers.pictures import picture

LAYERS, POOLED = "layers/g2x2-p0-c4", "pooled/g2x2-p0-c4"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Listener(Silence):
    def __init__(self):
        self.notes, self.forecasts, self.rows = [], [], 0

    def note(self, text):
        self.notes.append(text)

    def forecast(self, forecast):
        self.forecasts.append(forecast)

    def advance(self, n_rows):
        self.rows += n_rows


def interrupted(store, *blocks):
    """Leave a finished store as a job leaves it that died before these blocks."""
    (store / MANIFEST).unlink()
    for block in blocks:
        (store / f"journal/{block:08d}.json").unlink()


def test_a_dry_run_forecasts_and_writes_nothing(tmp_path):
    told = Listener()
    report = cache(in_memory(train=8, val=4), tmp_path / "s", dry_run=True, reporter=told)
    assert (report.status, report.digest, report.n_rows) == ("forecast", None, 0)
    assert report.forecast.n_rows == 12
    assert report.forecast.seconds > 0
    assert told.forecasts == [report.forecast]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_begun_store_forecasts_the_rest_and_writes_nothing(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    interrupted(tmp_path / "s", 1)
    before = files(tmp_path / "s")
    told = Listener()
    report = cache(images, tmp_path / "s", dry_run=True, reporter=told)
    assert report.forecast.n_rows == 4
    assert told.notes == [f"going on with {tmp_path / 's'}: 1 of 2 blocks are there"]
    assert files(tmp_path / "s") == before


def test_the_forecast_is_within_three_percent_of_what_is_written(tmp_path):
    told = Listener()
    report = cache_features(in_memory(train=24, val=8, test=8), tmp_path / "s", device="cpu", reporter=told)
    written = sum(len(data) for data in files(tmp_path / "s").values())
    assert told.forecasts[0].n_bytes == pytest.approx(written, rel=0.03)
    assert told.rows == report.n_rows == 40


def test_a_job_that_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match=r"needs 0\.\d+ MB and 0\.001 MB are free there: free some space"):
        cache(in_memory(train=8, val=4), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tier", ["float32", "float16", "bfloat16"])
def test_zarr_and_tensorstore_read_the_numbers_that_coldtap_reads(tmp_path, tier):
    cache(in_memory(train=8, val=4, test=3), tmp_path / "s", tier=tier, views=1, sum_at="1,2")
    store = open_store(tmp_path / "s")
    rows = np.asarray(store.samples["row"])
    group = zarr.open_group(tmp_path / "s/features.zarr", mode="r")
    assert set(store.arrays) == {LAYERS, POOLED, "sum/g2x2-p0-c4/1", "sum/g2x2-p0-c4/2"}
    for name, array in store.arrays.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s/features.zarr" / name)}}
        for stored in (group[name][:][rows], tensorstore.open(spec).result().read().result()[rows]):
            assert stored.dtype == {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[tier]
            values = (stored.astype(np.uint32) << 16).view(np.float32) if tier == "bfloat16" else stored
            np.testing.assert_array_equal(values.astype(np.float32), read(array, rows))


def test_tiers_keep_the_same_features_to_their_own_precision(tmp_path):
    images = in_memory(train=8, val=4)
    for tier in ("float32", "float16", "bfloat16"):
        cache(images, tmp_path / tier, tier=tier)
    exact = open_store(tmp_path / "float32")
    rows = exact.rows("train")
    for tier, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        store = open_store(tmp_path / tier)
        for name in exact.arrays:
            expected = torch.from_numpy(read(exact.arrays[name], rows)).to(dtype).float()
            np.testing.assert_array_equal(read(store.arrays[name], rows), expected)


@pytest.mark.parametrize(
    ("options", "arrays"),
    [
        ({}, {LAYERS: (0, 1, 2), POOLED: (0, 1, 2), "sum/g2x2-p0-c4/2": (2,)}),
        ({"taps": "last:2"}, {LAYERS: (1, 2), POOLED: (1, 2), "sum/g2x2-p0-c4/2": (2,)}),
        ({"taps": "2,0,0", "gather": ["layers"]}, {LAYERS: (0, 2)}),
        ({"taps": "1", "gather": ["sum"], "sum_at": "0,2"}, {"sum/g2x2-p0-c4/0": (0,), "sum/g2x2-p0-c4/2": (2,)}),
        ({"taps": "last:3", "gather": ["pooled", "pooled"]}, {POOLED: (0, 1, 2)}),
    ],
)
def test_what_is_asked_is_what_is_kept(tmp_path, options, arrays):
    cache(in_memory(train=8, val=4), tmp_path / "s", **options)
    assert {name: array.taps for name, array in open_store(tmp_path / "s").arrays.items()} == arrays


def test_a_chosen_tap_holds_the_numbers_of_that_tap(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "all", tier="float32", sum_at="0,1,2")
    cache(images, tmp_path / "some", tier="float32", taps="2,1", sum_at="1")
    every, some = open_store(tmp_path / "all"), open_store(tmp_path / "some")
    rows = every.rows("train")
    np.testing.assert_array_equal(read(some.arrays[LAYERS], rows), read(every.arrays[LAYERS], rows)[:, 1:])
    np.testing.assert_array_equal(read(some.arrays[POOLED], rows), read(every.arrays[POOLED], rows)[:, 1:])
    name = "sum/g2x2-p0-c4/1"
    np.testing.assert_array_equal(read(some.arrays[name], rows), read(every.arrays[name], rows))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"taps": "0,7"}, ModelError, "`taps='0,7'`: the backbone has taps 0 to 2; there is no tap 7"),
        ({"taps": "last:9"}, ModelError, "`taps='last:9'`: the backbone has taps 0 to 2"),
        ({"taps": "last:0"}, OptionError, "`taps='last:0'`: expected all, last:K, or tap indices"),
        ({"taps": "z3"}, OptionError, "`taps='z3'`: expected all"),
        ({"taps": ""}, OptionError, "`taps=''`: expected all"),
        ({"sum_at": "-1"}, ModelError, "`sum_at='-1'`: the backbone has taps 0 to 2"),
        ({"gather": ["mean"]}, OptionError, "`gather='mean'`: choose among layers, sum, pooled"),
        ({"tier": "int4"}, OptionError, "`tier='int4'`: choose one of float32, float16, bfloat16, int8"),
        (
            {"tier": "float16", "layout": "compact"},
            OptionError,
            "lossless compression buys 7 to 16 % of float features",
        ),
        ({"tier": "int8", "layout": "odd"}, OptionError, "`layout='odd'`: choose one of fast, compact"),
        (
            {"snr": 30},
            OptionError,
            "`snr` and `max_error` bound the errors of `tier='int8'`; `tier='float16'` was asked for",
        ),
        ({"tier": "int8", "snr": 30, "max_error": 0.1}, OptionError, "give `snr` or `max_error`, one of the two"),
        ({"tier": "int8", "snr": 80}, OptionError, "`snr=80` needs steps of"),
        ({"precision": "half"}, OptionError, "`precision='half'`: choose one of"),
        ({"split": ["dev"]}, OptionError, "`split='dev'`: choose among train, val, test"),
        ({"split": ["test"]}, OptionError, "`split='test'`: the source has no test images, only"),
        ({"views": -1}, OptionError, "`views=-1`: give 0 or more"),
        ({"batch_size": 0}, OptionError, "`batch_size=0`: give at least 1"),
        ({"decode_threads": 0}, OptionError, "`decode_threads=0`: give at least 1"),
        ({"max_rejected": 2}, OptionError, "`max_rejected=2`: give a share from 0 to 1"),
        ({"on_bad_image": "skip"}, OptionError, "`on_bad_image='skip'`: choose reject or fail"),
        ({"device": "tpu"}, OptionError, "`device='tpu'`: choose auto, cpu, cuda"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_and_nothing_written(tmp_path, options, kind, message):
    with pytest.raises(kind, match=message.replace("+", r"\+")) as refusal:
        cache(in_memory(train=8, val=4), tmp_path / "s", **options)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_splits_are_kept_as_asked_and_in_one_store_order(tmp_path):
    images = in_memory(test=4, train=8, val=4)
    cache(images, tmp_path / "all")
    cache(images, tmp_path / "two", split=["test", "train"])
    every, two = open_store(tmp_path / "all"), open_store(tmp_path / "two")
    assert every.splits == {"train": 8, "val": 4, "test": 4}
    assert two.splits == {"train": 8, "test": 4}
    for split in two.splits:
        assert two.sample_ids(two.rows(split)) == every.sample_ids(every.rows(split))
        expected = read(every.arrays[LAYERS], every.rows(split))
        np.testing.assert_array_equal(read(two.arrays[LAYERS], two.rows(split)), expected)


def test_views_are_of_train_alone_and_the_same_for_the_same_seed(tmp_path):
    images = in_memory(train=8, val=4)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cache(images, tmp_path / name, views=2, seed=seed, tier="float32")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    one, other = open_store(tmp_path / "a"), open_store(tmp_path / "c")
    assert [len(one.rows("train", view)) for view in range(3)] == [8, 8, 8]
    assert [len(one.rows("val", view)) for view in range(3)] == [4, 0, 0]

    def by_sample(store, view):
        rows = store.rows("train", view)
        return dict(zip(store.sample_ids(rows), read(store.arrays[LAYERS], rows), strict=True))

    for sample, plain in by_sample(one, 0).items():
        np.testing.assert_array_equal(by_sample(other, 0)[sample], plain)
        drawn = [plain, by_sample(one, 1)[sample], by_sample(one, 2)[sample], by_sample(other, 1)[sample]]
        assert len(np.unique(np.stack(drawn).reshape(4, -1), axis=0)) == 4


def test_the_recipe_names_the_augmentation_only_where_there_are_views(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "a", views=1, augmentation=Augmentation(flip=0.25))
    cache(images, tmp_path / "b")
    assert open_store(tmp_path / "a").recipe.rows.augmentation["flip"] == 0.25
    assert open_store(tmp_path / "b").recipe.rows.augmentation is None


def test_resume_takes_the_batch_size_that_the_store_began_with(tmp_path):
    images = in_memory(train=9, val=4)
    cache(images, tmp_path / "s", batch_size=3)
    before = files(tmp_path / "s")
    interrupted(tmp_path / "s", 0)
    assert choose_batch_size_of_tiny() != 3
    assert cache(images, tmp_path / "s", batch_size=None).status == "written"
    assert files(tmp_path / "s") == before


def choose_batch_size_of_tiny():
    from coldtap.pipeline.backbones.backbone import load_backbone
    from tests.helpers.jobs import SMALL

    return choose_batch_size(load_backbone(TinyNet(), preprocess=SMALL, tap_names=TAPS, device="cpu"))


def test_what_a_dead_job_left_half_written_is_swept(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    before = files(tmp_path / "s")
    interrupted(tmp_path / "s", 1)
    for name in ("targets/old.parquet.partial", "features.zarr/layers/0.partial"):
        (tmp_path / "s" / name).write_bytes(b"half")
    cache(images, tmp_path / "s")
    assert files(tmp_path / "s") == before


def test_another_environment_is_refused_on_resume_and_recorded_where_it_is_allowed(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s", batch_size=4)
    recipe = (tmp_path / "s/recipe.json").read_bytes()
    interrupted(tmp_path / "s", 1)
    before = files(tmp_path / "s")
    with pytest.raises(StoreError, match=r"begun elsewhere .batch_size: 4 → 3., and features would differ"):
        cache(images, tmp_path / "s", batch_size=3)
    assert files(tmp_path / "s") == before
    cache(images, tmp_path / "s", batch_size=3, allow_mixed=True)
    lines = [json.loads((tmp_path / f"s/journal/{block:08d}.json").read_text()) for block in (0, 1)]
    environment = open_store(tmp_path / "s").recorded["environment"]
    assert lines[0]["environment"] == environment
    assert lines[1]["environment"] == {**environment, "batch_size": 3}
    assert (tmp_path / "s/recipe.json").read_bytes() == recipe
    assert verify_store(tmp_path / "s").problems == ()


def test_another_recipe_is_refused_with_the_fields_that_differ_and_loses_nothing(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    before = files(tmp_path / "s")
    with pytest.raises(RecipeMismatchError, match="holds another recipe") as refusal:
        cache(images, tmp_path / "s", tier="float32", seed=5, precision="bfloat16")
    found = str(refusal.value)
    for field in (
        "extractor.precision: float32 → bfloat16",
        "rows.seed: 0 → 5",
        "encoding.tier: float16 → float32",
    ):
        assert field in found
    assert found.count("→") == 5  # the three, the order that the seed decides, and the legend
    assert files(tmp_path / "s") == before


def test_the_same_job_again_has_nothing_to_do(tmp_path):
    images = in_memory(train=8, val=4)
    first = cache(images, tmp_path / "s")
    before = files(tmp_path / "s")
    again = cache(images, tmp_path / "s")
    assert (again.status, again.digest, again.n_rows, again.forecast) == ("unchanged", first.digest, 12, None)
    assert files(tmp_path / "s") == before


def test_other_labels_of_the_same_images_replace_the_targets_alone(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    before = files(tmp_path / "s")
    swapped = {split: [(image, 1 - label) for image, label in items] for split, items in images.items()}
    report = cache(swapped, tmp_path / "s")
    after = files(tmp_path / "s")
    assert report.status == "relabelled"
    assert {name for name in after if after[name] != before.get(name)} == {MANIFEST, "targets/label.parquet"}
    assert set(after) == set(before)
    store = open_store(tmp_path / "s")
    assert store.digest == report.digest
    rows = store.rows("train")
    numbers = [int(where.split()[1]) for where in store.sources(rows)]
    assert store.targets(rows).tolist() == [swapped["train"][number][1] for number in numbers]
    assert verify_store(tmp_path / "s").problems == ()
    assert cache(swapped, tmp_path / "s").status == "unchanged"


def test_a_dry_run_of_other_labels_writes_nothing(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    before = files(tmp_path / "s")
    swapped = {split: [(image, 1 - label) for image, label in items] for split, items in images.items()}
    report = cache(swapped, tmp_path / "s", dry_run=True)
    assert (report.status, report.forecast.n_rows) == ("forecast", 0)
    assert 0 < report.forecast.n_bytes < 10_000
    assert files(tmp_path / "s") == before


def test_the_same_labels_in_other_bytes_are_the_same_labels(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    table = pq.read_table(tmp_path / "s/targets/label.parquet")
    other = io.BytesIO()
    pq.write_table(table, other, compression="none")  # as another version of pyarrow may write it
    update_targets(tmp_path / "s", "label", other.getvalue())
    before = files(tmp_path / "s")
    assert before["targets/label.parquet"] == other.getvalue()
    assert cache(images, tmp_path / "s").status == "unchanged"
    assert files(tmp_path / "s") == before


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b"rubbish"), lambda path: path.unlink()])
def test_damaged_labels_are_mended_by_the_same_job(tmp_path, harm):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    before = files(tmp_path / "s")
    harm(tmp_path / "s/targets/label.parquet")
    assert cache(images, tmp_path / "s").status == "relabelled"
    assert files(tmp_path / "s") == before


def test_a_death_while_labels_are_replaced_is_mended_by_the_same_call(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    swapped = {split: [(image, 1 - label) for image, label in items] for split, items in images.items()}
    manifest = (tmp_path / "s" / MANIFEST).read_bytes()
    cache(swapped, tmp_path / "s")
    finished = files(tmp_path / "s")
    (tmp_path / "s" / MANIFEST).write_bytes(manifest)  # the targets are new, the manifest is not yet
    assert cache(swapped, tmp_path / "s").status == "relabelled"
    assert files(tmp_path / "s") == finished


def broken(images, **places):
    """The images with some that cannot be read: `broken(images, train=[0, 3])`."""
    spoilt = {split: list(items) for split, items in images.items()}
    for split, numbers in places.items():
        for number in numbers:
            spoilt[split][number] = (b"no image", spoilt[split][number][1])
    return spoilt


def test_a_bad_image_is_a_rejected_row_and_leaves_its_neighbours_as_they_are(tmp_path):
    images = in_memory(train=8, val=4)
    told = Listener()
    report = cache(broken(images, train=[3]), tmp_path / "s", tier="float32", max_rejected=0.2, views=1, reporter=told)
    cache(images, tmp_path / "whole", tier="float32", views=1)
    assert (report.n_rows, report.n_rejected, told.rows) == (18, 2, 20)
    lines = pq.read_table(tmp_path / "s/rejected.parquet").to_pylist()
    store, whole = open_store(tmp_path / "s"), open_store(tmp_path / "whole")
    assert [{**line, "row": None} for line in lines] == [
        {
            "row": None,
            "sample_id": "train/3",
            "view": view,
            "split": "train",
            "source": "item 3 of train",
            "reason": "not an image: starts with b'no image'",
            "tap": None,
        }
        for view in (0, 1)
    ]
    assert {line["row"] for line in lines}.isdisjoint(store.samples["row"].to_pylist())
    rows = store.samples["row"].to_pylist()
    assert len(rows) == 18
    assert store.sample_ids(rows) == whole.sample_ids(rows)
    for name in store.arrays:
        np.testing.assert_array_equal(read(store.arrays[name], rows), read(whole.arrays[name], rows))
    assert verify_store(tmp_path / "s").problems == ()


def test_a_block_without_any_usable_image_has_no_shard_and_ends_well(tmp_path):
    images = broken(in_memory(train=8, val=2), val=[0, 1])
    report = cache(images, tmp_path / "s", max_rejected=0.5)
    assert (report.n_rows, report.n_rejected) == (8, 2)
    store = open_store(tmp_path / "s")
    assert store.splits == {"train": 8}
    assert verify_store(tmp_path / "s").problems == ()


def test_more_bad_images_than_allowed_fail_the_run_with_examples(tmp_path):
    images = broken(in_memory(train=8, val=4), train=[1, 2])
    with pytest.raises(TooManyRejectedError, match=r"2 of 12 samples cannot .* `max_rejected=0\.1` allows") as end:
        cache(images, tmp_path / "s", max_rejected=0.1)
    assert "item 1 of train: not an image" in str(end.value)
    assert not (tmp_path / "s" / MANIFEST).exists()
    assert cache(images, tmp_path / "s", max_rejected=0.2).n_rejected == 2
    assert verify_store(tmp_path / "s").problems == ()


def test_rejections_of_blocks_done_before_count_on_resume(tmp_path):
    images = broken(in_memory(train=8, val=4), train=[1, 2])
    cache(images, tmp_path / "s", max_rejected=0.5)
    interrupted(tmp_path / "s", 1)
    with pytest.raises(TooManyRejectedError, match="2 of 12 samples"):
        cache(images, tmp_path / "s", max_rejected=0.1)


def test_nothing_of_a_failed_run_writes_on_after_its_end(tmp_path):
    images = broken(in_memory(train=4, val=4), train=[1, 2])
    with pytest.raises(TooManyRejectedError, match="of 8 samples"):
        cache(images, tmp_path / "s", views=40, batch_size=1, max_rejected=0)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("block", "decode"))] == []


def test_on_bad_image_fail_names_the_image_and_keeps_finished_blocks(tmp_path):
    images = in_memory(train=8, val=4)
    with pytest.raises(SourceError, match=r"item 2 of val cannot be used: not an image.*`on_bad_image='fail'`"):
        cache(broken(images, val=[2]), tmp_path / "s", on_bad_image="fail")
    assert not (tmp_path / "s" / MANIFEST).exists()
    report = cache(broken(images, val=[2]), tmp_path / "s", max_rejected=0.5)
    assert (report.status, report.n_rows) == ("written", 11)


def test_a_locked_store_is_refused_by_name_and_untouched(tmp_path):
    images = in_memory(train=8, val=4)
    cache(images, tmp_path / "s")
    interrupted(tmp_path / "s", 0)
    before = files(tmp_path / "s")
    with (
        StoreLock(tmp_path / "s"),
        pytest.raises(StoreLockedError, match=f"{tmp_path / 's'} is being written by process {os.getpid()} on "),
    ):
        cache(images, tmp_path / "s")
    assert files(tmp_path / "s") == before
    assert cache(images, tmp_path / "s").status == "written"


def test_digests_of_the_images_as_read_are_kept(tmp_path):
    from coldtap.pipeline.images.decode import content_digest

    encoded = io.BytesIO()
    picture(0).save(encoded, "PNG")
    images = in_memory(train=8, val=4)
    images["val"][0] = (encoded.getvalue(), 0)
    cache(images, tmp_path / "s")
    table = open_store(tmp_path / "s").samples.to_pylist()
    kept = {line["source"]: line["source_sha256"] for line in table}
    assert kept["item 0 of val"] == content_digest(encoded.getvalue())
    assert kept["item 1 of train"] == content_digest(images["train"][1][0])
    assert len(set(kept.values())) == 12


def test_images_of_any_size_and_mode_share_a_batch(tmp_path):
    images = in_memory(train=8, val=4)
    images["train"][:3] = [
        (picture(1, 31, 5).convert(mode), label) for mode, (_, label) in zip("1LP", images["train"][:3], strict=True)
    ]
    images["train"][3] = (Image.new("CMYK", (4, 9), (9, 9, 9, 9)), 1)
    assert cache(images, tmp_path / "s").n_rejected == 0


@pytest.mark.parametrize("layout", ["fast", "compact"])
def test_int8_keeps_every_value_within_its_bound(tmp_path, layout):
    images = in_memory(train=40, val=4, test=3)
    cache(images, tmp_path / "exact", tier="float32")
    report = cache(images, tmp_path / "s", tier="int8", layout=layout, snr=25)
    assert report.status == "written"
    exact, store = open_store(tmp_path / "exact"), open_store(tmp_path / "s")
    rule = store.recipe.encoding.scales
    assert (rule["snr_db"], rule["calibration_rows"], store.recipe.encoding.layout) == (25, 128, layout)
    assert set(store.recorded["errors"]) == {name for name in store.arrays if not name.startswith("pooled")}
    for name, array in store.arrays.items():
        if array.spec.tier != "int8":
            continue
        for split in ("train", "val", "test"):
            expected, found = read(exact.arrays[name], exact.rows(split)), read(array, store.rows(split))
            bound = array.scaling_of().scale.astype(float) / SCALE_OF_STEP / 2
            bound = bound[:, None] if array.gather == "layers" else bound
            assert (np.abs(expected.astype(float) - found) <= bound).all()
    again = cache(images, tmp_path / "s", tier="int8", layout=layout, snr=25)
    assert (again.status, again.digest) == ("unchanged", report.digest)
    with pytest.raises(RecipeMismatchError, match=r"encoding\.scales\.snr_db: 25\.0 → 26\.0"):
        cache(images, tmp_path / "s", tier="int8", layout=layout, snr=26)
