"""`verify` names what is wrong with a store, and where; and it finds nothing wrong with a store that is right."""

import json
import os
import shutil

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from coldtap.errors import CorruptStoreError, IncompleteStoreError
from coldtap.stores import open_store
from coldtap.stores.format.chunks import checksum, compress, decompress
from coldtap.stores.format.codes import Scaling
from coldtap.stores.format.escapes import CHUNK
from coldtap.stores.format.manifest import MANIFEST
from coldtap.stores.reading.manifest_files import file_entry
from coldtap.stores.verify.verify import verify_store
from coldtap.text import show_bytes
from tests.helpers.jobs import cache, coldtap, error_line, files, in_memory
from tests.helpers.manifests import all_lines, name_of, rewrite
from tests.helpers.pictures import encoded, picture, write_classes
from tests.helpers.places import FIXTURES
from tests.helpers.synthetic import synthetic_store

LAYERS = "features.zarr/layers/g2x2-p0-c4"
TRAIN, VAL = f"{LAYERS}/c/0/0/0/0", f"{LAYERS}/c/1/0/0/0"
CHUNK_BYTES = 4 * 4 * 4 + 4  # four tokens of four float32 channels, and their checksum


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    store = tmp_path_factory.mktemp("sound") / "store"
    torch.set_num_threads(1)
    cache(in_memory(train=8, val=4), store, tier="float32", taps="0,2")
    return store


@pytest.fixture
def store(tmp_path, sound):
    return shutil.copytree(sound, tmp_path / "store")


def problems(store):
    return [(problem.where, problem.what) for problem in verify_store(store).problems]


def places(store):
    return {where for where, _ in problems(store)}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def test_nothing_is_wrong_with_a_sound_store(store):
    found = verify_store(store)
    listed = files(store)
    del listed[MANIFEST]
    assert found.problems == ()
    assert found.n_files == len(listed)
    assert found.n_bytes == sum(map(len, listed.values()))
    assert found.n_rows == 12
    assert found.digest == open_store(store).digest


def test_every_byte_of_every_file_counts(store):
    """One byte flipped in each file in turn, its place spread over the file."""
    for number, (name, data) in enumerate(files(store).items()):
        path = store / name
        flip(path, (number * 7919) % len(data))
        try:
            assert problems(store), name
        except (CorruptStoreError, IncompleteStoreError) as error:
            assert name in (MANIFEST, "recipe.json") or name.startswith("manifest-parts/"), name
            assert str(store / name) in str(error)  # noqa: PT017 # whether it raises depends on the file
        path.write_bytes(data)
    assert problems(store) == []


@pytest.mark.parametrize(("row", "position", "tap"), [(0, 0, 0), (0, 1, 2), (5, 0, 0), (7, 1, 2)])
def test_a_flipped_value_is_named_by_array_row_and_tap(store, row, position, tap):
    flip(store / TRAIN, (2 * row + position) * CHUNK_BYTES + 11)
    assert problems(store) == [(TRAIN, f"row {row}, tap {tap}: the chunk's checksum does not hold")]


def test_rows_are_counted_over_the_store_and_not_the_shard(store):
    flip(store / VAL, 3)
    first = open_store(store).rows("val")[0]
    assert problems(store)[0] == (VAL, f"row {first}, tap 0: the chunk's checksum does not hold")


@pytest.mark.parametrize("gather", ["sum", "pooled"])
def test_a_flipped_value_of_an_array_without_chunks_a_tap_is_named_by_row(store, gather):
    (shard,) = [name for name in files(store) if f"/{gather}/" in name and "/c/0/" in name]
    flip(store / shard, 2)
    assert problems(store) == [(shard, "row 0: the chunk's checksum does not hold")]


def test_values_with_a_forged_checksum_are_named_by_tap(store):
    data = bytearray((store / TRAIN).read_bytes())
    data[0] ^= 1
    data[CHUNK_BYTES - 4 : CHUNK_BYTES] = google_crc32c.value(bytes(data[: CHUNK_BYTES - 4])).to_bytes(4, "little")
    (store / TRAIN).write_bytes(data)
    what = "the chunk is whole and not the one that the store's list of digests has there"
    assert problems(store) == [(TRAIN, f"row 0, tap 0: {what}")]


def test_a_flipped_byte_of_a_shards_index_is_named(store):
    size = (store / TRAIN).stat().st_size
    flip(store / TRAIN, size - 30)
    ((where, what),) = [problem for problem in problems(store) if problem[0] == TRAIN]
    assert where == TRAIN
    assert "the checksum of the shard's index does not hold" in what


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_truncated_shard_is_named_with_both_sizes(store, kept):
    size = (store / TRAIN).stat().st_size
    left = int(size * kept) if isinstance(kept, float) else kept if kept >= 0 else size + kept
    os.truncate(store / TRAIN, left)
    assert problems(store) == [(TRAIN, f"{left} bytes; the manifest says {size}")]


@pytest.mark.parametrize(
    "name", [TRAIN, "samples.parquet", "rejected.parquet", "targets/label.parquet", "journal/00000001.json"]
)
def test_a_missing_file_is_named(store, name):
    (store / name).unlink()
    assert (name, "the file is missing") in problems(store)
    assert {where.partition("#")[0] for where in places(store)} <= {name, "."}


def test_missing_metadata_of_an_array_is_named(store):
    (store / LAYERS / "zarr.json").unlink()
    assert (f"{LAYERS}/zarr.json", "the file is missing") in problems(store)


@pytest.mark.parametrize("name", ["notes.txt", f"{LAYERS}/c/2/0/0/0", "journal/00000002.json", f"{TRAIN}.partial"])
def test_a_file_that_the_manifest_does_not_list_is_named(store, name):
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).write_bytes(b"what is this?")
    assert problems(store) == [(name, "the manifest does not list this file")]


def test_a_manifest_that_lies_about_a_size_is_found_out(store):
    size = (store / TRAIN).stat().st_size
    relabelled(store, line_of(store, TRAIN), line_of(store, TRAIN).replace(f" {size} ", f" {size + 1} "))
    assert problems(store) == [(TRAIN, f"{size} bytes; the manifest says {size + 1}")]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (TRAIN, "its SHA-256 is not the manifest's, though all checksums hold"),
        ("digests/layers/g2x2-p0-c4/0", "its SHA-256 is not the manifest's"),
        ("journal/00000000.json", "its SHA-256 is not the manifest's"),
        ("rejected.parquet", "its SHA-256 is not the manifest's"),
    ],
)
def test_a_manifest_that_lies_about_a_digest_is_found_out(store, name, what):
    line = line_of(store, name)
    relabelled(store, line, f"{'0' * 64}{line[64:]}")
    assert problems(store) == [(name, what)]


def test_a_manifest_without_a_file_or_a_list_is_found_out(store):
    digests = "digests/layers/g2x2-p0-c4"
    unlisted(store, "journal/00000001.json", f"{digests}/0", f"{digests}/1")
    (store / f"{digests}/1").unlink()
    assert set(problems(store)) == {
        ("journal/00000001.json", "the manifest does not list this file"),
        (f"{digests}/0", "the manifest does not list this file"),
        (f"{digests}/1", "the manifest does not list these digests"),
    }


def test_a_list_of_digests_of_no_shard_is_found_out(store):
    unlisted(store, VAL)
    (store / VAL).unlink()
    assert ("digests/layers/g2x2-p0-c4/1", "digests of what is not there") in problems(store)


def test_lists_that_lie_about_a_checksum_alone_are_found_out(store):
    """The SHA-256 in the list holds; the reader compares the other number."""
    name = "digests/layers/g2x2-p0-c4/0"
    flip(store / name, 33)
    relist(store, name)
    what = "the chunk is whole and not the one that the store's list of digests has there"
    assert problems(store) == [(TRAIN, f"row 0, tap 0: {what}")]


@pytest.fixture
def of_format_1(tmp_path):
    return shutil.copytree(FIXTURES / "float32", tmp_path / "old")


OLD = "features.zarr/layers/g2x2-p1-c6"
OLD_TRAIN, OLD_VAL = f"{OLD}/c/0/0/0/0", f"{OLD}/c/2/0/0/0"


def test_the_digests_of_taps_in_format_1_are_checked(of_format_1):
    flip(of_format_1 / OLD_TRAIN, 1)
    lines = (of_format_1 / MANIFEST).read_text().splitlines()
    (line,) = [line for line in lines if line.endswith(f" {OLD_TRAIN}#2")]
    text = "".join(f"{line}\n" for line in lines if not line.endswith(f" {OLD_VAL}#2"))
    (of_format_1 / MANIFEST).write_text(text.replace(line, f"{'0' * 64}{line[64:]}"))
    assert problems(of_format_1) == [
        (OLD_TRAIN, "row 0, tap 0: the chunk's checksum does not hold"),
        (f"{OLD_TRAIN}#0", "the tap's SHA-256 is not the manifest's"),
        (f"{OLD_TRAIN}#2", "the tap's SHA-256 is not the manifest's"),
        (f"{OLD_VAL}#2", "the tap's SHA-256 is not the manifest's"),
    ]


@pytest.mark.parametrize("line", ["rubbish", f"{'0' * 64} 5 ../../etc/passwd", f"{'0' * 64} 5 /etc/passwd"])
def test_a_line_that_is_none_of_a_manifest_is_named_by_its_number(store, line):
    n_lines = len((store / MANIFEST).read_text().splitlines())
    with (store / MANIFEST).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CorruptStoreError, match=f"manifest, line {n_lines + 1}: not `sha256 bytes name`"):
        verify_store(store)


def test_damaged_tables_are_named(store):
    for name in ("samples.parquet", "targets/label.parquet"):
        flip(store / name, 5)
        assert (name, "its SHA-256 is not the manifest's") in problems(store)
        flip(store / name, 5)
    assert problems(store) == []


def test_a_row_without_its_line_and_a_line_without_its_row_are_found_out(store):
    """As if someone had written the table and the manifest anew."""
    table = pq.read_table(store / "samples.parquet")
    rows = table["row"].to_pylist()
    pq.write_table(table.set_column(0, table.schema.field(0), [[*rows[:-1], 700]]), store / "samples.parquet")
    assert places(store) == {"samples.parquet"}
    relist(store, "samples.parquet")
    assert problems(store) == [
        ("samples.parquet", "row 700 is not where the recipe's plan has its split and view"),
        *(
            ("samples.parquet", f"row {row} of {name} {what}")
            for name in sorted(open_store(store).arrays)
            for row, what in ((rows[-1], "has a chunk and no line"), (700, "has a line and no chunk"))
        ),
    ]


def test_a_row_that_is_also_rejected_is_found_out(store):
    line = {"row": 3, "sample_id": "x", "view": 0, "split": "train", "source": "x", "reason": "x", "tap": None}
    schema = pq.read_schema(store / "rejected.parquet")
    pq.write_table(pa.Table.from_pylist([line], schema), store / "rejected.parquet")
    relist(store, "rejected.parquet")
    assert problems(store) == [("samples.parquet", "row 3 is also listed as rejected")]


def relist(store, name):
    """Put a file's size and digest of now into the manifest."""
    entry = file_entry(store, name)
    relabelled(store, line_of(store, name), f"{entry.sha256} {entry.n_bytes} {entry.name}")


def line_of(store, name):
    (line,) = [line for line in all_lines(store) if name_of(line) == name]
    return line


def unlisted(store, *names):
    """Take lines out of the manifest."""
    assert {*names} <= {name_of(line) for line in all_lines(store)}
    rewrite(store, lambda lines: [line for line in lines if name_of(line) not in names])


def relabelled(store, old, *new):
    """The manifest with other lines in place of one."""
    assert all_lines(store).count(old) == 1
    rewrite(store, lambda lines: sorted([*{*lines} - {old}, *new], key=name_of) if old in lines else lines)


def test_a_part_of_the_manifest_that_is_damaged_or_gone_is_named(store):
    (name,) = [name for name in files(store) if name.startswith("manifest-parts/")]
    data = (store / name).read_bytes()
    (store / name).write_bytes(data[:-1])
    with pytest.raises(CorruptStoreError, match=f"{name}, a part of the manifest, is not what the manifest says"):
        verify_store(store)
    (store / name).unlink()
    with pytest.raises(CorruptStoreError, match=f"{name}, a part of the manifest, cannot be read"):
        verify_store(store)


def test_a_file_that_two_parts_list_is_named(store):
    rewrite(store, lambda lines: sorted({*lines, line_of(store, "journal/00000000.json")}, key=name_of))
    with pytest.raises(CorruptStoreError, match=r"journal/00000000\.json is listed elsewhere too"):
        verify_store(store)


def test_an_edited_recipe_is_named_whatever_was_edited(store):
    recipe = json.loads((store / "recipe.json").read_text())
    edited = {**recipe, "rows": {**recipe["rows"], "seed": 1}}
    (store / "recipe.json").write_text(json.dumps(edited))
    with pytest.raises(CorruptStoreError, match="its digests are not those of its parts; it was edited by hand"):
        open_store(store)
    assert "recipe.json" in places(store)
    (store / "recipe.json").write_text(json.dumps({**recipe, "recorded": {**recipe["recorded"], "model": "another"}}))
    with pytest.raises(CorruptStoreError, match=r"recipe\.json is not what the manifest says"):
        open_store(store)
    assert "recipe.json" in places(store)


def test_several_problems_are_all_named(store):
    flip(store / TRAIN, 1)
    (store / VAL).unlink()
    (store / "notes.txt").touch()
    assert places(store) == {TRAIN, VAL, "notes.txt"}


def test_the_command_lists_the_problems_and_ends_with_code_1(store):
    flip(store / TRAIN, 1)
    result = coldtap("verify", store)
    assert result.exit_code == 1
    assert result.stderr == ""
    first, last = result.stdout.splitlines()
    assert first == f"{TRAIN}: row 0, tap 0: the chunk's checksum does not hold"
    assert last.startswith(f"{store}: ")
    assert last.endswith("12 rows checked: 1 problems")


def test_the_command_gives_the_same_as_json(store):
    sound = coldtap("verify", store, "--json")
    assert sound.exit_code == 0
    assert json.loads(sound.stdout) == {
        "store": str(store),
        "digest": open_store(store).digest,
        "files": len(files(store)) - 1,
        "bytes": sum(len(data) for name, data in files(store).items() if name != MANIFEST),
        "rows": 12,
        "problems": [],
    }
    flip(store / TRAIN, 1)
    harmed = coldtap("verify", store, "--json")
    assert harmed.exit_code == 1
    assert [problem["where"] for problem in json.loads(harmed.stdout)["problems"]] == [TRAIN]


@pytest.mark.parametrize("name", [MANIFEST, "recipe.json"])
def test_a_store_that_cannot_be_opened_at_all_ends_in_one_line_or_a_problem(store, name):
    (store / name).write_bytes(b"rubbish\n")
    result = coldtap("verify", store)
    if name == MANIFEST:
        assert result.exit_code == 6
        assert f"{store / name}, line 1: not `sha256 bytes name`" in error_line(result)
    else:
        assert result.exit_code == 1
        assert "recipe.json" in result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    write_classes(images / "train", 4, "ant", "bee")
    write_classes(images / "val", 2, "ant", "bee")
    store = tmp_path_factory.mktemp("of-folder") / "store"
    cache(images, store)
    return images, store


def test_a_source_that_has_not_changed_is_confirmed(folder):
    images, store = folder
    result = coldtap("verify", store, "--source", images)
    assert result.exit_code == 0
    assert result.stdout.strip().endswith("12 rows checked against its source too: nothing wrong")


def test_an_image_that_has_changed_since_is_named(folder, tmp_path):
    images, store = folder
    now = shutil.copytree(images, tmp_path / "images")
    (now / "val/bee/1.png").write_bytes(encoded(picture(99)))
    (now / "train/ant/0.png").unlink()
    (now / "train/ant/new.png").write_bytes(encoded(picture(98)))
    (now / "train/bee/0.png").write_bytes(b"")
    result = coldtap("verify", store, "--source", now)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert sorted(lines[:-1]) == [
        f"{images}/train/ant/0.png: sample 'train/ant/0.png' is not in the source",
        f"{images}/train/bee/0.png: the image of sample 'train/bee/0.png' has changed since it was cached",
        f"{images}/val/bee/1.png: the image of sample 'val/bee/1.png' has changed since it was cached",
    ]
    assert lines[-1].endswith("3 problems")


# Shards whose index does not fit their bytes, though its checksum holds

N_ENTRIES = 512 * 2  # rows of a block, taps


def with_index(store, change, tail=b""):
    """Write the first shard with another index, and its digest into the manifest."""
    data = (store / TRAIN).read_bytes()
    n_index = N_ENTRIES * 16 + 4
    entries = np.frombuffer(data[-n_index:-4], "<u8").reshape(N_ENTRIES, 2).copy()
    change(entries)
    index = entries.tobytes()
    index += google_crc32c.value(index).to_bytes(4, "little")
    (store / TRAIN).write_bytes(data[:-n_index] + tail + index)
    relist(store, TRAIN)


def overlapping(entries):
    entries[3, 0] -= 8


def swapped(entries):
    entries[[2, 4]] = entries[[4, 2]]


def after_a_gap(entries):
    entries[5:16, 0] += 16


@pytest.mark.parametrize(
    ("change", "tail", "what"),
    [
        (overlapping, b"", f"row 1, tap 2: the shard's index has the chunk at byte {3 * 68 - 8}, before the end of"),
        (
            swapped,
            b"",
            f"row 1, tap 0: the shard's index has the chunk at byte {4 * 68}, after a gap, not at the end of",
        ),
        (after_a_gap, b"\0" * 16, "row 2, tap 2: the shard's index has the chunk at byte 356, after a gap, not at"),
        (lambda entries: None, b"hidden", f"the shard's index leaves bytes {16 * 68} to {16 * 68 + 6} to no chunk"),
    ],
)
def test_an_index_with_gaps_overlaps_or_bytes_of_no_chunk_is_found_out(store, change, tail, what):
    assert (store / TRAIN).stat().st_size == 16 * CHUNK_BYTES + N_ENTRIES * 16 + 4
    with_index(store, change, tail)
    ((where, found),) = problems(store)
    assert where == TRAIN
    assert found.startswith(what)


def test_a_manifest_that_lies_about_a_taps_bytes_is_found_out(of_format_1):
    store = of_format_1
    line = line_of(store, f"{OLD_TRAIN}#2")
    digest, n_bytes, name = line.split(" ")
    relabelled(store, line, f"{digest} {int(n_bytes) + 1} {name}")
    assert problems(store) == [(name, f"the tap has {n_bytes} bytes; the manifest says {int(n_bytes) + 1}")]


@pytest.mark.parametrize("name", [f"{OLD_TRAIN}#7", f"{OLD_TRAIN}#", "recipe.json#0", f"{OLD}/c/9/0/0/0#0"])
def test_a_manifest_with_a_tap_that_is_not_there_is_found_out(of_format_1, name):
    store = of_format_1
    line = line_of(store, f"{OLD_TRAIN}#2")
    relabelled(store, line, line, f"{'0' * 64} 5 {name}")
    assert problems(store) == [(name, "the manifest lists a tap that is not there")]


def test_a_line_of_a_tap_has_no_place_where_there_are_lists_of_digests(store):
    line = line_of(store, TRAIN)
    relabelled(store, line, line, f"{'0' * 64} 5 {TRAIN}#2")
    assert problems(store) == [(f"{TRAIN}#2", "the manifest lists a tap that is not there")]


def test_the_bytes_that_are_read_are_told(store):
    begun, done = [], []
    found = verify_store(store, begin=begun.append, advance=done.append)
    assert begun == [found.n_bytes]
    assert sum(done) == found.n_bytes


# Codes, and what they do not hold

ESCAPES = "escapes/layers/g2x3-p1-c8"
OLD_ESCAPES = "features.zarr/escapes/layers/g2x2-p1-c6"


@pytest.fixture
def coded(tmp_path):
    values = np.random.default_rng(0).standard_normal((20, 2, 7, 8)).astype(np.float32)
    values[[1, 5, 8], 1, 3, 2] = 1e4
    synthetic_store(
        tmp_path / "coded",
        values,
        [0] * 20,
        ["train"] * 20,
        tier="int8",
        layout="compact",
        gathers={"layers": [0, 1]},
        block_rows=4,
        scaling={"layers/g2x3-p1-c8": Scaling(scale=np.full((2, 8), 0.1, "f4"), offset=np.zeros((2, 8), "f4"))},
    )
    assert problems(tmp_path / "coded") == []
    return tmp_path / "coded"


@pytest.fixture
def coded_of_format_1(tmp_path):
    return shutil.copytree(FIXTURES / "int8-compact", tmp_path / "old")


def rewrite_list(store, change):
    """Change the positions of the first list of escapes, and what its checksum and the manifest say of it."""
    name = min(name for name in files(store) if name.startswith(f"{OLD_ESCAPES}/position/c/"))
    frame = decompress((store / name).read_bytes()[:-4], CHUNK * 4 * 4)
    position = np.frombuffer(frame, "<u4").reshape(CHUNK, 4).copy()
    change(position)
    frame = compress(position)
    (store / name).write_bytes(frame + checksum(frame))
    relist(store, name)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_an_escape_of_format_1_that_points_outside_its_block_is_found_out(coded_of_format_1, axis):
    def far(position):
        position[0, axis] = 1000

    rewrite_list(coded_of_format_1, far)
    ((where, what),) = problems(coded_of_format_1)
    assert where == OLD_ESCAPES
    assert "has an escape outside its rows" in what


def words_of(data):
    """Counts (row, tap) of the first block with escapes, and the words behind them."""
    words = np.frombuffer(data, "<u4").copy()
    return words[: 4 * 2], words[4 * 2 :]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda counts, rest: rest.__setitem__(0, 7 * 8), "outside the tokens and channels of its tap"),
        (lambda counts, rest: counts.__setitem__(0, counts[0] + 1), "are not 8 counts and as many escapes as they say"),
        (lambda counts, rest: rest.__setitem__(-1, 0), "not the digests of the segments"),
        (lambda counts, rest: counts.__setitem__(slice(None), counts[::-1].copy()), "not the digests of the segments"),
    ],
)
def test_escapes_that_are_no_segments_or_others_are_found_out(coded, change, what):
    name = min(name for name in files(coded) if name.startswith(f"{ESCAPES}/"))
    counts, rest = words_of((coded / name).read_bytes())
    change(counts, rest)
    (coded / name).write_bytes(counts.tobytes() + rest.tobytes())
    relist(coded, name)
    ((where, found),) = problems(coded)
    assert where in (name, f"digests/{name}")
    assert what in found


def test_escapes_without_a_list_of_digests_are_found_out(coded):
    name = min(name for name in files(coded) if name.startswith(f"digests/{ESCAPES}/"))
    unlisted(coded, name)
    (coded / name).unlink()
    assert (name, "the manifest does not list these digests") in problems(coded)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("position", "shape", [5, 2 * 16384, 4]),
        ("value", "data_type", "float64"),
        ("value", "fill_value", 0.0),
        ("position", "attributes", {"of": "sum/x", "axes": []}),
        ("value", "codecs", [{"name": "bytes"}]),
    ],
)
def test_metadata_of_escapes_that_does_not_fit_their_lists_is_found_out(coded_of_format_1, part, key, value):
    coded, name = coded_of_format_1, f"{OLD_ESCAPES}/{part}/zarr.json"
    metadata = json.loads((coded / name).read_text())
    (coded / name).write_text(json.dumps({**metadata, key: value}))
    relist(coded, name)
    assert (name, f"{key}: not what the lists of this store need") in problems(coded)


def test_every_byte_of_an_int8_store_counts(coded):
    for number, (name, data) in enumerate(files(coded).items()):
        if name.startswith(MANIFEST):  # and its parts
            continue
        flip(coded / name, (number * 7919) % len(data))
        assert problems(coded), name
        (coded / name).write_bytes(data)


def test_the_command_shows_how_far_it_is(store, monkeypatch):
    monkeypatch.setattr("coldtap.cli.progress.PLAIN_LINE_EVERY_S", 0.0)
    result = coldtap("verify", store)
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    total = sum(len(data) for name, data in files(store).items() if name != MANIFEST)
    assert len(lines) == len(files(store)) - 1
    assert lines[-1].startswith(f"{show_bytes(total)} of {show_bytes(total)}  ")
    assert lines[-1].endswith("/s  0 s left")


@pytest.mark.parametrize("target", ["nowhere", "samples.parquet"])
def test_a_link_that_leads_nowhere_is_a_problem(store, target):
    """As git-annex leaves them; the second points to itself."""
    (store / "samples.parquet").unlink()
    (store / "samples.parquet").symlink_to(target)
    assert any(where == "samples.parquet" and "cannot be read" in what for where, what in problems(store))
