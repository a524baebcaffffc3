"""`convert` goes between tiers and layouts, keeps what it can, states what it adds, and resumes like any job."""

import itertools
import json
import shutil
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from coldtap.errors import CorruptStoreError, MachineError, OptionError, RecipeMismatchError, StoreError
from coldtap.stores import open_store
from coldtap.stores.convert.convert import convert_store
from coldtap.stores.format import arrays
from coldtap.stores.format.codes import bound_of
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.manifest import MANIFEST
from coldtap.stores.storage.lock import StoreLock
from coldtap.stores.verify.verify import verify_store
from tests.helpers.jobs import cache, coldtap, error_line, files, in_memory, read
from tests.helpers.synthetic import GEOMETRY, synthetic_store

ENCODINGS = [("float32", "fast"), ("float16", "fast"), ("bfloat16", "fast"), ("int8", "fast"), ("int8", "compact")]
PAIRS = [pair for pair in itertools.product(ENCODINGS, ENCODINGS) if pair[0] != pair[1]]
SPLITS = ["train"] * 20 + ["val"] * 9 + ["test"] * 11
REJECTED = [3, 22, 39]
LAYERS, SUM, POOLED = "layers/g2x3-p1-c8", "sum/g2x3-p1-c8/3", "pooled/g2x3-p1-c8"
TIER_OF_POOLED = {"int8": "float16"}


@pytest.fixture(scope="module")
def features():
    """Two views of ordinary values, a channel of large values, and single massive ones that codes cannot hold."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 40, 4, GEOMETRY.tokens, GEOMETRY.channels)).astype(np.float32)
    values[:, :, 2, :, 5] *= 30
    values[1, rng.integers(0, 40, 9), rng.integers(0, 4, 9), rng.integers(0, 7, 9), rng.integers(0, 8, 9)] *= 200
    return values


def made(path, features, tier="float16", layout="fast", **how):
    targets = [i % 3 for i in range(40)]
    asked = {"views": 1, "rejected": REJECTED, "class_names": ("a", "b", "c"), **how}
    synthetic_store(path, features, targets, SPLITS, tier=tier, layout=layout, **asked)
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory, features):
    """A store of each tier and layout, in blocks of other sizes than a new one has."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        encoding: made(folder / "-".join(encoding), features, *encoding, block_rows=4 if encoding[0] != "int8" else 16)
        for encoding in ENCODINGS
    }


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(arrays, "MAX_BLOCK_ROWS", 8)


def all_rows(store):
    return np.concatenate([store.rows(segment.split, segment.view) for segment in store.segments])


def values_of(path, name):
    store = open_store(path)
    return read(store.arrays[name], all_rows(store))


def columns(path, name):
    table = pq.read_table(path / name)
    return {column: table[column].to_pylist() for column in table.column_names if column != "row"}


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=lambda encoding: "-".join(encoding))
def test_every_tier_and_layout_becomes_every_other(tmp_path, stores, small_blocks, old, new):
    report = convert_store(stores[old], tmp_path / "new", tier=new[0], layout=new[1])
    assert (report.status, report.n_rows, report.n_rejected) == ("written", 56, 4)
    assert verify_store(tmp_path / "new").problems == ()
    before, after = open_store(stores[old]), open_store(tmp_path / "new")
    assert after.recipe.encoding.block_rows == 8
    assert (after.recipe.extractor, after.recipe.rows) == (before.recipe.extractor, before.recipe.rows)
    for table in ("samples.parquet", "rejected.parquet"):
        assert columns(tmp_path / "new", table) == columns(stores[old], table)
    targets = "targets/label.parquet"
    assert (tmp_path / "new" / targets).read_bytes() == (stores[old] / targets).read_bytes()
    np.testing.assert_array_equal(after.norm.weight, before.norm.weight)
    assert after.recorded["converted_from"]["digest"] == before.digest
    for name in (LAYERS, SUM, POOLED):
        require_kept(old, new, name, values_of(stores[old], name), tmp_path / "new")


def require_kept(old, new, name, before, path):
    """What a tier promises against the values that it was given."""
    array, after = open_store(path).arrays[name], values_of(path, name)
    if array.spec.tier == "int8" and old[0] != "int8":
        error = np.abs(after.astype(float) - before).reshape(len(before), len(array.taps), -1, 8)
        assert (error <= bound_of(array.numbers.scaling)[:, None]).all()
    elif array.spec.tier in ("int8", "float32"):
        np.testing.assert_array_equal(after, before)
    elif array.spec.tier == "float16":
        scale = np.exp2(np.array(array.numbers.exponents, np.float32))[:, None, None]
        scale = scale[0] if name == SUM else scale
        np.testing.assert_array_equal(after, (before / scale).astype(np.float16) * scale)
    else:
        np.testing.assert_allclose(after, before, rtol=2**-8)


def test_ranges_are_those_of_the_features(tmp_path, features, small_blocks):
    ranges = {LAYERS: [[-3.5, 4.25]] * 4}
    old = made(tmp_path / "old", features, block_rows=4, ranges=ranges)
    convert_store(old, tmp_path / "new", tier="int8")
    line = json.loads((tmp_path / "new/journal/00000000.json").read_text())
    assert line["ranges"] == ranges
    assert line["environment"]["converted_from"] == open_store(old).digest


def test_a_change_of_layout_and_back_ends_in_the_same_bytes(tmp_path, features):
    fast = made(tmp_path / "fast", features, "int8", "fast")
    assert convert_store(fast, tmp_path / "compact", tier="int8", layout="compact").exact
    assert convert_store(tmp_path / "compact", tmp_path / "back", tier="int8", layout="fast").exact
    assert files(tmp_path / "back/features.zarr") == files(fast / "features.zarr")
    assert files(tmp_path / "back/escapes") == files(fast / "escapes")
    compact = made(tmp_path / "direct", features, "int8", "compact")
    assert files(tmp_path / "compact/features.zarr") == files(compact / "features.zarr")
    assert files(tmp_path / "compact/escapes") == files(compact / "escapes") != {}


def test_the_same_bound_keeps_the_codes_and_another_one_makes_new_ones(tmp_path, stores):
    old = stores["int8", "fast"]
    same = convert_store(old, tmp_path / "same", tier="int8", layout="compact", snr=30)
    assert (same.exact, same.added_errors, same.together) == (True, {}, None)
    other = convert_store(old, tmp_path / "other", tier="int8", layout="compact", snr=20)
    assert (other.exact, other.bound, other.source_bound) == (
        False,
        "20 dB in every channel",
        "30 dB in every channel",
    )
    assert other.together == "about 19.6 dB in every channel"
    error = np.abs(values_of(tmp_path / "other", LAYERS).astype(float) - values_of(old, LAYERS))
    bound = bound_of(open_store(tmp_path / "other").arrays[LAYERS].numbers.scaling)[:, None]
    assert (error <= bound).all()
    assert error.max() > 0


def test_the_added_error_is_measured_a_tap_and_recorded(tmp_path, features):
    old = made(tmp_path / "old", features, "float32", views=0, rejected=())
    report = convert_store(old, tmp_path / "new", tier="int8", snr=25)
    assert [about["tap"] for about in report.added_errors[LAYERS]] == [0, 1, 2, 3]
    for about in report.added_errors[LAYERS]:
        for part in ("patch", "prefix"):
            assert 20 < about[part]["worst_snr_db"] <= about[part]["median_snr_db"] < 40
        assert about["largest_error_of_step"] <= 0.5
    recorded = open_store(tmp_path / "new").recorded
    assert [{"tap": tap, **about} for tap, about in enumerate(recorded["errors"][LAYERS])] == report.added_errors[
        LAYERS
    ]
    assert recorded["converted_from"]["tier"] == "float32"
    assert {key: recorded[key] for key in ("model", "source")} == {"model": "synthetic", "source": "memory"}
    again = convert_store(old, tmp_path / "new", tier="int8", snr=25)
    assert (again.status, again.added_errors) == ("unchanged", report.added_errors)


def test_a_chain_of_conversions_is_recorded(tmp_path, features):
    made(tmp_path / "a", features, "float32")
    for old, new, tier, snr in (("a", "b", "float16", None), ("b", "c", "int8", 25), ("c", "d", "float32", None)):
        convert_store(tmp_path / old, tmp_path / new, tier=tier, snr=snr)
    origin = open_store(tmp_path / "d").recorded["converted_from"]
    assert (origin["tier"], origin["scales"]["snr_db"]) == ("int8", 25)
    assert origin["errors"] == open_store(tmp_path / "c").recorded["errors"]
    assert origin["converted_from"]["converted_from"]["digest"] == open_store(tmp_path / "a").digest


def test_stores_of_several_geometries_are_converted(tmp_path):
    geometries = {
        0: Geometry(grid=(4, 4), prefix_tokens=0, channels=8),
        1: Geometry(grid=(2, 8), prefix_tokens=0, channels=8),
    }
    values = np.random.default_rng(0).standard_normal((30, 2, 16, 8)).astype(np.float32)
    how = {"geometries": geometries, "gathers": {"layers": [0, 1], "pooled": [0, 1]}}
    synthetic_store(tmp_path / "old", values, [0] * 30, ["train"] * 20 + ["test"] * 10, tier="float16", **how)
    convert_store(tmp_path / "old", tmp_path / "new", tier="int8")
    assert verify_store(tmp_path / "new").problems == ()
    for name, array in open_store(tmp_path / "new").arrays.items():
        before, after = values_of(tmp_path / "old", name), values_of(tmp_path / "new", name)
        if array.spec.tier == "int8":
            assert (np.abs(after.astype(float) - before) <= bound_of(array.numbers.scaling)[:, None]).all()
        else:
            np.testing.assert_array_equal(after, before)


def test_rows_that_float16_cannot_keep_are_rejected_and_said(tmp_path, features):
    huge = features.copy()
    huge[1, 7, 2, 3, 1] = 1e9  # not in the rows that set the exponents
    old = made(tmp_path / "old", huge, "float32")
    result = coldtap("convert", old, tmp_path / "new", "--tier", "float16")
    assert result.exit_code == 0
    assert "1 rows of" in result.stdout
    assert "overflow float16" in result.stdout
    table = pq.read_table(tmp_path / "new/rejected.parquet").to_pylist()
    (line,) = [line for line in table if line["reason"] != "made so"]
    assert (line["sample_id"], line["view"], line["tap"]) == ("sample-007", 1, 2)
    assert line["reason"] == "1e+09 in layers at tap 2 overflows the float16 tier"
    assert verify_store(tmp_path / "new").problems == ()


@pytest.mark.parametrize(("tier", "layout"), ENCODINGS[1:])
def test_a_converted_store_is_that_of_a_direct_extraction(tmp_path, tier, layout):
    source = in_memory(train=12, val=6)
    cache(source, tmp_path / "old", tier="float32", views=1)
    cache(source, tmp_path / "direct", tier=tier, layout=layout, views=1)
    convert_store(tmp_path / "old", tmp_path / "new", tier=tier, layout=layout)
    new, direct = open_store(tmp_path / "new"), open_store(tmp_path / "direct")
    assert new.recipe.address == direct.recipe.address
    assert files(tmp_path / "new/features.zarr") == files(tmp_path / "direct/features.zarr")
    assert (tmp_path / "new/samples.parquet").read_bytes() == (tmp_path / "direct/samples.parquet").read_bytes()
    for name, errors in direct.recorded["errors"].items():
        assert new.recorded["errors"][name] == errors


def test_what_was_codes_once_never_passes_for_exact_features(tmp_path):
    source = in_memory(train=12, val=6)
    cache(source, tmp_path / "codes", tier="int8", snr=12)
    convert_store(tmp_path / "codes", tmp_path / "floats", tier="float32")
    recipe = open_store(tmp_path / "floats").recipe
    assert recipe.encoding.origin["scales"]["snr_db"] == 12
    with pytest.raises(RecipeMismatchError, match=r"encoding\.from: .*int8.* → \(absent\)"):
        cache(source, tmp_path / "floats", tier="float32")
    convert_store(tmp_path / "floats", tmp_path / "again", tier="int8", snr=30)
    assert open_store(tmp_path / "again").recipe.encoding.origin["from"]["tier"] == "int8"
    cache(source, tmp_path / "exact", tier="float32")
    with pytest.raises(RecipeMismatchError, match=r"encoding\.from"):
        convert_store(tmp_path / "exact", tmp_path / "again", tier="int8", snr=30)


def test_nothing_of_the_old_store_is_touched_and_the_new_one_only_once(tmp_path, features):
    old = made(tmp_path / "old", features)
    before = files(old)
    convert_store(old, tmp_path / "new", tier="int8")
    written = files(tmp_path / "new")
    assert convert_store(old, tmp_path / "new", tier="int8").status == "unchanged"
    assert files(old) == before
    assert files(tmp_path / "new") == written


# The command


def test_the_command_says_what_is_ahead_what_was_done_and_what_was_added(tmp_path, stores):
    old, new = stores["int8", "fast"], tmp_path / "new"
    result = coldtap("convert", old, new, "--tier", "int8", "--snr", "20")
    assert result.exit_code == 0
    first, last = result.stderr.splitlines()
    assert first.startswith("forecast: 60 rows, ")
    assert last.startswith("60/60 rows  ")
    assert "rows/s" in last
    lines = result.stdout.splitlines()
    assert lines[0] == f"{new}: 56 rows, 4 rejected (see rejected.parquet); digest {open_store(new).digest}"
    assert lines[1] == f"added error, worst channel against the values of {old} (asked: 20 dB in every channel):"
    assert lines[2] == f"  {LAYERS}"
    assert lines[3].startswith("    tap   0  patch ")
    assert lines[-1] == (
        f"errors add up: those of {old}'s own codes (30 dB in every channel) stay, "
        "about 19.6 dB in every channel together"
    )


@pytest.mark.parametrize(
    ("old", "words", "text"),
    [
        (("int8", "fast"), ["--tier", "int8"], "no error added: codes, scales and escapes are those of the old store"),
        (("float16", "fast"), ["--tier", "float32"], "no error added: every value is that of the old store"),
        (("int8", "compact"), ["--tier", "float32"], "own codes (30 dB in every channel) stay"),
    ],
)
def test_a_conversion_without_loss_says_so(tmp_path, stores, old, words, text):
    assert text in coldtap("convert", stores[old], tmp_path / "new", *words).stdout


def test_the_report_as_json_is_the_whole_of_stdout(tmp_path, stores):
    words = ("convert", stores["float32", "fast"], tmp_path / "new", "--tier", "int8", "--max-error", "0.1", "--json")
    about = json.loads(coldtap(*words).stdout)
    assert (about["status"], about["rows"], about["rejected"], about["exact"]) == ("written", 56, 4, False)
    assert about["bound"] == "every error at most 0.1 standard deviations"
    assert about["added_errors"][LAYERS][1]["patch"]["worst_snr_db"] > 20
    assert json.loads(coldtap(*words).stdout)["status"] == "unchanged"


def test_a_dry_run_forecasts_the_bytes_and_writes_nothing(tmp_path, stores):
    words = ("convert", stores["float32", "fast"], tmp_path / "new", "--tier", "float16")
    dry = json.loads(coldtap(*words, "--dry-run", "--json").stdout)
    assert dry["status"] == "forecast"
    assert not (tmp_path / "new").exists()
    assert "nothing was written" in coldtap(*words, "--dry-run").stdout
    coldtap(*words)
    written = files(tmp_path / "new").items()
    shards = sum(len(data) for name, data in written if "/c/" in name or name.startswith("digests/"))
    assert abs(dry["forecast"]["bytes"] - 250 * 60 - shards) < 0.1 * shards


# What cannot be done


@pytest.fixture(scope="module")
def refusing(tmp_path_factory, features):
    """A folder with what cannot be converted, or not there; every test leaves it as it is."""
    folder = tmp_path_factory.mktemp("refusing")
    made(folder / "parent/old", features)
    made(folder / "other", features, "float32")
    (folder / "foreign").mkdir()
    (folder / "foreign/notes.txt").touch()
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{none}", "{new}", "--tier", "int8"], 5, "there is no store at {none}"),
        (["{old}", "{old}", "--tier", "int8"], 2, "is, lies in or holds"),
        (["{old}", "{old}/inside", "--tier", "int8"], 2, "is, lies in or holds"),
        (["{old}", "{parent}", "--tier", "int8"], 2, "is, lies in or holds"),
        (["{old}", "{new}", "--tier", "float64"], 2, "--tier float64: choose one of"),
        (["{old}", "{new}", "--tier", "int8", "--layout", "small"], 2, "--layout small: choose one of fast, compact"),
        (["{old}", "{new}", "--tier", "float32", "--snr", "30"], 2, "--tier float32 was asked for"),
        (["{old}", "{new}", "--tier", "float32", "--layout", "compact"], 2, "--layout compact with --tier float32"),
        (["{old}", "{new}", "--tier", "int8", "--snr", "30", "--max-error", "1"], 2, "one of the two"),
        (["{old}", "{new}", "--tier", "int8", "--snr", "90"], 2, "int8 reaches"),
        (["{old}", "{new}", "--tier", "float16"], 2, "is of tier float16 in layout fast already"),
        (["{old}", "{other}", "--tier", "int8"], 5, "encoding.tier: float32 → int8"),
        (["{old}", "{foreign}", "--tier", "int8"], 5, "no store"),
        (["{old}", "{file}", "--tier", "int8"], 5, "is a file"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(refusing, words, code, message):
    names = {name: refusing / name for name in ("none", "new", "other", "foreign", "file", "parent")}
    names["old"] = refusing / "parent/old"
    before = files(refusing)
    result = coldtap("convert", *(word.format(**names) for word in words))
    assert result.exit_code == code, result.stderr
    assert message.format(**names) in error_line(result)
    assert files(refusing) == before


def test_an_incomplete_store_cannot_be_converted(tmp_path, features):
    old = made(tmp_path / "old", features, finish=False)
    result = coldtap("convert", old, tmp_path / "new", "--tier", "int8")
    assert result.exit_code == 6
    assert f"{old} is incomplete" in error_line(result)


def test_a_store_that_is_being_written_is_left_alone(tmp_path, stores):
    (tmp_path / "new").mkdir()
    with StoreLock(tmp_path / "new"):
        result = coldtap("convert", stores["float32", "fast"], tmp_path / "new", "--tier", "int8")
    assert result.exit_code == 5
    assert "is being written by process" in error_line(result)


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, stores, monkeypatch):
    nothing = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nothing)
    with pytest.raises(MachineError, match=r"needs 0\.\d+ MB and 0\.000 MB are free there"):
        convert_store(stores["float32", "fast"], tmp_path / "new", tier="int8")
    assert not (tmp_path / "new").exists()


def damaged(path, block):
    (shard,) = (path / "features.zarr" / LAYERS / "c" / str(block)).rglob("0/0/0")
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)


def test_a_damaged_chunk_is_named_and_finished_blocks_stay(tmp_path, features, small_blocks):
    old = made(tmp_path / "old", features)
    whole = shutil.copytree(old, tmp_path / "whole")
    damaged(old, 6)
    with pytest.raises(CorruptStoreError, match="row 48, tap 0") as caught:
        convert_store(old, tmp_path / "new", tier="int8")
    message = str(caught.value)
    assert message.startswith(f"{old}/features.zarr/{LAYERS}/c/6")
    assert "row 48, tap 0" in message
    there = len(list((tmp_path / "new/journal").glob("*.json")))
    assert there >= 1
    assert f"{there} of 10 blocks of {tmp_path / 'new'} are there and stay" in message
    shutil.rmtree(old)
    shutil.move(whole, old)
    convert_store(old, tmp_path / "new", tier="int8")
    convert_store(old, tmp_path / "undisturbed", tier="int8")
    assert files(tmp_path / "new") == files(tmp_path / "undisturbed")


def begun(path, old):
    """A conversion that was stopped after its first block."""
    convert_store(old, path, tier="int8")
    (path / MANIFEST).unlink()
    for line in sorted((path / "journal").glob("*.json"))[1:]:
        line.unlink()


def test_a_conversion_is_only_gone_on_with_from_the_same_store(tmp_path, features, stores):
    old = stores["float16", "fast"]
    begun(tmp_path / "new", old)
    another = made(tmp_path / "another", features + 1)
    with pytest.raises(StoreError, match="was begun from another store"):
        convert_store(another, tmp_path / "new", tier="int8")
    with pytest.raises(RecipeMismatchError, match=r"encoding\.scales\.snr_db: 30.* → 25"):
        convert_store(old, tmp_path / "new", tier="int8", snr=25)
    assert convert_store(old, tmp_path / "new", tier="int8").status == "written"


def test_a_store_that_was_begun_by_extraction_is_not_gone_on_with(tmp_path):
    source = in_memory(train=8, val=4)
    cache(source, tmp_path / "old", tier="float32")
    cache(source, tmp_path / "new", tier="float16")
    (tmp_path / "new" / MANIFEST).unlink()
    with pytest.raises(StoreError, match="was begun by `cache-features`"):
        convert_store(tmp_path / "old", tmp_path / "new", tier="float16")


def test_an_unfinished_conversion_is_not_gone_on_with_by_extraction(tmp_path):
    source = in_memory(train=8, val=4)
    cache(source, tmp_path / "old", tier="float32")
    begun(tmp_path / "new", tmp_path / "old")
    with pytest.raises(StoreError, match="was begun by `coldtap convert`"):
        cache(source, tmp_path / "new", tier="int8")


def test_a_store_whose_rows_were_all_rejected_is_refused(tmp_path, features):
    made(tmp_path / "old", features, rejected=range(40))
    with pytest.raises(StoreError, match="has no rows: all were rejected"):
        convert_store(tmp_path / "old", tmp_path / "new", tier="int8")


def test_another_layout_of_a_float_tier_is_no_conversion(tmp_path, features):
    made(tmp_path / "old", features, "float32")
    with pytest.raises(OptionError, match="copy the folder"):
        convert_store(tmp_path / "old", tmp_path / "new", tier="float32")


# Deaths

N_BLOCKS = 18  # train and 15 more views of it, val and test


@pytest.fixture(scope="module")
def many_blocks(tmp_path_factory, features):
    old = tmp_path_factory.mktemp("many") / "old"
    made(old, np.concatenate([features] * 8), views=15)
    return old


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, many_blocks):
    new = tmp_path_factory.mktemp("undisturbed") / "new"
    convert_store(many_blocks, new, tier="int8")
    assert len(finished(new)) == N_BLOCKS
    return files(new)


def finished(store):
    return {path.name for path in (store / "journal").glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "recipe-written",
        "array-created:5",
        "arrays-created",
        "shard-temporary:30",
        "escapes-renamed:5",
        "shard-renamed:31",
        "digests-renamed:30",
        "journal-written:9",
        "index-written",
    ],
)
def test_a_killed_conversion_ends_in_the_bytes_of_an_undisturbed_one(tmp_path, server, many_blocks, undisturbed, fault):
    words = ("convert", many_blocks, tmp_path / "new", "--tier", "int8")
    job = server.start(*words, fault=fault)
    assert job.wait() == -signal.SIGKILL, job.err
    assert not (tmp_path / "new" / MANIFEST).exists()
    again = server.start(*words)
    assert again.wait() == 0, again.err
    assert files(tmp_path / "new") == undisturbed
    if ":" in fault:
        assert f"of {N_BLOCKS} blocks are there" in again.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_conversion_cleanly(tmp_path, server, many_blocks, undisturbed, number, code):
    new = tmp_path / "new"
    words = ("convert", many_blocks, new, "--tier", "int8")
    job = server.start(*words)
    while not finished(new):
        assert not job.has_ended(), job.err
        time.sleep(0.001)
    job.send(signal.SIGSTOP)  # so that it cannot be done before the signal comes
    job.send(number)
    job.send(signal.SIGCONT)
    assert job.wait() == code, job.err
    there = f"{len(finished(new))} of {N_BLOCKS} blocks of {new} are there and stay"
    assert job.err.splitlines()[-1] == f"error: stopped: {there}; run the same command to go on"
    assert server.start(*words).wait() == 0
    assert files(new) == undisturbed


@pytest.mark.slow
def test_a_full_disk_stops_a_conversion_and_what_is_there_stays(tmp_path, server, many_blocks, undisturbed):
    words = ("convert", many_blocks, tmp_path / "new", "--tier", "int8")
    job = server.start(*words, file_bytes=9000)
    assert job.wait() == 7, job.err
    assert "the file-size limit of this process is reached" in job.err
    assert server.start(*words).wait() == 0
    assert files(tmp_path / "new") == undisturbed
