"""Damage: whatever happens to the bytes of a store, a reader raises a ColdtapError or gives the original bits.

What is promised, and by whom:

- *Accidental damage* (flipped bits; overwritten, cut, lengthened or lost files; a mangled manifest) is found by the
  reader itself, on the first read of what was hit: chunks and indexes have a crc32c, every other file its SHA-256 in
  the manifest. A file that the manifest does not list, where one of its name could be, counts as damage of the
  manifest: a lost line never makes values disappear.
- *A forged index* (other offsets and lengths, its crc computed anew) never makes the reader leave the file, allocate
  beyond a row, or give bytes that are not those of the row: a chunk that is whole and another's is told by the store's
  list of digests (`test_bound_chunks.py`). In a store of format 1, which has no list, only `verify` finds it.
- *A forged manifest* (with files that agree with it) is another store, with another digest. What it holds may be
  anything but must not crash the reader, hang it, or make it allocate without bound.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldtap.errors import ColdtapError
from coldtap.stores import open_store
from coldtap.stores.format.canonical import sha256
from coldtap.stores.format.codes import Scaling
from coldtap.stores.format.manifest import MANIFEST, MANIFEST_PARTS
from coldtap.stores.format.recipe import PARTS, signed_record
from coldtap.stores.verify.verify import verify_store
from tests.helpers.manifests import chained, name_of
from tests.helpers.places import FIXTURES, ROOT
from tests.helpers.synthetic import GEOMETRY, synthetic_store

KINDS = [("float32", "fast"), ("float16", "fast"), ("bfloat16", "fast"), ("int8", "fast"), ("int8", "compact")]
SPLITS = ["train"] * 4 + ["val"] * 3
TARGETS = [2, 0, 1, 2, 1, 0, 2]
N_TAPS, BLOCK_ROWS, REJECTED = 3, 4, 1
PRESENT = [1, 2, 3, 4, 5, 6]
ABSENT = [0, 7]  # the rejected sample, and padding
LAYERS = f"layers/{GEOMETRY.name}"
ENTRY = 16

thorough = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
some = settings(thorough, max_examples=200)
slower = settings(thorough, max_examples=100)


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A store as it was written, and everything that it says."""

    path: Path
    files: dict[str, bytes] = field(repr=False)
    truth: dict[str, Any] = field(repr=False)


def scaling_of(n_taps):
    scale = np.linspace(0.05, 0.1, n_taps * GEOMETRY.channels, dtype=np.float32).reshape(n_taps, -1)
    return Scaling(scale=scale, offset=scale - 1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((7, N_TAPS, GEOMETRY.tokens, GEOMETRY.channels)).astype(np.float32)
    features[::2, 1, 0, 5] += 100  # escapes
    found = {}
    for tier, layout in KINDS:
        path = tmp_path_factory.mktemp(f"{tier}-{layout}") / "s"
        gathers = {"layers": range(N_TAPS), "sum": [2], "pooled": range(N_TAPS)}
        scaling = {LAYERS: scaling_of(N_TAPS), f"sum/{GEOMETRY.name}/2": scaling_of(1)}
        synthetic_store(
            path,
            features,
            TARGETS,
            SPLITS,
            gathers=gathers,
            tier=tier,
            layout=layout,
            scaling=scaling,
            block_rows=BLOCK_ROWS,
            rejected=[REJECTED],
            class_names=["ant", "bee", "cow"],
        )
        files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        found[tier, layout] = Sound(path=path, files=files, truth=dict(everything(path, each_row=True)))
    return found


def everything(path, about=("arrays", "tables"), *, each_row=False):
    """All that a store says, a question and an answer at a time; an answer may be a ColdtapError."""
    store = answer(partial(open_store, path, threads=1))
    yield "open", store if isinstance(store, ColdtapError) else "opened"
    if isinstance(store, ColdtapError):
        return
    if "tables" in about:
        yield from tables(store)
    if "arrays" in about:
        yield (
            "norm",
            answer(lambda: (store.norm.kind, store.norm.eps, *map(_bits, (store.norm.weight, store.norm.bias)))),
        )
        for array in store.arrays.values():
            yield from rows_of(array, each_row)


def rows_of(array, each_row):
    """All present rows at once and, where that is an error, one by one; and every absent row."""
    for how in (_values, _stored):
        found = answer(partial(how, array, PRESENT))
        yield f"{array.name} {how.__name__}", found
        for row in PRESENT if each_row or isinstance(found, ColdtapError) else ():
            yield f"{array.name} {how.__name__} {row}", answer(partial(how, array, [row]))
        for row in ABSENT:
            yield f"{array.name} {how.__name__} {row}", answer(partial(how, array, [row]))


def tables(store):
    yield "splits", answer(lambda: store.splits)
    yield "depth", answer(lambda: store.depth)
    for split in ("train", "val"):
        rows = answer(partial(store.rows, split))
        yield f"rows {split}", rows if isinstance(rows, ColdtapError) else rows.tolist()
    for rows in (PRESENT, ABSENT[:1], ABSENT[1:]):
        yield f"ids {rows}", answer(partial(store.sample_ids, rows))
        yield f"targets {rows}", answer(lambda rows=rows: store.targets(rows).tolist())
    yield "sources", answer(partial(store.sources, PRESENT))
    yield "classes", answer(lambda: (store.class_names(), store.n_classes()))
    yield "split of each id", answer(store.splits_by_id)


def answer(ask):
    try:
        return ask()
    except ColdtapError as error:
        return error


def _bits(values):
    return None if values is None else values.tobytes()


def _values(array, rows):
    out = np.zeros((len(rows), *array.row_shape), np.float32)
    array.read_into(out, rows)
    return out.tobytes()


def _stored(array, rows):
    out = np.zeros((len(rows), *array.row_shape), array.spec.dtype)
    exceptions = array.read_stored_into(out, rows)
    return out.tobytes(), exceptions.position.tobytes(), exceptions.value.tobytes()


def same_or_error(sound, about=("arrays", "tables")):
    """Whether some question ended in an error; each other answer is the original one."""
    raised = False
    for question, found in everything(sound.path, about):
        expected = sound.truth[question]
        if isinstance(found, ColdtapError):
            raised = raised or not isinstance(expected, ColdtapError)
            assert str(found), question
        elif isinstance(expected, ColdtapError):
            raise AssertionError(f"{question} is not there, and was given as {found!r}")
        else:
            assert found == expected, question
    return raised


@dataclass(frozen=True)
class Damaged:
    """Some files of a store with other bytes (None: without the file), for as long as a test looks at it."""

    sound: Sound
    new: dict[str, bytes | None] = field(repr=False)
    how: str = ""

    @property
    def changes(self):
        return any(data != self.sound.files.get(name) for name, data in self.new.items())

    def __enter__(self):
        for name, data in self.new.items():
            if data is None:
                (self.sound.path / name).unlink()
            else:
                (self.sound.path / name).write_bytes(data)
        return self.sound

    def __exit__(self, *_):
        for name in self.new:
            if name in self.sound.files:
                (self.sound.path / name).write_bytes(self.sound.files[name])
            else:
                (self.sound.path / name).unlink()


# Bytes with an accident: every function takes some and draws what becomes of them.


def flipped(draw, data):
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]


def overwritten(draw, data):
    start = draw(st.integers(0, len(data) - 1))
    n = draw(st.integers(1, 64))
    run = draw(st.sampled_from([b"\0" * n, b"\xff" * n]) | st.binary(min_size=n, max_size=n))
    return data[:start] + run[: len(data) - start] + data[start + n :]


def truncated(draw, data):
    return data[: draw(st.integers(0, len(data) - 1))]


def extended(draw, data):
    known = st.sampled_from([b"\0" * 16, b"\xff" * 20, data, b"\0" * 5000])
    return data + draw(known | st.binary(min_size=1, max_size=40))


def shifted(draw, data):
    """Some bytes were lost, or came in, in the middle."""
    at = draw(st.integers(0, len(data) - 1))
    n = draw(st.integers(1, 20))
    return data[:at] + (b"\0" * n + data[at:] if draw(st.booleans()) else data[at + n :])


def moved(draw, data):
    """Two pieces of one size changed places, wherever chunks begin."""
    n = draw(st.integers(1, max(1, min(64, len(data) // 2))))
    a = draw(st.integers(0, len(data) - n))
    b = draw(st.integers(0, len(data) - n))
    pieces = bytearray(data)
    pieces[a : a + n], pieces[b : b + n] = data[b : b + n], data[a : a + n]
    return bytes(pieces)


def lost(draw, data):
    return None


ACCIDENTS = [flipped, overwritten, truncated, extended, shifted, moved, lost]


def in_part(accident, draw, data, start, end):
    """An accident to a part of a file that leaves the rest where it is."""
    part = accident(draw, data[start:end])
    return None if part is None else data[:start] + part + data[end:]


def is_shard(name):
    return name.startswith(("features.zarr/layers/", "features.zarr/sum/", "features.zarr/pooled/")) and "/c/" in name


def is_payload(name):
    return is_shard(name) or name.startswith(("escapes/", "digests/"))


def is_metadata(name):
    return (name.startswith("features.zarr/") and not is_payload(name)) or name == "recipe.json"


def is_table(name):
    return name.endswith(".parquet")


def index_bytes(name):
    return BLOCK_ROWS * (N_TAPS if "/layers/" in name else 1) * ENTRY + 4


@st.composite
def accidents(draw, stores, wanted, part=None):
    """A store, and new bytes of one of its files."""
    sound = stores[draw(st.sampled_from(KINDS))]
    name = draw(st.sampled_from(sorted(filter(wanted, sound.files))))
    data = sound.files[name]
    start, end = part(name, data) if part else (0, len(data))
    accident = draw(st.sampled_from(ACCIDENTS))
    return Damaged(sound, {name: in_part(accident, draw, data, start, end)}, f"{accident.__name__} {name}")


def of_payload(name, data):
    return 0, len(data) - index_bytes(name) if is_shard(name) else len(data)


def of_index(name, data):
    return len(data) - index_bytes(name), len(data)


# Which files, which part of them, and who reads them.
AREAS = {
    "payload": (is_payload, of_payload, ["arrays"]),
    "index": (is_shard, of_index, ["arrays"]),
    "metadata": (is_metadata, None, ["arrays"]),
    "tables": (is_table, None, ["tables"]),
    "samples": (lambda name: name == "samples.parquet", None, ["tables"]),
    "manifest": (lambda name: name == MANIFEST or name.startswith(MANIFEST_PARTS), None, ["arrays", "tables"]),
}


@pytest.mark.parametrize("area", AREAS)
def test_an_accident_is_an_error_or_changes_nothing(stores, area):
    wanted, part, about = AREAS[area]
    raised = 0

    @(some if area == "tables" else thorough)
    @given(accidents(stores, wanted, part))
    def holds(case):
        nonlocal raised
        with case as sound:
            raised += same_or_error(sound, about)

    holds()
    assert raised > 60  # what coldtap does not ask (the metadata that it writes for others) changes nothing


@pytest.mark.parametrize("area", AREAS)
def test_verify_finds_every_accident(stores, area):
    wanted, part, _ = AREAS[area]

    @slower
    @given(accidents(stores, wanted, part))
    def holds(case):
        with case as sound:
            assert is_found(sound.path) or not case.changes

    holds()


def is_found(path):
    found = answer(partial(verify_store, path, n_threads=1))
    return isinstance(found, ColdtapError) or len(found.problems) > 0


@st.composite
def lines(draw, stores):
    """A manifest in which lines were lost, doubled, changed places or were given another's digest or name."""
    sound = stores[draw(st.sampled_from(KINDS))]
    file = draw(st.sampled_from([MANIFEST, *(name for name in sound.files if name.startswith(MANIFEST_PARTS))]))
    old = sound.files[file].decode().splitlines()
    a, b = draw(st.integers(0, len(old) - 1)), draw(st.integers(0, len(old) - 1))
    (digest, size, name), (other_digest, other_size, other_name) = old[a].split(" ", 2), old[b].split(" ", 2)
    changed = draw(
        st.sampled_from(
            [
                [],
                [old[a], old[a]],
                [f"{other_digest} {size} {name}"],
                [f"{digest} {other_size} {name}"],
                [f"{digest} {size} {other_name}"],
                [f"{digest} {int(size) + 1} {name}"],
                [f"{digest} {size} {name}~"],
                [f"{digest} {size} {name.upper()}"],
                [f"{other_digest} {other_size} {name}"],
                [old[a] + " "],
                [old[a][:-1]],
                ["", old[a]],
            ]
        )
    )
    new = [*old[:a], *changed, *old[a + 1 :]]
    if draw(st.booleans()):
        new = sorted(new, key=lambda line: line.split(" ", 2)[-1])
    if file == MANIFEST:
        files = {MANIFEST: "".join(f"{line}\n" for line in new).encode()}
    else:  # the root agrees with it
        files = chained(sound.files, lambda lines: new if lines == old else lines)
    return Damaged(sound, files, f"{old[a]} → {changed}")


def test_a_line_of_the_manifest_that_is_lost_or_wrong_never_makes_values_disappear(stores):
    @some
    @given(lines(stores))
    def holds(case):
        with case as sound:
            same_or_error(sound)

    holds()


def test_verify_finds_a_line_that_is_lost_or_wrong(stores):
    @slower
    @given(lines(stores))
    def holds(case):
        with case as sound:
            assert is_found(sound.path) or not case.changes

    holds()


# Forgeries: checksums and digests computed anew.


def crc(data):
    return google_crc32c.value(bytes(data)).to_bytes(4, "little")


def entries_of(name, data):
    index = data[len(data) - index_bytes(name) : -4]
    return np.frombuffer(index, "<u8").reshape(-1, 2).copy()


def with_entries(name, data, entries):
    index = entries.astype("<u8").tobytes()
    return data[: len(data) - index_bytes(name)] + index + crc(index)


EDGES = [0, 1, 4, 5, 2**31, 2**32 - 1, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]


@st.composite
def lying_indexes(draw, stores):
    """One entry of an index says something else, and the index's checksum holds."""
    sound = stores[draw(st.sampled_from(KINDS))]
    name = draw(st.sampled_from(sorted(filter(is_shard, sound.files))))
    data = sound.files[name]
    entries = entries_of(name, data)
    at = draw(st.integers(0, len(entries) - 1))
    old_offset, old_length = entries[at].tolist()
    numbers = st.sampled_from(EDGES) | st.integers(0, len(data) + 10) | st.integers(0, 2**64 - 1)
    offset = draw(st.just(old_offset) | st.sampled_from(entries[:, 0].tolist()) | numbers)
    length = draw(st.just(old_length) | st.sampled_from(entries[:, 1].tolist()) | numbers)
    entries[at] = offset, length
    return Damaged(sound, {name: with_entries(name, data, entries)}, f"{name}: {offset}, {length}")


def test_a_lying_index_is_an_error_or_changes_nothing(stores):
    @some
    @given(lying_indexes(stores))
    def holds(case):
        with case as sound:
            same_or_error(sound, ["arrays"])

    holds()


def test_verify_finds_a_lying_index(stores):
    @slower
    @given(lying_indexes(stores))
    def holds(case):
        with case as sound:
            assert is_found(sound.path) or not case.changes

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_chunks_and_shards_at_the_place_of_others_are_found(stores, kind):
    sound = stores[kind]
    for name in filter(is_shard, sound.files):
        entries = entries_of(name, sound.files[name])
        first, *_, last = np.flatnonzero(entries[:, 0] != 2**64 - 1)
        entries[[first, last]] = entries[[last, first]]
        with Damaged(sound, {name: with_entries(name, sound.files[name], entries)}):
            assert is_found(sound.path), name
            assert same_or_error(sound, ["arrays"]), name
    first, second = (f"features.zarr/{LAYERS}/c/{block}/0/0/0" for block in (0, 1))
    with Damaged(sound, {first: sound.files[second], second: sound.files[first]}):
        assert is_found(sound.path)
        assert same_or_error(sound, ["arrays"])


def frames(n_bytes):
    """zstd frames in which nothing, or too much, is said to lie; of any length by a skippable part."""
    for stated in (2**40, 2**63, 2**64 - 1, n_bytes + 1, max(n_bytes - 1, 0), 0):
        yield b"\x28\xb5\x2f\xfd\xe0" + stated.to_bytes(8, "little") + b"\x02\0\0" + b"\0"
    yield b"\x28\xb5\x2f\xfd\x00\xff" + b"\x03\0\0"  # a window of 2^41 bytes, no size
    yield b"\x28\xb5\x2f\xfd\xc0\xff" + n_bytes.to_bytes(8, "little") + b"\x03\0\0"
    # One block that repeats a byte two million times.
    block = ((2**21 - 1) << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    yield b"\x28\xb5\x2f\xfd\xa0" + n_bytes.to_bytes(4, "little") + block
    yield zstandard.ZstdCompressor().compress(bytes(n_bytes - 1))
    yield zstandard.ZstdCompressor().compress(bytes(n_bytes + 1))
    yield zstandard.ZstdCompressor().compress(b"x" * 10_000_000)
    yield zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * n_bytes)
    yield b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + bytes(8)
    yield b""
    yield b"\0"


def test_a_frame_that_says_too_much_is_an_error(stores):
    sound = stores["int8", "compact"]
    for name in (f"features.zarr/{LAYERS}/c/0/0/0/0", f"features.zarr/sum/{GEOMETRY.name}/2/c/1/0/0"):
        data = sound.files[name]
        entries = entries_of(name, data)
        (at, *_) = np.flatnonzero(entries[:, 0] != 2**64 - 1)
        n_values = GEOMETRY.tokens * GEOMETRY.channels
        for frame in frames(n_values):
            chunk = frame + crc(frame)
            forged = entries.copy()
            forged[at] = len(data) - index_bytes(name), len(chunk)
            payload = data[: len(data) - index_bytes(name)] + chunk + bytes(index_bytes(name))
            with Damaged(sound, {name: with_entries(name, payload, forged)}):
                assert same_or_error(sound), frame[:20]
                assert is_found(sound.path)


def relisted(sound, new):
    """The manifest that agrees with new bytes."""

    def listed(line):
        data = new.get(name_of(line))
        return line if data is None else f"{sha256(data)} {len(data)} {name_of(line)}"

    return {**new, **chained(sound.files, lambda lines: [listed(line) for line in lines])}


WRONG = [
    None, True, False, 0, 1, -1, 2**70, -(2**63), 0.5, 1e308, float("inf"), float("nan"), "", "x", "\ud800", "1",
    [], [[]], [None], [0], [0, 0], [1, 2, 3], ["a"], [1e400], {}, {"": {}}, {"grid": 1}, [[1, 2], {}], 10**9,
]  # fmt: skip


def places(value, path=()):
    """Paths to everything in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def removed(value, path):
    copy = value.copy()
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = removed(value[path[0]], path[1:])
    return copy


@st.composite
def forged_metadata(draw, stores):
    """JSON with something of another type or range in it, or without something; digests and manifest agree with it."""
    sound = stores[draw(st.sampled_from(KINDS))]
    name = draw(st.sampled_from(["recipe.json", *(n for n in sorted(sound.files) if n.endswith("zarr.json"))]))
    value = json.loads(sound.files[name])
    path = draw(st.sampled_from([*places(value)]))
    wrong = draw(st.sampled_from(WRONG))
    value = removed(value, path) if path and draw(st.booleans()) else replaced(value, path, wrong)
    data = json.dumps(value).encode()
    if name == "recipe.json" and draw(st.booleans()):
        try:
            recipe = signed_record({part: value[part] for part in PARTS})
            data = json.dumps({**recipe, "recorded": value.get("recorded")}).encode()
        except (KeyError, TypeError, ValueError, AttributeError):
            pass  # no such recipe has a digest
    return Damaged(sound, relisted(sound, {name: data}), f"{name} {path}")


def only_coldtap_errors(path):
    """Ask everything; what is not a ColdtapError passes through."""
    for _ in everything(path):
        pass


def test_forged_metadata_ends_in_an_error_of_coldtap_or_in_values(stores):
    @some
    @given(forged_metadata(stores))
    def holds(case):
        with case as sound:
            only_coldtap_errors(sound.path)

    holds()


def test_forged_scales_end_in_an_error_of_coldtap_or_in_values(stores):
    sound = stores["int8", "fast"]
    name = f"features.zarr/scales/{LAYERS}/scale/c/0/0"
    for data in (b"", sound.files[name][:-4], sound.files[name] * 2, *(
        np.full(N_TAPS * GEOMETRY.channels, wrong, "<f4").tobytes() for wrong in (0, -1, np.nan, np.inf)
    )):  # fmt: skip
        with Damaged(sound, relisted(sound, {name: data})):
            error = answer(partial(open_store, sound.path))
            assert isinstance(error, ColdtapError)
            assert str(sound.path) in str(error)


def test_forged_escapes_end_in_an_error_of_coldtap_or_in_values(stores):
    sound = stores["int8", "fast"]
    name = f"escapes/{LAYERS}/0"
    words, n_counts = np.frombuffer(sound.files[name], "<u4"), BLOCK_ROWS * N_TAPS
    (first, *_) = np.flatnonzero(words[:n_counts])
    for at, wrong in ((n_counts, 56), (n_counts, 2**32 - 1), (first, 0), (first, 2**32 - 1), (0, 2**31), (11, 1)):
        forged = words.copy()
        forged[at] = wrong
        with Damaged(sound, relisted(sound, {name: forged.tobytes()})):
            assert same_or_error(sound), (at, wrong)
    for data in (b"", b"\0", sound.files[name][: 4 * n_counts], sound.files[name][:-4], sound.files[name] + b"\0" * 8):
        with Damaged(sound, relisted(sound, {name: data})):
            assert same_or_error(sound), len(data)


def test_forged_lists_of_format_1_end_in_an_error_of_coldtap_or_in_values(tmp_path):
    path = shutil.copytree(FIXTURES / "int8-fast", tmp_path / "old")
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    sound = Sound(path=path, files=files, truth=dict(everything(path, each_row=True)))
    name = "features.zarr/escapes/layers/g2x2-p1-c6/position/c/0/0/0"
    position = np.frombuffer(zstandard.decompress(sound.files[name][:-4]), "<u4").reshape(-1, 4)
    for at, wrong in ((0, 4), (0, 2**31), (1, 4), (2, 5), (3, 6), (3, 2**32 - 1)):
        forged = position.copy()
        forged[0, at] = wrong
        frame = zstandard.compress(forged.tobytes())
        with Damaged(sound, relisted(sound, {name: frame + crc(frame)})):
            assert same_or_error(sound)
    for frame in frames(position.nbytes):
        with Damaged(sound, relisted(sound, {name: frame + crc(frame)})):
            assert same_or_error(sound)


def test_what_is_asked_has_an_answer_but_for_absent_rows(stores):
    for sound in stores.values():
        absent = {question for question, found in sound.truth.items() if isinstance(found, ColdtapError)}
        reads = {question.rpartition(" ")[0] for question in absent if "/" in question}
        assert len(reads) == 6
        assert absent == {f"{what} {[row]}" for what in ("ids", "targets") for row in ABSENT} | {
            f"{read} {row}" for read in reads for row in ABSENT
        }


@pytest.mark.parametrize("what", ["folder", "pipe", "device", "loop", "nowhere"])
def test_what_is_no_regular_file_is_an_error_and_never_waited_for(stores, what):
    sound = stores["int8", "compact"]
    for name, data in sound.files.items():
        path = sound.path / name
        path.unlink()
        try:
            if what == "folder":
                path.mkdir()
            elif what == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to({"device": "/dev/zero", "loop": path, "nowhere": "/nowhere"}[what])
            same_or_error(sound)
            if what not in ("loop", "nowhere"):
                assert is_found(sound.path), name
        finally:
            path.rmdir() if what == "folder" else path.unlink()
            path.write_bytes(data)


BOMBS = """
import os, resource, signal, sys
from tests.stores.reading.test_damage import bombs, only_coldtap_errors
only_coldtap_errors(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
signal.alarm(60)
for name in bombs(sys.argv[1]):
    only_coldtap_errors(sys.argv[1])
    print(name, flush=True)
"""


def bombs(path):
    """A store with one bomb after another in it: files that are, or claim to be, far larger than memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from coldtap.stores.format.tables import SAMPLES_SCHEMA
    from coldtap.stores.format.targets import TARGETS_SCHEMA

    path = Path(path)
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    sound = Sound(path=path, files=files, truth={})
    for name in files:
        os.truncate(path / name, 1 << 40)
        yield f"hole {name}"
        (path / name).write_bytes(files[name])
    for name in ("recipe.json", *(n for n in files if n.endswith("zarr.json"))):
        for deep in (b"[" * 1_000_000, b'{"a":' * 1_000_000, b"9" * 1_000_000, b"1e" + b"9" * 1000):
            with Damaged(sound, relisted(sound, {name: deep})):
                yield f"deep {name}"
    n = 300_000_000
    few, zero = pa.array([0], pa.int32()), np.zeros(1000, np.int32)
    text = pa.DictionaryArray.from_arrays(pa.array(zero), pa.array(["x" * 1000]))
    for name, schema in (("samples.parquet", SAMPLES_SCHEMA), ("targets/label.parquet", TARGETS_SCHEMA)):
        columns = [text if pa.types.is_string(field.type) else pa.array(np.zeros(1000), field.type) for field in schema]
        table = pa.table([column.cast(field.type) for column, field in zip(columns, schema, strict=True)], schema)
        many = pa.concat_tables([table] * (n // 1000 // 1000))
        assert len(few) == 1
        pq.write_table(many, path / "bomb", row_group_size=len(many), compression="zstd")
        data = (path / "bomb").read_bytes()
        (path / "bomb").unlink()
        with Damaged(sound, relisted(sound, {name: data})):
            yield f"lines {name} {len(data)}"
    recipe = json.loads(files["recipe.json"])
    for part, key, value in (
        ("rows", "views", 10**9),
        ("rows", "splits", {"train": 10**15}),
        ("encoding", "block_rows", 10**12),
        ("encoding", "gathers", {"layers": [*range(3)] * 10_000}),
    ):
        new = signed_record({p: {**recipe[p], **({key: value} if p == part else {})} for p in PARTS})
        data = json.dumps({**new, "recorded": recipe["recorded"]}).encode()
        changed = {"recipe.json": data}
        for name in files:
            if is_metadata(name) and "shard" in files[name].decode(errors="replace") and name.endswith("zarr.json"):
                about = json.loads(files[name])
                if key == "views":
                    about["shape"][0] = (10**9 + 2) * BLOCK_ROWS
                changed[name] = json.dumps(about).encode()
        with Damaged(sound, relisted(sound, changed)):
            yield f"recipe {key}"


def test_bombs_end_in_an_error_under_a_limit_on_memory(stores):
    """In a process of its own: the limit would else hold for all tests after it."""
    sound = stores["int8", "compact"]
    root = ROOT
    environment = {**os.environ, "PYTHONPATH": str(root), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(sound.path)], capture_output=True, text=True, env=environment, timeout=120
    )
    for name, data in sound.files.items():
        (sound.path / name).write_bytes(data)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) > 100
