"""Python objects as sources, and how a source is told from what is none."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import FakeData, ImageFolder

from coldtap.errors import SourceError
from coldtap.pipeline.images.decode import BadImageError, decode_rgb
from coldtap.pipeline.images.sources import open_source
from coldtap.pipeline.images.sources.splits import cut_val
from coldtap.text import a_few
from tests.helpers.pictures import encoded, picture, write_classes

INTEGER = {np.array: np.int64, torch.tensor: torch.int64}  # of an empty array too


def pairs(count):
    return [(picture(number), number % 2) for number in range(count)]


class Items:
    """Items by index, counting how often each is fetched."""

    def __init__(self, items, **attributes):
        self.items = items
        self.fetched = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.fetched += 1
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def refused(source, message, **options):
    with pytest.raises(SourceError, match=message) as caught:
        open_source(source, **options)
    assert "\n" not in str(caught.value)


def test_list_of_pairs():
    source = open_source(pairs(20))
    assert source.name == "list"
    assert source.listing.ids == tuple(map(str, range(20)))
    assert source.listing.targets == (0, 1) * 10
    assert source.listing.splits.count("val") == 2
    assert source.where(3) == "item 3"
    assert np.array_equal(decode_rgb(source.read(3)), picture(3))


def test_dict_of_splits():
    source = open_source({"train": pairs(6), "validation": pairs(4), "test": pairs(2)})
    assert source.listing.splits == ("train",) * 6 + ("val",) * 4 + ("test",) * 2
    assert source.listing.ids[7] == "val/1"
    assert source.where(7) == "item 1 of val"
    assert np.array_equal(decode_rgb(source.read(11)), picture(1))


@pytest.mark.parametrize("target", [1, np.int64(1), np.array(1), torch.tensor(1), np.uint8(1), True])
def test_targets_of_each_integer_kind(target):
    assert open_source([(picture(), 0), (picture(), target)] * 4).listing.targets == (0, 1) * 4


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_of_one_number_each_are_classes(array):
    items = [(picture(number), array([number % 2])) for number in range(8)]
    assert open_source(items).listing.targets == (0, 1) * 4
    assert open_source([(image, target.reshape(1, 1)) for image, target in items]).listing.targets == (0, 1) * 4
    column = np.array([number % 2 for number in range(8)])[:, None]  # as MedMNIST declares its own
    assert open_source(Items(items, labels=column)).listing.targets == (0, 1) * 4
    assert open_source(Items(items, labels=list(column))).listing.targets == (0, 1) * 4


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_of_several_lengths_are_sets_of_labels_those_of_one_too(array):
    sets = [[0], [2, 1], [], [1]]
    listing = open_source(
        [(picture(number), array(labels, dtype=INTEGER[array])) for number, labels in enumerate(sets)]
    )
    assert listing.listing.label_sets == ((0,), (1, 2), (), (1,))
    assert listing.listing.targets is None


def test_lists_are_sets_of_labels_those_of_one_too():
    assert open_source([(picture(number), [number % 2]) for number in range(4)]).listing.label_sets == ((0,), (1,)) * 2
    mixed = [(picture(0), np.array([0])), (picture(1), (1,))]
    assert open_source(mixed).listing.label_sets == ((0,), (1,))
    assert (
        open_source(Items([(picture(0), [0]), (picture(1), [1])], targets=list(np.array([[0], [1]])))).listing.targets
        is None
    )


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_flags_are_refused_and_numbers_of_one_width_are_not(array):
    flags = [[1, 0, 1], [0, 0, 1], [0, 1, 0]]
    refused(
        [(picture(number), array(row)) for number, row in enumerate(flags)],
        r"arrays of 3 numbers, all of them 0 or 1: flags, not numbers of classes; give np.flatnonzero\(target\)",
    )
    pairs_of = [[0, 1], [1, 2], [0, 2]]
    source = open_source([(picture(number), array(row)) for number, row in enumerate(pairs_of)])
    assert source.listing.label_sets == ((0, 1), (1, 2), (0, 2))


@pytest.mark.parametrize("others", [1, np.int64(1), np.array(1)])
def test_integers_beside_arrays_are_refused(others):
    refused(
        [(picture(0), np.array([0])), (picture(1), others)],
        "target of item 1 is an integer, that of item 0 a sequence",
    )


@pytest.mark.parametrize("target", [np.array([0.5]), np.array(0.5), np.array([[0, 1]]), np.array(["a", "b"])])
def test_arrays_of_something_else_are_refused(target):
    refused([(picture(0), target)] * 2, "target of item 0 is a ndarray; wanted an integer, or a sequence of integers")


def test_torchvision_and_torch_data_sets(tmp_path):
    write_classes(tmp_path, 3, "cat", "dog")
    folder = open_source(ImageFolder(str(tmp_path)))
    assert folder.listing.targets == (0, 0, 0, 1, 1, 1)
    assert folder.listing.class_names == ("cat", "dog")
    tensors = open_source(TensorDataset(torch.zeros(4, 3, 5, 7, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])))
    assert tensors.listing.targets == (0, 1, 0, 1)
    assert decode_rgb(tensors.read(0)).size == (7, 5)
    assert len(open_source(FakeData(size=30, image_size=(3, 8, 8), num_classes=2)).listing) == 30


def test_declared_targets_spare_the_items():
    items = Items(pairs(1000), targets=torch.tensor([number % 2 for number in range(1000)]), classes=["a", "b"])
    source = open_source(items)
    assert items.fetched < 70
    assert source.listing.targets == (0, 1) * 500
    assert source.listing.class_names == ("a", "b")


def test_declared_targets_that_the_items_contradict_are_not_believed():
    listing = open_source(Items(pairs(100), targets=[7] * 100)).listing
    assert listing.targets == (0, 1) * 50


def test_fingerprint_is_of_the_content_of_some_items():
    first = open_source(pairs(10)).listing.fingerprint
    assert open_source(pairs(10)).listing.fingerprint == first
    assert open_source([(image, 1 - target) for image, target in pairs(10)]).listing.fingerprint == first
    changed = pairs(10)
    changed[9] = (picture(99), 1)
    assert open_source(changed).listing.fingerprint != first
    assert open_source(pairs(11)).listing.fingerprint != first


def test_items_are_fetched_by_one_thread_at_a_time():
    class Shared(Items):
        busy = threading.Lock()

        def __getitem__(self, index):
            assert self.busy.acquire(blocking=False), "two threads at once"
            time.sleep(0.001)
            self.busy.release()
            return super().__getitem__(index)

    source = open_source(Shared(pairs(20)))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(source.read, range(20)))


def test_item_that_fails_is_a_bad_image():
    items = Items(pairs(4), targets=[0, 1, 0, 1])
    items.items = list(items.items)
    items.items[2] = OSError("broken disk")
    source = open_source(items)
    with pytest.raises(BadImageError, match=r"^OSError: broken disk$"):
        source.read(2)
    items.items[3] = ("a path", 1)
    with pytest.raises(BadImageError, match=r"^not an image: a str$"):
        source.read(3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list: no items"),
        ([picture()], r"item 0 is Image; wanted \(image, target\), the image a PIL image"),
        ([("a.png", 0)], r"item 0 is \(str, int\); wanted \(image, target\)"),
        ([{"image": picture(), "label": 0}], "item 0 is dict; wanted"),
        ([(picture(), 0, "more")], "item 0 is tuple; wanted"),
        ([(picture(), 0.5)] * 2, "list: the target of item 0 is a float; wanted an integer"),
        ([(picture(), None)] * 2, "2 of 2 labels are null or negative, first null at item 0"),
        ([(picture(), 0)] * 2, "a single class, 0"),
        ([(picture(), 0), (picture(), 3)], "labels have gaps: of the classes 0 … 3 no image has 1, 2"),
        (Items([ValueError("no")]), r"Items: item 0 failed: ValueError\('no'\)"),
        (Items([*pairs(80), ValueError("no"), *pairs(80)]), "item 80 failed: .*an object with .targets is listed"),
        ({"train": pairs(2), "dev": pairs(2)}, "unknown split 'dev'; accepted: train, training"),
        ({"val": pairs(2), "valid": pairs(2)}, "two keys are the val split: val, valid"),
        ({"test": pairs(4)}, "no train split; found only test"),
        ({"train": 3}, r"split 'train' is a int; wanted \(image, target\) by index"),
        ({}, "dict: no splits; accepted: train"),
        (3, "source is a int; wanted a folder of class folders"),
        (b"bytes", "source is a bytes; wanted"),
    ],
)
def test_object_that_cannot_be_used(source, message):
    refused(source, message)


def test_optional_bare_images_and_missing_targets():
    listing = open_source([picture(0), picture(1)], labels="optional").listing
    assert (listing.targets, listing.splits) == (None, ("test", "test"))
    source = open_source([(picture(0), None), (picture(1), 0)], labels="optional")
    assert source.listing.targets is None
    assert np.array_equal(decode_rgb(source.read(1)), picture(1))
    arrays = open_source(np.zeros((3, 8, 8, 3), dtype=np.uint8), labels="optional")
    assert decode_rgb(arrays.read(2)).size == (8, 8)


def test_items_of_encoded_bytes():
    source = open_source([(encoded(picture(number)), number % 2) for number in range(4)])
    assert np.array_equal(decode_rgb(source.read(1)), picture(1))


# --- what is a source at all


def test_path_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such file or folder$")
    refused("s3://bucket/images", "no such file or folder")


def test_file_of_another_kind(tmp_path):
    for name, found in (("images.zip", ".zip"), ("images", "nameless")):
        (tmp_path / name).write_bytes(b"x")
        refused(tmp_path / name, f"{name}: a {found} file is no source; wanted a folder of class folders, a VTAB-1K")
    (tmp_path / "x.parquet").write_bytes(b"x")
    refused(tmp_path / "x.parquet", "x.parquet: not a Parquet file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe: neither a file nor a folder")


# --- shared parts


def test_long_lists_are_cut():
    assert a_few([1, 2, 3]) == "1, 2, 3"
    assert a_few(list(range(9)), 2) == "0, 1 … and 7 more"


def test_val_cut_is_pinned_for_ever():
    """Stores keep rows by split: another rule would make every store with a cut val split another one."""
    ids = [f"cat/{number}.png" for number in range(10)]
    cut, _ = cut_val(["train"] * 10, np.zeros(10, np.int64), ids, name="x", seed=0)
    ranks = [hashlib.sha256(f"0\0{sample_id}".encode()).hexdigest() for sample_id in ids]
    assert cut.index("val") == ranks.index(min(ranks))


def test_listing_is_linear_and_quick(tmp_path):
    n_images = 100_000

    class Many:
        targets = np.arange(n_images) % 10

        def __len__(self):
            return n_images

        def __getitem__(self, index):
            return np.zeros((2, 2, 3), np.uint8), index % 10

    began = time.process_time()
    assert len(open_source(Many()).listing) == n_images
    assert time.process_time() - began < 5
