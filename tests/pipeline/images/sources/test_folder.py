"""Folders of class folders, VTAB-1K folders and lists of paths: what is listed, and what is refused."""

import csv
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldtap.errors import MachineError, SourceError
from coldtap.pipeline.images.decode import BadImageError, decode_rgb
from coldtap.pipeline.images.sources import open_source
from coldtap.pipeline.images.sources.files import read_file
from tests.helpers.pictures import encoded, picture, write_classes, write_pictures


def by_split(source):
    listing = source.listing
    return {split: listing.splits.count(split) for split in dict.fromkeys(listing.splits)}


def refused(path, message, **options):
    with pytest.raises(SourceError, match=message) as caught:
        open_source(path, **options)
    assert "\n" not in str(caught.value)


# --- class folders


def test_class_folders_get_a_seeded_stratified_val_split(tmp_path):
    write_classes(tmp_path, 20, "cat", "dog")
    write_classes(tmp_path, 1, "emu")
    source = open_source(tmp_path)
    listing = source.listing
    assert source.name == str(tmp_path)
    assert len(listing) == 41
    assert listing.class_names == ("cat", "dog", "emu")
    assert listing.ids[0] == "cat/0.png"
    assert listing.targets == (0,) * 20 + (1,) * 20 + (2,)
    assert by_split(source) == {"train": 37, "val": 4}
    val_classes = [target for target, split in zip(listing.targets, listing.splits, strict=True) if split == "val"]
    assert val_classes == [0, 0, 1, 1]
    assert listing.notes == ("no val split: 4 of the 41 train images, a stratified tenth by seed 0, became it",)


def test_val_cut_follows_the_seed_and_the_id_alone(tmp_path):
    write_classes(tmp_path, 30, "cat", "dog")
    first = open_source(tmp_path, seed=5).listing
    assert open_source(tmp_path, seed=5).listing == first
    assert open_source(tmp_path, seed=6).listing.splits != first.splits
    cut = {sample for sample, split in zip(first.ids, first.splits, strict=True) if split == "val"}
    write_pictures(tmp_path, "cat/30.png")
    second = open_source(tmp_path, seed=5).listing
    assert len(cut & {sample for sample, split in zip(second.ids, second.splits, strict=True) if split == "val"}) >= 5


def test_read_gives_the_bytes_and_where_the_path(tmp_path):
    write_classes(tmp_path, 2, "cat", "dog")
    source = open_source(str(tmp_path))
    assert source.where(2) == str(tmp_path / "dog" / "0.png")
    assert source.read(2) == (tmp_path / "dog" / "0.png").read_bytes()
    assert decode_rgb(source.read(2)).size == (8, 8)


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("training", "valid", "testing"), ("Train", "VALIDATION", "Test")]
)
def test_split_folders_in_each_spelling(tmp_path, names):
    for name, count in zip(names, (4, 2, 1), strict=True):
        write_classes(tmp_path / name, count, "cat", "dog")
    source = open_source(tmp_path)
    assert by_split(source) == {"train": 8, "val": 4, "test": 2}
    assert source.listing.ids[0] == f"{names[0]}/cat/0.png"
    assert source.listing.notes == ()


def test_split_folders_without_val_cut_it_from_train(tmp_path):
    write_classes(tmp_path / "train", 10, "cat", "dog")
    write_classes(tmp_path / "test", 3, "cat", "dog")
    source = open_source(tmp_path)
    assert by_split(source) == {"train": 18, "val": 2, "test": 6}
    assert "no val split: 2 of the 20 train images" in source.listing.notes[0]


def test_val_may_lack_a_class(tmp_path):
    write_classes(tmp_path / "train", 2, "cat", "dog")
    write_classes(tmp_path / "val", 2, "dog")
    assert open_source(tmp_path).listing.targets[-2:] == (1, 1)


def test_class_called_train_is_a_class_beside_others(tmp_path):
    write_classes(tmp_path, 2, "bus", "train")
    assert open_source(tmp_path).listing.class_names == ("bus", "train")


def test_nested_hidden_and_other_files(tmp_path):
    write_pictures(tmp_path, "cat/0.png", "cat/deep/er/1.JPEG", "dog/a.jpg", "dog/b.png", "loose.png")
    write_pictures(tmp_path, ".git/x.png", "__MACOSX/._0.png", "cat/.hidden.png")
    for name in ("README.md", "cat/notes.txt", "dog/Thumbs.db", "dog/more.txt", "dog/LICENSE"):
        (tmp_path / name).write_text("text")
    listing = open_source(tmp_path).listing
    assert listing.ids == ("cat/0.png", "cat/deep/er/1.JPEG", "dog/a.jpg", "dog/b.png")
    assert listing.notes[:2] == (
        "ignored 1 image outside class folders",
        "ignored files that are no images by their names: 2 .txt, 1 .md, 1 LICENSE, 1 .db",
    )


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_classes(tmp_path / "real", 2, "cat")
    data = tmp_path / "data"
    write_classes(data, 2, "dog")
    (data / "cat").symlink_to(tmp_path / "real" / "cat")
    (data / "dog" / "round").symlink_to(data)
    (data / "dog" / "self").symlink_to("self")
    (data / "dog" / "gone.png").symlink_to("nowhere.png")
    listing = open_source(data).listing
    assert [sample for sample in listing.ids if "round" not in sample] == [
        "cat/0.png",
        "cat/1.png",
        "dog/0.png",
        "dog/1.png",
    ]
    assert len(listing) == 6  # by way of round/cat; round/dog is where we are
    assert "1 self" in listing.notes[0]
    assert "1 .png" in listing.notes[0]


def test_fingerprint_is_of_ids_and_sizes_not_of_content(tmp_path):
    write_classes(tmp_path, 3, "cat", "dog")
    file = tmp_path / "cat" / "0.png"
    before = open_source(tmp_path).listing.fingerprint
    assert len(before) == 64
    file.write_bytes(file.read_bytes()[::-1])
    assert open_source(tmp_path).listing.fingerprint == before
    assert open_source(tmp_path, labels="optional", seed=9).listing.fingerprint == before
    file.write_bytes(file.read_bytes() + b"x")
    longer = open_source(tmp_path).listing.fingerprint
    file.rename(file.with_name("00.png"))
    assert len({before, longer, open_source(tmp_path).listing.fingerprint}) == 3


def test_text_file_called_jpg_is_listed_and_bad_when_decoded(tmp_path):
    write_classes(tmp_path, 2, "cat", "dog")
    (tmp_path / "cat" / "0.jpg").write_text("hello")
    source = open_source(tmp_path)
    with pytest.raises(BadImageError, match=r"^not an image: starts with b'hello'$"):
        decode_rgb(source.read(0))


def test_file_removed_after_listing_is_a_bad_image(tmp_path):
    write_classes(tmp_path, 2, "cat", "dog")
    source = open_source(tmp_path)
    (tmp_path / "cat" / "0.png").unlink()
    with pytest.raises(BadImageError, match=r"^cannot be opened: no such file or directory$"):
        source.read(0)


def test_failing_machine_is_no_bad_image():
    with pytest.raises(MachineError, match="mem: reading failed: Input/output error"):
        read_file("/proc/self/mem")  # its first page is not mapped


def test_empty_folder(tmp_path):
    refused(tmp_path, "found no class folders; wanted CLASS/image or train/CLASS/image")


def test_flat_folder_is_refused_for_training(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    refused(tmp_path, "found 2 images but no class folders; wanted CLASS/image")


def test_class_folder_without_images(tmp_path):
    write_classes(tmp_path, 2, "cat", "dog")
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "x.txt").write_text("x")
    refused(tmp_path, "emu: class folder without images; accepted: .avif .bmp")


def test_single_class(tmp_path):
    write_classes(tmp_path, 3, "cat")
    refused(tmp_path, r"a single class, 0 \(cat\); an adaptor needs at least two")


def test_unknown_split_folder(tmp_path):
    write_classes(tmp_path / "train", 2, "cat", "dog")
    write_classes(tmp_path / "extra", 2, "cat", "dog")
    refused(tmp_path, "unknown split 'extra' beside train; accepted: train, training, val, valid, validation, test")


def test_two_folders_of_one_split(tmp_path):
    for split in ("train", "val", "valid"):
        write_classes(tmp_path / split, 2, "cat", "dog")
    refused(tmp_path, "both val/ and valid/ are the val split; keep one")


def test_class_that_train_lacks(tmp_path):
    write_classes(tmp_path / "train", 2, "cat", "dog")
    write_classes(tmp_path / "test", 2, "cat", "emu", "fox")
    refused(tmp_path, "train lacks the class of test/emu, test/fox$")


def test_no_train_split(tmp_path):
    write_classes(tmp_path / "val", 2, "cat", "dog")
    write_classes(tmp_path / "test", 2, "cat", "dog")
    refused(tmp_path, "no train split; found only test, val")


def test_split_folder_without_class_folders(tmp_path):
    write_classes(tmp_path / "train", 2, "cat", "dog")
    write_pictures(tmp_path / "test", "0.png")
    refused(tmp_path, "test: no class folders in the test split; wanted test/CLASS/image")


def test_flat_split_folders_are_not_classes(tmp_path):
    write_pictures(tmp_path, "train/0.png", "train/1.png", "test/0.png", "test/1.png")
    refused(tmp_path, "train: no class folders in the train split")
    source = open_source(tmp_path, labels="optional")
    assert by_split(source) == {"train": 2, "test": 2}
    assert source.listing.targets is None
    assert source.listing.notes == ()


def test_every_class_with_a_single_image(tmp_path):
    write_classes(tmp_path, 1, "cat", "dog")
    refused(tmp_path, "no val split, and none can be cut: every class has a single train image")


def test_file_name_that_is_not_utf8(tmp_path):
    write_classes(tmp_path, 2, "cat", "dog")
    with open(os.path.join(os.fsencode(tmp_path), b"cat", b"\xff.png"), "wb") as file:
        file.write(encoded(picture()))
    refused(tmp_path, "is not UTF-8; rename it")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_folder_that_may_not_be_listed(tmp_path):
    write_classes(tmp_path, 2, "cat", "dog")
    (tmp_path / "dog").chmod(0)
    try:
        with pytest.raises(MachineError, match="dog: the folder cannot be listed: Permission denied"):
            open_source(tmp_path)
    finally:
        (tmp_path / "dog").chmod(0o700)


# --- only looked at: labels='optional'


def test_optional_flat_folder(tmp_path):
    write_pictures(tmp_path, "b.png", "a.png", "deep/c.png")
    (tmp_path / "x.txt").write_text("x")
    listing = open_source(tmp_path, labels="optional").listing
    assert listing.ids == ("a.png", "b.png", "deep/c.png")
    assert listing.splits == ("test",) * 3
    assert (listing.targets, listing.class_names) == (None, None)
    assert listing.notes == ("ignored files that are no images by their names: 1 .txt",)


def test_optional_class_folders_without_splits_are_test(tmp_path):
    write_classes(tmp_path, 2, "cat")
    (tmp_path / "empty").mkdir()
    listing = open_source(tmp_path, labels="optional").listing
    assert listing.splits == ("test", "test")
    assert listing.targets == (0, 0)
    assert listing.class_names == ("cat", "empty")


def test_optional_missing_train_and_val_are_fine(tmp_path):
    write_classes(tmp_path / "test", 2, "cat", "dog")
    assert by_split(open_source(tmp_path, labels="optional")) == {"test": 4}
    write_classes(tmp_path / "train", 20, "cat", "dog")
    source = open_source(tmp_path, labels="optional")
    assert by_split(source) == {"train": 40, "test": 4}
    assert source.listing.notes == ()


def test_optional_leaves_labels_out_where_some_are_missing(tmp_path):
    write_classes(tmp_path / "train", 2, "cat", "dog")
    write_pictures(tmp_path / "test", "0.png")
    listing = open_source(tmp_path, labels="optional").listing
    assert listing.targets is None
    assert "labels are left out: 1 of 5 labels are null or negative" in listing.notes[0]


def test_optional_still_needs_an_image(tmp_path):
    refused(tmp_path, "no images$", labels="optional")


# --- VTAB-1K


def write_vtab(root, lists):
    """Write list files of (path, label) and an image for each path."""
    for file, lines in lists.items():
        write_pictures(root, *(path for path, _ in lines))
        (root / file).write_text("".join(f"{path} {label}\n" for path, label in lines))


TRAIN = [(f"images/train 800/{number}.png", number % 3) for number in range(12)]
VAL = [(f"images/val200/{number}.png", number % 3) for number in range(6)]
TEST = [(f"images/test/{number}.png", number % 3) for number in range(4)]


def test_vtab_folder_with_spaces_in_paths(tmp_path):
    write_vtab(tmp_path, {"train800.txt": TRAIN, "val200.txt": VAL, "test.txt": TEST})
    source = open_source(tmp_path)
    assert by_split(source) == {"train": 12, "val": 6, "test": 4}
    assert source.listing.ids[1] == "images/train 800/1.png"
    assert source.listing.targets[:4] == (0, 1, 2, 0)
    assert source.listing.class_names is None
    assert source.where(1) == str(tmp_path / "images/train 800/1.png")
    assert decode_rgb(source.read(1)).size == (8, 8)


def test_vtab_union_is_never_listed_twice(tmp_path):
    copies = [(f"images/train800val200/{number}.png", label) for number, (_, label) in enumerate(TRAIN + VAL)]
    for union in (TRAIN + VAL, copies):
        write_vtab(tmp_path, {"train800.txt": TRAIN, "val200.txt": VAL, "train800val200.txt": union})
        assert by_split(open_source(tmp_path)) == {"train": 12, "val": 6}


def test_vtab_union_alone_is_train_with_a_val_split_cut(tmp_path):
    write_vtab(tmp_path, {"train800val200.txt": TRAIN + VAL, "test.txt": TEST})
    source = open_source(tmp_path)
    assert by_split(source) == {"train": 15, "val": 3, "test": 4}
    assert "no val split" in source.listing.notes[0]


def test_vtab_train_alone(tmp_path):
    write_vtab(tmp_path, {"train800.txt": TRAIN})
    assert by_split(open_source(tmp_path)) == {"train": 9, "val": 3}


@pytest.mark.parametrize("union", [TRAIN, TRAIN + VAL[:-1] + [(VAL[-1][0], 0)], [("elsewhere/0.png", 0)]])
def test_vtab_union_that_is_none(tmp_path, union):
    write_vtab(tmp_path, {"train800.txt": TRAIN, "val200.txt": VAL, "train800val200.txt": union})
    refused(tmp_path, r"train800val200.txt \(\d+ lines\) is not the union of train800.txt \(12\) and val200.txt \(6\)")


@pytest.mark.parametrize("line", ["image.png", "image.png cat", "12", "image.png 3.0"])
def test_vtab_line_that_is_none(tmp_path, line):
    write_vtab(tmp_path, {"train800.txt": TRAIN, "val200.txt": VAL})
    with (tmp_path / "val200.txt").open("a") as file:
        file.write(f"\n{line}\n")
    refused(tmp_path, f"val200.txt line 8: wanted 'path label' with an integer label, found '{line}'")


def test_vtab_same_path_twice_names_both_lines(tmp_path):
    write_vtab(tmp_path, {"train800.txt": TRAIN, "val200.txt": [*VAL, TRAIN[2]]})
    refused(tmp_path, "id 'images/train 800/2.png' is there twice: train800.txt line 3 and val200.txt line 7")


def test_vtab_without_its_images(tmp_path):
    write_vtab(tmp_path / "lists", {"train800.txt": TRAIN, "val200.txt": VAL})
    (tmp_path / "lists" / "train800.txt").rename(tmp_path / "train800.txt")
    refused(tmp_path, "none of its 12 files is there, first .*images/train 800/0.png; relative paths start from")


def test_vtab_empty_and_binary_lists(tmp_path):
    write_vtab(tmp_path, {"train800.txt": TRAIN, "val200.txt": []})
    refused(tmp_path, "val200.txt: no lines; wanted 'path label'")
    (tmp_path / "val200.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "val200.txt: not UTF-8 text")


def test_vtab_labels_with_gaps(tmp_path):
    write_vtab(tmp_path, {"train800.txt": [(path, label * 2) for path, label in TRAIN], "val200.txt": VAL[::3]})
    refused(tmp_path, "labels have gaps: of the classes 0 … 4 no image has 1, 3; renumber them 0 … 2")


def test_vtab_class_that_train_lacks_is_told_not_refused(tmp_path):
    write_vtab(tmp_path, {"train800.txt": TRAIN, "val200.txt": VAL, "test.txt": [*TEST, ("images/test/9.png", 3)]})
    assert open_source(tmp_path).listing.notes == ("1 image of val and test are of classes that train lacks: 3",)


# --- lists of paths


def write_csv(file, header, *rows):
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])
    return file


def test_csv_list(tmp_path):
    write_pictures(tmp_path, *(f"images/{number}.png" for number in range(6)))
    rows = [
        (
            ("./" if number else str(tmp_path) + "/") + f"images/{number}.png",
            number % 2,
            ["NA", "dog"][number % 2],
            split,
        )
        for number, split in enumerate(["train"] * 4 + ["validation", "test"])
    ]
    source = open_source(write_csv(tmp_path / "list.csv", ["path", "label", "label_name", "split"], *rows))
    assert source.listing.ids == tuple(f"images/{number}.png" for number in range(6))
    assert source.listing.splits == ("train",) * 4 + ("val", "test")
    assert source.listing.targets == (0, 1) * 3
    assert source.listing.class_names == ("NA", "dog")
    assert source.where(3) == str(tmp_path / "images/3.png")
    assert source.read(3) == (tmp_path / "images/3.png").read_bytes()


def test_parquet_list_with_ids_and_paths_elsewhere(tmp_path):
    write_pictures(tmp_path, *(f"images/{number}.png" for number in range(4)))
    (tmp_path / "lists").mkdir()
    table = {"path": [f"../images/{number}.png" for number in range(4)], "label": [0, 1, 0, 1], "id": [7, 8, 9, 10]}
    pq.write_table(pa.table(table), tmp_path / "lists" / "list.parquet")
    source = open_source(tmp_path / "lists" / "list.parquet")
    assert source.listing.ids == ("7", "8", "9", "10")
    assert decode_rgb(source.read(2)).size == (8, 8)
    assert by_split(source) == {"train": 2, "val": 2}


def test_csv_some_files_missing_are_told_and_bad(tmp_path):
    write_pictures(tmp_path, "0.png", "1.png", "2.png", "3.png")
    rows = [(f"{number}.png", number % 2) for number in range(6)]
    source = open_source(write_csv(tmp_path / "list.csv", ["path", "label"], *rows))
    assert "2 of 6 files are not there and will be rejected, first" in source.listing.notes[0]
    with pytest.raises(BadImageError, match="cannot be opened: no such file"):
        source.read(5)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["file", "label"], [("a", 0)], "no column path; found file, label; wanted path, label, optionally label_name"),
        (["path", "class"], [("a", 0)], "no column label; found path, class; wanted path, label"),
        (["path", "label"], [], "list.csv: no images"),
        (["path", "label"], [("0.png", "cat")], "column label is string; wanted integers 0 … C-1"),
        (["path", "label"], [("0.png", 0), ("1.png", "")], "1 of 2 labels are null or negative, first null at row 1"),
        (["path", "label"], [("0.png", 0), ("1.png", -1)], "first -1 at row 1"),
        (["path", "label"], [("0.png", 0), ("", 1)], "column path is null in row 1"),
        (["path", "label"], [("0.png", 0), ("./0.png", 1)], "id '0.png' is there twice: row 0"),
        (["path", "label"], [("0.png", 0.5)], "column label is double"),
        (["path", "label"], [("0.png", 1), ("1.png", 2)], "of the classes 0 … 2 no image has 0; renumber them 0 … 1"),
        (
            ["path", "label", "split"],
            [("0.png", 0, "train"), ("1.png", 1, "dev")],
            "unknown split 'dev', in 1 image, first row 1",
        ),
        (["path", "label", "split"], [("0.png", 0, "train"), ("1.png", 1, "")], "unknown split null, in 1 image"),
        (
            ["path", "label", "label_name"],
            [("0.png", 0, "cat"), ("1.png", 0, "dog")],
            "label 0 has two names: 'cat' and 'dog'",
        ),
        (
            ["path", "label", "label_name"],
            [("0.png", 0, "cat"), ("1.png", 1, "")],
            "label_name is null where label is 1",
        ),
        (["path", "label"], [("0.png", 0, "more")], "not a CSV table"),
    ],
)
def test_list_that_cannot_be_used(tmp_path, header, rows, message):
    write_pictures(tmp_path, "0.png", "1.png")
    refused(write_csv(tmp_path / "list.csv", header, *rows), message)


def test_gaps_of_many_labels_are_cut_short(tmp_path):
    write_pictures(tmp_path, "0.png", "1.png")
    file = write_csv(tmp_path / "list.csv", ["path", "label"], ("0.png", 0), ("1.png", 10**12))
    refused(file, "no image has 1, 2, 3, 4, 5 … and 999999999994 more; renumber")


def test_optional_list_needs_no_labels(tmp_path):
    write_pictures(tmp_path, "0.png")
    source = open_source(write_csv(tmp_path / "list.csv", ["path"], ("0.png",)), labels="optional")
    assert source.listing.targets is None
    assert source.listing.splits == ("test",)


def test_optional_list_keeps_labels_with_gaps(tmp_path):
    write_pictures(tmp_path, "0.png", "1.png")
    rows = [("0.png", 3, "cat", "train"), ("1.png", 5, "dog", "")]
    file = write_csv(tmp_path / "list.csv", ["path", "label", "label_name", "split"], *rows)
    listing = open_source(file, labels="optional").listing
    assert listing.targets == (3, 5)
    assert listing.class_names is None
    assert listing.splits == ("train", "test")
