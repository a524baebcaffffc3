"""Parquet files with the images in them: what is listed, how images are read, what is refused."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldtap.errors import MachineError, SourceError
from coldtap.pipeline.images.decode import BadImageError, decode_rgb
from coldtap.pipeline.images.sources import open_source
from coldtap.pipeline.images.sources import spool as spool_module
from tests.helpers.pictures import encoded, picture, write_pictures
from tests.helpers.places import SHARED

DOWNSTREAM = SHARED / "data" / "downstream"


def pictures(count, first=0):
    return [encoded(picture(first + number)) for number in range(count)]


def write(file, **columns):
    """Write a Parquet file with two labels by turns where none are given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    columns.setdefault("label", [number % 2 for number in range(rows)])
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), file)
    return file


def structs(images, paths):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": b, "path": p} for b, p in zip(images, paths, strict=True)], kind)


def refused(path, message, **options):
    with pytest.raises(SourceError, match=message) as caught:
        open_source(path, **options)
    assert "\n" not in str(caught.value)


def test_one_file_with_all_columns(tmp_path):
    file = write(
        tmp_path / "set.parquet",
        image=pictures(6),
        label=pa.array([0, 1, 0, 1, 0, 1], pa.int32()),
        label_name=pa.array(["cat", "dog"] * 3).dictionary_encode(),
        split=["train"] * 4 + ["val", "test"],
        id=[f"x/{number}" for number in range(6)],
    )
    source = open_source(file)
    listing = source.listing
    assert source.name == str(file)
    assert listing.ids[2] == "x/2"
    assert listing.splits == ("train",) * 4 + ("val", "test")
    assert listing.targets == (0, 1) * 3
    assert listing.class_names == ("cat", "dog")
    assert listing.notes == ()
    assert source.where(4) == f"{file} row 4"
    assert [source.read(number) for number in (5, 0, 3)] == [pictures(6)[number] for number in (5, 0, 3)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_bytes_of_each_arrow_type(tmp_path, kind):
    source = open_source(write(tmp_path / "set.parquet", image=pa.array(pictures(4), kind)))
    assert [source.read(number) for number in range(4)] == pictures(4)
    assert source.listing.ids[3] == "set.parquet:3"


def test_hugging_face_folder(tmp_path):
    """Splits from file names, class names from the metadata, structs with and without bytes."""
    names = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}})
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        {"huggingface": names},
    )
    files = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"]
    (tmp_path / "data").mkdir()
    for number, name in enumerate(files):
        images = structs(pictures(4, number * 4), [f"{number * 4 + k}.png" for k in range(4)])
        table = pa.table({"image": images, "label": [0, 1, 0, 1]}, schema=schema)
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text("a card")
    source = open_source(tmp_path)
    listing = source.listing
    assert [listing.splits.count(split) for split in ("train", "val", "test")] == [8, 4, 4]
    assert sorted(listing.ids) == sorted(f"{number}.png" for number in range(16))
    assert listing.class_names == ("cat", "dog")
    for number, sample_id in enumerate(listing.ids):
        assert source.read(number) == encoded(picture(int(sample_id.removesuffix(".png"))))
    assert source.where(5) == f"{tmp_path}/data/train-00000-of-00002.parquet row 1"


def test_splits_from_folder_names(tmp_path):
    write(tmp_path / "train" / "0000.parquet", image=pictures(4))
    write(tmp_path / "val" / "0000.parquet", image=pictures(2))
    listing = open_source(tmp_path).listing
    assert listing.splits == ("train",) * 4 + ("val",) * 2
    assert listing.ids[4] == "val/0000.parquet:0"


def test_struct_paths_that_are_not_unique_are_no_ids(tmp_path):
    source = open_source(write(tmp_path / "set.parquet", image=structs(pictures(4), ["0.png", None] * 2)))
    assert source.listing.ids == tuple(f"set.parquet:{row}" for row in range(4))


def test_struct_without_bytes_reads_its_path_beside_the_file(tmp_path):
    write_pictures(tmp_path, "a.png", "deep/b.png")
    images = structs([None, None, pictures(3)[2], None, b""], ["a.png", "deep/b.png", "c.png", "gone.png", None])
    source = open_source(write(tmp_path / "set.parquet", image=images, label=[0, 1, 0, 1, 0]))
    assert [source.read(number) for number in range(3)] == pictures(3)
    with pytest.raises(BadImageError, match="cannot be opened: no such file"):
        source.read(3)
    with pytest.raises(BadImageError, match="empty: 0 bytes"):
        decode_rgb(source.read(4))


def test_null_images_are_bad_images(tmp_path):
    source = open_source(write(tmp_path / "set.parquet", image=pa.array([None, *pictures(3)], pa.binary())))
    assert source.read(1) == pictures(1)[0]
    with pytest.raises(BadImageError, match=r"^null image$"):
        source.read(0)
    kind = pa.struct([("bytes", pa.binary())])
    nothing = pa.array([None, {"bytes": None}, {"bytes": pictures(1)[0]}, None], kind)
    source = open_source(write(tmp_path / "other.parquet", image=nothing))
    assert source.read(2) == pictures(1)[0]
    for number in (0, 1, 3):
        with pytest.raises(BadImageError, match=r"^null image$"):
            source.read(number)


def test_threads_read_in_any_order_over_files_and_row_groups(tmp_path):
    blobs = [bytes([number % 251]) * (number % 37) for number in range(1000)]
    for number in range(3):
        part = pa.table({"image": blobs[number::3], "label": [row % 2 for row in range(len(blobs[number::3]))]})
        pq.write_table(part, tmp_path / f"train-{number}.parquet", row_group_size=100)
    source = open_source(tmp_path)
    expected = [blob for number in range(3) for blob in blobs[number::3]]
    order = np.random.default_rng(0).permutation(1000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [expected[number] for number in order]


def test_listing_reads_no_image(tmp_path):
    file = write(tmp_path / "set.parquet", image=pictures(4))
    group = pq.read_metadata(file).row_group(0)
    images = next(chunk for i in range(group.num_columns) if (chunk := group.column(i)).path_in_schema == "image")
    start = images.dictionary_page_offset or images.data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + images.total_compressed_size] = bytes(images.total_compressed_size)
    file.write_bytes(data)
    source = open_source(file)
    assert len(source.listing) == 4
    with pytest.raises(SourceError, match="the image column cannot be read"):
        source.read(0)


def test_fingerprint_knows_ids_row_counts_and_sizes(tmp_path):
    def fingerprint(**columns):
        return open_source(write(tmp_path / "set.parquet", **columns)).listing.fingerprint

    plain = fingerprint(image=pictures(4))
    assert fingerprint(image=pictures(4)) == plain
    assert fingerprint(image=pictures(4), label=[1, 0, 1, 0]) == plain
    others = [
        fingerprint(image=pictures(4), id=["a", "b", "c", "d"]),
        fingerprint(image=[*pictures(3), pictures(4)[3] + b"x"]),
        fingerprint(image=pictures(5)),
    ]
    assert len({plain, *others}) == 4


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [b"a"]}, "set.parquet: no column image; found img, label; wanted image, label, optionally label_name"),
        ({"image": [b"a"], "label": None, "class": [0]}, "no column label; found image, class"),
        ({"image": ["a.png"]}, "column image is string; wanted bytes, or a struct of bytes and path"),
        ({"image": [[1, 2]]}, r"column image is list<.*>; wanted bytes"),
        (
            {"image": [b"a"] * 2, "label": [0, None]},
            "1 of 2 labels are null or negative, first null at .*set.parquet row 1",
        ),
        ({"image": [b"a"] * 2, "label": ["cat", "dog"]}, "column label is string; wanted integers"),
        ({"image": [b"a"] * 2, "label": [0, 2]}, "labels have gaps: of the classes 0 … 2 no image has 1"),
        ({"image": [b"a"] * 2, "label": [0, 0]}, "a single class, 0; an adaptor needs at least two"),
        ({"image": [b"a"] * 2, "id": ["x", "x"]}, "id 'x' is there twice: .*set.parquet row 0 and .*set.parquet row 1"),
        ({"image": [b"a"] * 2, "id": ["x", None]}, "column id is null in row 1"),
        ({"image": [b"a"] * 2, "id": [0.5, 1.5]}, "column id is double; wanted strings"),
        (
            {"image": [b"a"] * 2, "split": ["train", "holdout"]},
            "unknown split 'holdout', in 1 image, first .* row 1; accepted",
        ),
        ({"image": [b"a"] * 2, "split": ["val", "test"]}, "no train split; found only test, val"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "set.parquet: no images"),
    ],
)
def test_file_that_cannot_be_used(tmp_path, columns, message):
    refused(write(tmp_path / "set.parquet", **columns), message)


def test_class_names_that_are_too_few(tmp_path):
    names = json.dumps({"info": {"features": {"label": {"names": ["cat"]}}}})
    table = pa.table({"image": pictures(2), "label": [0, 1]}).replace_schema_metadata({"huggingface": names})
    pq.write_table(table, tmp_path / "set.parquet")
    refused(tmp_path / "set.parquet", "label 1 at .* row 1, but only 1 class names")


def test_metadata_without_names_is_no_error(tmp_path):
    for text in ("{", "[]", '{"info": null}'):
        table = pa.table({"image": pictures(4), "label": [0, 1] * 2}).replace_schema_metadata({"huggingface": text})
        pq.write_table(table, tmp_path / "set.parquet")
        assert open_source(tmp_path / "set.parquet").listing.class_names is None


def test_broken_files(tmp_path):
    (tmp_path / "set.parquet").write_bytes(b"PAR1 no")
    refused(tmp_path / "set.parquet", "set.parquet: not a Parquet file")
    refused(tmp_path, "set.parquet: not a Parquet file that can be read")


def test_files_that_differ_in_columns_or_in_naming_splits(tmp_path):
    write(tmp_path / "train-0.parquet", image=pictures(2))
    write(tmp_path / "train-1.parquet", image=pictures(2), split=["train"] * 2)
    refused(tmp_path, "train-1.parquet: columns label, split, but label in .*train-0.parquet")
    write(tmp_path / "train-1.parquet", image=pictures(2))
    write(tmp_path / "more.parquet", image=pictures(2))
    refused(tmp_path, "another file is train by its name, but more.parquet names no split")


def test_optional_needs_neither_labels_nor_train(tmp_path):
    listing = open_source(write(tmp_path / "a.parquet", image=pictures(2), label=None), labels="optional").listing
    assert (listing.splits, listing.targets) == (("test", "test"), None)
    listing = open_source(write(tmp_path / "b.parquet", image=pictures(2), label=[-1, -1]), labels="optional").listing
    assert listing.targets is None
    assert "labels are left out: 2 of 2 labels are null or negative, first -1" in listing.notes[0]
    listing = open_source(write(tmp_path / "c.parquet", image=pictures(2), label=[4, 4]), labels="optional").listing
    assert listing.targets == (4, 4)


def test_file_that_changed_after_listing(tmp_path):
    file = write(tmp_path / "set.parquet", image=pictures(4))
    for rows in (2, 6):
        source = open_source(write(file, image=pictures(4)))
        write(file, image=pictures(rows))
        with pytest.raises(SourceError, match=r"set.parquet: 4 rows when it was listed, now another number"):
            source.read(0)


def test_file_that_broke_after_listing(tmp_path):
    file = write(tmp_path / "set.parquet", image=pictures(4))
    source = open_source(file)
    file.unlink()
    with pytest.raises(SourceError, match=r"set.parquet: the image column cannot be read"):
        source.read(0)


def test_no_room_for_the_images(tmp_path, monkeypatch):
    """A real limit on the size of files, in a process of its own."""
    blobs = [os.urandom(100_000) for _ in range(20)]
    file = write(tmp_path / "set.parquet", image=blobs)
    script = (
        "import resource, signal, sys\n"
        "from coldtap.pipeline.images.sources import open_source\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "source = open_source(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "source.read(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    assert "MachineError" in done.stderr
    assert "images cannot be spooled there: File too large; set TMPDIR to a folder with room" in done.stderr


def test_no_folder_for_the_images(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "set.parquet", image=pictures(4)))
    monkeypatch.setattr(spool_module.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(MachineError, match="no temporary file for the images: No such file or directory; set TMPDIR"):
        source.read(0)


def test_spool_leaves_no_file_and_is_closed_with_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module.tempfile, "tempdir", str(tmp_path))
    source = open_source(write(tmp_path / "in" / "set.parquet", image=pictures(4)))
    source.read(0)
    assert os.listdir(tmp_path) == ["in"]
    handle = source._spool._file
    os.fstat(handle)
    del source
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def peak_bytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
def test_memory_does_not_grow_with_the_images(tmp_path):
    """128 MB in one row group, read in random order, in far less memory."""
    blob = os.urandom(1 << 24)
    images = [blob[start : start + 32_000] for start in np.random.default_rng(0).integers(0, 1 << 23, 4000)]
    table = pa.table({"image": images, "label": [number % 2 for number in range(4000)]})
    # Pages, the least that a reader can hold, of 32 images.
    pq.write_table(table, tmp_path / "set.parquet", use_dictionary=False, write_batch_size=32, data_page_size=1 << 20)
    del images, table
    source = open_source(tmp_path / "set.parquet")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is now
    before = peak_bytes()
    for index in np.random.default_rng(1).permutation(4000).tolist():
        assert len(source.read(index)) == 32_000
    assert peak_bytes() - before < 40 << 20


@pytest.mark.skipif(not DOWNSTREAM.exists(), reason="no ../shared/data beside this checkout")
@pytest.mark.parametrize(
    ("name", "counts", "n_classes"), [("blood-cells", (800, 200, 1500), 3), ("omniglot-alphabets", (800, 200, 3630), 8)]
)
def test_shared_data(name, counts, n_classes):
    source = open_source(DOWNSTREAM / f"{name}.parquet")
    listing = source.listing
    assert tuple(listing.splits.count(split) for split in ("train", "val", "test")) == counts
    assert len(listing.class_names) == n_classes == max(listing.targets) + 1
    assert listing.notes == ()
    for index in range(0, len(listing), 200):
        assert decode_rgb(source.read(index)).mode == "RGB"
