"""A job that goes on believes no block by its size: damaged files and forged journal lines are made again."""

import json

import pytest

from coldtap.stores.format.manifest import MANIFEST
from coldtap.stores.storage.memory import MemoryStorage
from coldtap.stores.verify.verify import verify_store
from tests.helpers.jobs import cache, in_memory

IMAGES = in_memory(train=40, val=8)
INT8 = {"tier": "int8", "layout": "compact", "snr": 40}


class Notes:
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    def forecast(self, forecast):
        self.rows = forecast.n_rows

    def advance(self, n_rows):
        pass


def contents(storage):
    return {key: storage.get(key, limit=None) for key in storage.list()}


@pytest.fixture(scope="module", params=[{}, INT8], ids=["float16", "int8"])
def whole(request):
    """A finished store's files, and how it is made."""
    storage = MemoryStorage()
    cache(IMAGES, storage, **request.param)
    return contents(storage), request.param


def unfinished(whole, **changes):
    """A store whose job died before its manifest, with some files changed."""
    storage = MemoryStorage()
    for name, data in {**whole[0], **changes}.items():
        if name != MANIFEST:
            storage.put(name, [data])
    return storage


def goes_on(storage, whole):
    """Go on, end in the undisturbed bytes, and return what was said."""
    notes = Notes()
    report = cache(IMAGES, storage, reporter=notes, **whole[1])
    assert report.status == "written"
    assert contents(storage) == whole[0]
    assert verify_store(storage).problems == ()
    return " ".join(notes.lines)


def test_what_is_intact_is_only_read(whole):
    said = goes_on(unfinished(whole), whole)
    assert "checking 2 finished blocks of memory://" in said
    assert "made again" not in said


def test_every_file_of_a_block_is_held_against_its_digest(whole):
    names = [name for name in whole[0] if "/c/1/" in name or name.startswith(("digests/", "escapes/"))]
    assert len(names) >= 3
    for name in names:
        data = whole[0][name]
        changed = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
        if changed == data:
            continue
        said = goes_on(unfinished(whole, **{name: changed}), whole)
        assert "blocks are made again, for they are not what their journal says: block " in said
        assert f"{name} has another digest" in said


def forgeries(line):
    """Lines that parse, each false in one way."""
    (row, digest), *_ = line["source_sha256"].items()
    name, file = next((name, file) for name, file in line["files"].items() if name.startswith("features.zarr"))
    files = line["files"]
    return {
        "a row less": {"source_sha256": {r: d for r, d in line["source_sha256"].items() if r != row}},
        "a row of another block": {"source_sha256": {**line["source_sha256"], "9999": digest}},
        "a row twice": {"rejected": [{"row": int(row), "reason": "x", "tap": None}]},
        "a file less": {"files": {n: f for n, f in files.items() if n != name}},
        "a file more": {"files": {**files, "samples.parquet": file}},
        "a file outside": {"files": {**files, "../outside": file}},
        "no file": {"files": {}},
        "another size": {"files": {**files, name: {**file, "n_bytes": file["n_bytes"] + 1}}},
        "another digest": {"files": {**files, name: {**file, "sha256": "0" * 64}}},
    }


def test_a_forged_journal_line_is_not_believed(whole):
    name = "journal/00000001.json"
    line = json.loads(whole[0][name])
    for what, change in forgeries(line).items():
        storage = unfinished(whole, **{name: json.dumps({**line, **change}).encode()})
        try:
            said = goes_on(storage, whole)
        except Exception as error:
            raise AssertionError(what) from error
        by_size = ("a file more", "a file outside", "another size")
        assert "block 1: its line" in said or "block 1: features.zarr" in said or what in by_size, what
