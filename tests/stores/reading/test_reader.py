"""The reader among threads, forks and limits: what it gives is right, what it holds open is bounded."""

import gc
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from coldtap.errors import CorruptStoreError, MachineError, MissingFeaturesError, StoreError
from coldtap.stores import open_store
from coldtap.stores.format.codes import Scaling
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.reading import escape_reader, shard_files
from coldtap.stores.verify.verify import verify_store
from tests.helpers.escapes import escapes_of
from tests.helpers.places import ROOT
from tests.helpers.synthetic import GEOMETRY, synthetic_store

KINDS = [("float32", "fast"), ("float16", "fast"), ("bfloat16", "fast"), ("int8", "fast"), ("int8", "compact")]
SPLITS = ["train"] * 21 + ["val"] * 5
TARGETS = [i % 3 for i in range(26)]
N_TAPS, BLOCK_ROWS = 4, 4
LAYERS, SUM, POOLED = f"layers/{GEOMETRY.name}", f"sum/{GEOMETRY.name}/3", f"pooled/{GEOMETRY.name}"
SHARD = f"features.zarr/{LAYERS}/c/{{}}/0/0/0"


def scaling_of(n_taps):
    scale = np.linspace(0.05, 0.1, n_taps * GEOMETRY.channels, dtype=np.float32).reshape(n_taps, -1)
    return Scaling(scale=scale, offset=scale - 1)


def make(path, tier, layout, **options):
    features = np.random.default_rng(0).standard_normal((26, N_TAPS, GEOMETRY.tokens, GEOMETRY.channels), np.float32)
    features[::2, 1, 0, 5] += 100  # escapes
    scaling = {LAYERS: scaling_of(N_TAPS), SUM: scaling_of(1)}
    synthetic_store(
        path, features, TARGETS, SPLITS, tier=tier, layout=layout, scaling=scaling, block_rows=BLOCK_ROWS, **options
    )
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("reader")
    return {kind: make(root / "-".join(kind), *kind) for kind in KINDS}


@pytest.fixture(params=KINDS, ids="-".join)
def path(request, paths):
    return paths[request.param]


@pytest.fixture(params=[("float32", "fast"), ("int8", "compact")], ids="-".join)
def own(request, paths, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(paths[request.param], tmp_path / "own")


def read(array, rows, taps=None):
    shape = array.row_shape if taps is None else (len(taps), *array.row_shape[1:])
    out = np.full((len(rows), *shape), np.nan, np.float32)
    array.read_into(out, rows, taps)
    return out


def all_rows(store):
    return np.concatenate([store.rows("train"), store.rows("val")])


def by_zarr(store, array):
    """Every value of an array, by zarr-python and docs/format.md."""
    root = store.path / "features.zarr"
    stored = zarr.open_array(root / array.name, mode="r")[:]
    tier = array.spec.tier
    if tier == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if tier != "int8":
        return stored.astype(np.float32)
    scale, offset = (zarr.open_array(root / "scales" / array.name / part, mode="r")[:] for part in ("scale", "offset"))
    values = stored.reshape(len(stored), -1, *stored.shape[-2:]).astype(np.float32) * scale[:, None] + offset[:, None]
    values = values.reshape(stored.shape)
    by_tap = values.reshape(len(values), len(array.taps), -1, copy=False)
    for block in range(len(values) // BLOCK_ROWS):
        for row, place, position, value in escapes_of(store.path, array.name, block, BLOCK_ROWS, len(array.taps)):
            by_tap[row, place, position] = value
    return values


def test_any_rows_and_taps_equal_those_of_zarr(path):
    store = open_store(path, threads=3)
    rows = all_rows(store).tolist()
    truth = {name: by_zarr(store, array) for name, array in store.arrays.items()}

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        st.sampled_from(sorted(truth)),
        st.lists(st.sampled_from(rows), max_size=40),
        st.none() | st.lists(st.integers(0, N_TAPS - 1), max_size=6),
    )
    def holds(name, wanted, taps):
        array = store.arrays[name]
        taps = None if name == SUM else taps
        expected = truth[name][wanted] if taps is None else truth[name][wanted][:, taps]
        np.testing.assert_array_equal(read(array, wanted, taps), expected)
        codes = np.zeros(expected.shape, array.spec.dtype)
        exceptions = array.read_stored_into(codes, wanted, taps)
        np.testing.assert_array_equal(expected.reshape(-1)[exceptions.position], exceptions.value)

    holds()


@pytest.mark.parametrize("order", ["morton", "colexicographic", "tensorstore", "shuffled"])
@pytest.mark.parametrize("kind", [("float32", "fast"), ("int8", "fast"), ("int8", "compact")], ids="-".join)
def test_shards_of_other_writers_are_read_by_their_index(paths, tmp_path, kind, order):
    """Chunks that are not where coldtap puts them."""
    path = shutil.copytree(paths[kind], tmp_path / "s")
    store = open_store(path)
    rows = all_rows(store)
    truth = {name: read(store.arrays[name], rows) for name in (LAYERS, SUM)}
    before = {name: (path / "features.zarr" / store.arrays[name].spec.shard_key(1)).read_bytes() for name in truth}
    for name in truth:
        if order == "shuffled":
            shuffle(path, store.arrays[name])
        else:
            write_again(path / "features.zarr" / name, tmp_path / "other" / name, order)
    changed = open_store(path)
    moved = 0
    for name, expected in truth.items():
        array = changed.arrays[name]
        np.testing.assert_array_equal(read(array, rows), expected)
        np.testing.assert_array_equal(read(array, rows[::-1]), expected[::-1])
        if name == LAYERS:
            for taps in ([2], [3, 0], [0, 1], [1, 2, 3]):
                np.testing.assert_array_equal(read(array, rows, taps), expected[:, taps])
        np.testing.assert_array_equal(read(array, rows), expected)  # now all checksums are known
        moved += (path / "features.zarr" / array.spec.shard_key(1)).read_bytes() != before[name]
    assert moved or order == "tensorstore"


def write_again(array, other, order):
    """The same numbers in shards that zarr-python or TensorStore lays out as it likes."""
    shutil.copytree(array, other, ignore=lambda folder, names: {"c"} & {*names})
    values = zarr.open_array(array, mode="r")[:]
    if order == "tensorstore":
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(other)}}
        tensorstore.open(spec, open=True).result().write(values).result()
    else:
        about = json.loads((other / "zarr.json").read_text())
        codecs = about["codecs"][0]["configuration"]["codecs"]
        compressed = [ZstdCodec(level=3)] if any(codec["name"] == "zstd" for codec in codecs) else []
        fresh = zarr.create_array(
            other.with_name("fresh"),
            shape=about["shape"],
            chunks=about["chunk_grid"]["configuration"]["chunk_shape"],
            dtype=values.dtype,
            serializer=ShardingCodec(
                chunk_shape=about["codecs"][0]["configuration"]["chunk_shape"],
                codecs=[BytesCodec(endian="little"), *compressed, Crc32cCodec()],
                subchunk_write_order=order,
            ),
            compressors=None,
            filters=None,
            fill_value=about["fill_value"],
        )
        fresh[:] = values
        shutil.copytree(other.with_name("fresh") / "c", other / "c")
    shutil.rmtree(array / "c")
    shutil.copytree(other / "c", array / "c")


def shuffle(path, array):
    """Chunks in any order, with gaps between them."""
    rng = np.random.default_rng(0)
    for shard in (path / "features.zarr" / array.name / "c").rglob("*"):
        if shard.is_dir():
            continue
        data = shard.read_bytes()
        n_index = BLOCK_ROWS * array.spec.chunks_per_row * 16 + 4
        entries = np.frombuffer(data[-n_index:-4], "<u8").reshape(-1, 2).copy()
        pieces, at = [], 0
        for i in rng.permutation(len(entries)):
            offset, length = map(int, entries[i])
            if offset != 2**64 - 1:
                gap = bytes(rng.integers(0, 9))
                entries[i, 0] = at + len(gap)
                pieces += gap, data[offset : offset + length]
                at += len(gap) + length
        index = entries.tobytes()
        pieces += index, google_crc32c.value(index).to_bytes(4, "little")
        shard.write_bytes(b"".join(pieces))


@pytest.mark.parametrize("name", [LAYERS, SUM, POOLED])
def test_a_buffer_that_does_not_fit_is_refused(path, name):
    store = open_store(path)
    array, rows = store.arrays[name], all_rows(store)[:4]
    shape = (4, *array.row_shape)
    locked = np.zeros(shape, np.float32)
    locked.flags.writeable = False
    for out in (
        np.zeros((3, *array.row_shape), np.float32),
        np.zeros((*shape, 1), np.float32),
        np.zeros(shape, np.float64),
        np.zeros(shape, ">f4"),
        np.zeros((8, *array.row_shape), np.float32)[::2],
        np.asfortranarray(np.zeros(shape, np.float32)),
        locked,
    ):
        with pytest.raises(ValueError, match=r"out is .*; expected contiguous, writable float32"):
            array.read_into(out, rows)
    with pytest.raises(ValueError, match="expected contiguous, writable"):
        array.read_stored_into(np.zeros(shape, np.float64), rows)


def test_nothing_asked_is_nothing_read(path):
    store = open_store(path)
    for name, array in store.arrays.items():
        assert read(array, []).shape == (0, *array.row_shape)
        if name != SUM:
            assert read(array, store.rows("val"), []).shape == (5, 0, *array.row_shape[1:])
        assert len(array.read_stored_into(np.empty((0, *array.row_shape), array.spec.dtype), []).value) == 0


def test_what_is_not_there_is_named_with_its_store(path):
    store = open_store(path)
    array = store.arrays[LAYERS]
    for rows, taps, what in (([-1], None, "row -1"), ([999], None, "row 999"), ([0], [9], "no tap 9")):
        with pytest.raises(MissingFeaturesError, match=what) as error:
            array.read_into(np.empty((1, *array.row_shape), np.float32), rows, taps)
        assert str(path) in str(error.value)
        assert LAYERS in str(error.value)
    with pytest.raises(ValueError, match="is one sum"):
        store.arrays[SUM].read_into(np.empty((1, *store.arrays[SUM].row_shape), np.float32), [0], [3, 3])


def test_an_error_names_store_array_row_and_tap(own):
    store = open_store(own)
    array, first = store.arrays[LAYERS], store.rows("val")[0]
    shard = own / SHARD.format(first // BLOCK_ROWS)
    offsets = np.frombuffer(shard.read_bytes()[-(BLOCK_ROWS * N_TAPS * 16 + 4) : -4], "<u8").reshape(-1, N_TAPS, 2)
    data = bytearray(shard.read_bytes())
    data[int(offsets[1, 2, 0]) + 7] ^= 1
    shard.write_bytes(data)
    read(array, [first, first + 2])
    read(array, [first + 1], [0, 1, 3])
    with pytest.raises(CorruptStoreError, match="the chunk's checksum does not hold") as error:
        read(array, store.rows("val"))
    for part in (str(own), LAYERS, f"row {first + 1}", "tap 2"):
        assert part in str(error.value)


def test_damaged_escapes_are_named_with_store_array_and_block(paths, tmp_path):
    own = shutil.copytree(paths["int8", "fast"], tmp_path / "own")
    (chunk, *_) = sorted((own / "escapes" / LAYERS).iterdir())
    data = bytearray(chunk.read_bytes())
    data[9] ^= 1
    chunk.write_bytes(data)
    store = open_store(own)
    with pytest.raises(CorruptStoreError, match="not what the manifest says") as error:
        read(store.arrays[LAYERS], all_rows(store))
    assert str(chunk) in str(error.value)


@pytest.mark.parametrize("left", [0, 100, 0.5, -1, -70])
def test_a_shard_that_is_cut_after_it_was_opened_is_an_error(own, left):
    """Not a SIGBUS and not zeros, whether its checksums were seen to hold before or not."""
    store = open_store(own)
    array = store.arrays[LAYERS]
    seen = store.rows("train")[:BLOCK_ROWS]
    expected = read(array, seen)
    shard = own / SHARD.format(0)
    whole = shard.read_bytes()
    size = int(len(whole) * left) if isinstance(left, float) else left if left >= 0 else len(whole) + left
    os.truncate(shard, size)
    for row in seen:
        with pytest.raises(CorruptStoreError, match=re.escape(str(shard))) as error:
            read(array, [row])
        assert str(shard) in str(error.value)
    shard.write_bytes(whole)
    np.testing.assert_array_equal(read(open_store(own).arrays[LAYERS], seen), expected)


def test_a_shard_that_is_replaced_is_read_by_its_own_index(own, monkeypatch):
    """An index and its checked chunks are those of one file."""
    monkeypatch.setattr(shard_files, "MAX_OPEN_FILES", 1)
    store = open_store(own)
    array = store.arrays[LAYERS]
    expected = codes_of(array, range(4))
    other = backwards((own / SHARD.format(0)).read_bytes())
    (own / "copy").write_bytes(other)
    os.replace(own / "copy", own / SHARD.format(0))
    codes_of(array, [8])  # the first shard is closed
    np.testing.assert_array_equal(codes_of(array, range(4)), expected)
    (own / "copy").write_bytes(other[:3] + bytes([other[3] ^ 1]) + other[4:])
    os.replace(own / "copy", own / SHARD.format(0))
    codes_of(array, [8])
    with pytest.raises(CorruptStoreError, match="checksum does not hold"):
        codes_of(array, range(4))


def backwards(data):
    """The same chunks in a shard that begins with the last of them."""
    n_index = BLOCK_ROWS * N_TAPS * 16 + 4
    entries = np.frombuffer(data[-n_index:-4], "<u8").reshape(-1, 2).copy()
    payload = b""
    for number in reversed(range(len(entries))):
        at, n = entries[number].tolist()
        entries[number, 0] = len(payload)
        payload += data[at : at + n]
    index = entries.tobytes()
    return payload + index + google_crc32c.value(index).to_bytes(4, "little")


def codes_of(array, rows):
    """Stored numbers without what escapes."""
    out = np.zeros((len(rows), *array.row_shape), array.spec.dtype)
    array.read_stored_into(out, rows)
    return out


def n_open():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_open_files_and_what_is_cached_are_bounded(path, monkeypatch):
    monkeypatch.setattr(shard_files, "MAX_OPEN_FILES", 3)
    monkeypatch.setattr(shard_files, "MAX_INDEX_BYTES", 2_000)
    monkeypatch.setattr(escape_reader, "MAX_CACHED_BYTES", 1_000)
    store = open_store(path, threads=2)
    rows = all_rows(store)
    truth = {name: by_zarr(store, array) for name, array in store.arrays.items()}
    before = n_open()
    for i in range(3):
        for name, array in store.arrays.items():
            wanted = np.random.default_rng(i).permutation(rows)
            np.testing.assert_array_equal(read(array, wanted), truth[name][wanted])
            array.will_need(wanted)
            # Python's map keeps a descriptor of its own; every reading thread may hold one shard more.
            assert n_open() <= before + 2 * (3 + 2)
    files = store._files
    assert sum(index.memory_bytes for index in files._indexes.values()) == files._index_bytes <= 2_000
    reader = store.arrays[LAYERS].escapes
    if reader is not None:
        assert sum(found.memory_bytes for found in reader._blocks.values()) == reader._n_bytes
        assert reader._n_bytes <= 1_000 or len(reader._blocks) == 1
    del store, array, files, reader
    assert n_open() <= before


def test_a_process_that_may_open_no_more_files_says_so(path):
    code = f"""
import resource, numpy as np
from coldtap.stores import open_store
from coldtap.errors import MachineError
store = open_store({str(path)!r}, threads=1)
array = store.arrays[{LAYERS!r}]
rows = store.rows("train")
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    array.read_into(np.empty((len(rows), *array.row_shape), np.float32), rows)
except MachineError as error:
    print(error)
"""
    assert "too many open files: raise the limit (ulimit -n)" in python(code)
    assert issubclass(MachineError, OSError)


def python(code, **environment):
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_many_threads_read_one_store_and_several(path, monkeypatch):
    monkeypatch.setattr(shard_files, "MAX_OPEN_FILES", 4)
    stores = [open_store(path, threads=n) for n in (1, 2, 4)]
    rows = all_rows(stores[0])
    truth = {name: by_zarr(stores[0], array) for name, array in stores[0].arrays.items()}

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(15):
            store, name = stores[rng.integers(3)], sorted(truth)[rng.integers(3)]
            wanted = rng.choice(rows, 17)
            np.testing.assert_array_equal(read(store.arrays[name], wanted), truth[name][wanted])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))


def in_child(work):
    """The exit status of a forked child that does some work; 1 where it raises, −SIGALRM where it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is what is tested
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_reads_while_its_parent_does(path, monkeypatch):
    monkeypatch.setattr("coldtap.stores.reading.array.LEAST_BYTES_A_THREAD", {"fast": 1, "compact": 1})
    store = open_store(path, threads=4)
    rows = all_rows(store)
    truth = {name: read(array, rows) for name, array in store.arrays.items()}
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            for array in store.arrays.values():
                read(array, np.random.permutation(rows))

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()

    def work():
        for name, array in store.arrays.items():
            np.testing.assert_array_equal(read(array, rows), truth[name])
        assert store.targets(rows).tolist()

    try:
        assert [in_child(work) for _ in range(8)] == [0] * 8
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_child_that_was_forked_while_every_lock_was_held_reads(path):
    store = open_store(path, threads=2)
    rows = all_rows(store)
    truth = {name: read(array, rows) for name, array in store.arrays.items()}
    locks = [store._files._turn, store._threads._turn]
    locks += [array.escapes._turn for array in store.arrays.values() if array.escapes]
    held, done = threading.Event(), threading.Event()

    def hold():
        for lock in locks:
            lock.acquire()
        held.set()
        done.wait()
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def work():
        for name, array in store.arrays.items():
            np.testing.assert_array_equal(read(array, rows), truth[name])

    try:
        assert in_child(work) == 0
    finally:
        done.set()
        thread.join()
    work()


def _sum_in_child(store):
    rows = all_rows(store)
    return {name: float(np.nansum(read(array, rows))) for name, array in store.arrays.items()}


def test_a_store_goes_to_spawned_processes(paths):
    path = paths["int8", "compact"]
    store = open_store(path, threads=2)
    expected = _sum_in_child(store)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_sum_in_child, [store, store]) == [expected] * 2


def test_a_store_that_was_changed_is_not_taken_for_the_one_that_was_sent(own):
    sent = pickle.dumps(open_store(own))
    assert pickle.loads(sent).digest == open_store(own).digest
    manifest = (own / "manifest").read_text().splitlines()
    (own / "manifest").write_text("\n".join(line for line in manifest if "rejected.parquet" not in line) + "\n")
    with pytest.raises(StoreError, match="another store"):
        pickle.loads(sent)


EPOCH = """
import os, resource, sys
import numpy as np
from coldtap.stores import open_store
store = open_store(sys.argv[1], threads=2)
(array,) = store.arrays.values()
rows = store.rows("train")
out = np.empty((64, *array.row_shape), array.spec.dtype)
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (used + limit,) * 2)
store = open_store(sys.argv[1], threads=2)
(array,) = store.arrays.values()
total, order = 0.0, np.random.default_rng(0).permutation(rows)
for start in range(0, len(order), 64):
    array.read_stored_into(out, order[start : start + 64])
    total += float(out.sum(dtype=np.int64))
print(len(rows) * array.bytes_per_row, total)
"""


@pytest.mark.parametrize("layout", ["fast", "compact"])
def test_an_epoch_over_a_store_ten_times_the_limit_stays_under_it(tmp_path, layout):
    """The limit counts maps too: it is set on address space, the only limit on memory that a process can set itself."""
    limit, n_samples = 16_000_000, 1280
    wide = Geometry(grid=(16, 16), prefix_tokens=0, channels=512)
    scaling = Scaling(scale=np.full((1, 512), 0.05, np.float32), offset=np.zeros((1, 512), np.float32))
    one = np.random.default_rng(0).standard_normal((1, 1, 256, 512), np.float32)
    synthetic_store(
        tmp_path / "s",
        np.broadcast_to(one, (n_samples, 1, 256, 512)),
        [0] * n_samples,
        ["train"] * n_samples,
        geometries={0: wide},
        gathers={"layers": [0]},
        tier="int8",
        layout=layout,
        scaling={f"layers/{wide.name}": scaling},
        block_rows=64,
    )
    code = EPOCH.replace("sys.argv[1]", repr(str(tmp_path / "s"))).replace("sys.argv[2]", str(limit))
    n_bytes, total = python(code, MALLOC_ARENA_MAX="1").split()
    assert int(n_bytes) >= 10 * limit
    assert np.isfinite(float(total))
    shutil.rmtree(tmp_path / "s")


def test_readers_find_nothing_to_verify_wrong(path):
    """Reading leaves no trace in the store."""
    store = open_store(path)
    for array in store.arrays.values():
        read(array, all_rows(store))
    assert verify_store(path).problems == ()
