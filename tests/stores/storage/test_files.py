"""Durable files, the places for them, and the lock of a store."""

import errno
import os
from pathlib import Path

import pytest

from coldtap.errors import MachineError, OptionError, StoreLockedError
from coldtap.stores.storage.address import storage_at
from coldtap.stores.storage.atomic import machine_errors, write_file
from coldtap.stores.storage.lock import StoreLock
from coldtap.stores.storage.output_place import require_place


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep/file"
    write_file(path, [b"ab", memoryview(b"cd")])
    assert path.read_bytes() == b"abcd"

    def dies():
        yield b"new"
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_file(path, dies())
    assert path.read_bytes() == b"abcd"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_systems_refusals_become_one_clear_error():
    with pytest.raises(MachineError, match="the disk is full: free some space"), machine_errors(Path("there")):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="odd"), machine_errors(Path("there")):
        raise OSError(errno.EXDEV, "odd")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/new", "a file is where a folder would have to be: choose another path"),
        ("file/deep/new", "a file is where a folder would have to be: choose another path"),
        (250 * "n", "a name in this path is too long: choose a shorter one"),  # that of its temporary file is
        (300 * "n", "a name in this path is too long: choose a shorter one"),
        ("folder", "a folder is there: choose another path"),
    ],
)
def test_a_path_that_no_file_can_have_is_one_clear_error(tmp_path, name, reason):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError, match=f"cannot write .*{name}: {reason}"):
        write_file(tmp_path / name, [b"new"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("folder", OptionError, r"`out='.*folder'` is a folder: give the path of a file, such as .*folder/example.bin"),
        ("file/new", OptionError, r"`out='.*file/new'`: .*file is a file, and no folder can be there"),
        ("file/deep/new", OptionError, r"`out='.*file/deep/new'`: .*file is a file, and no folder can be there"),
        (250 * "n", MachineError, "a name in this path is too long"),
        (300 * "n", MachineError, "a name in this path is too long"),
        (f"missing/{250 * 'n'}", MachineError, "a name in this path is too long"),
        (f"missing/{300 * 'n'}/new", MachineError, "a name in this path is too long"),
    ],
)
def test_a_place_for_no_file_is_refused_before_anything_is_made(tmp_path, monkeypatch, name, kind, message):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, Path(name)):
        with pytest.raises(kind, match=message):
            require_place(path, "example.bin")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_places_for_files_are_what_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    for name in ("file", "new", "link", "deep/er/new", 247 * "n"):
        for path in (tmp_path / name, Path(name)):
            require_place(path, "example.bin")
            write_file(path, [b"new"])
            assert path.read_bytes() == b"new"


def test_one_writer_a_store_and_a_dead_one_does_not_count(tmp_path):
    with StoreLock(tmp_path):
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()}"), StoreLock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text("process 1 on elsewhere, long dead, with a longer text than ours")
    with StoreLock(tmp_path):
        assert "elsewhere" not in (tmp_path / ".lock").read_text()


@pytest.mark.parametrize("place", ["s3://bucket/store", "https://host/store", "gs:/bucket", "hf-hub://a/b"])
def test_an_address_is_refused_and_becomes_no_folder(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    for use in (storage_at, lambda place: storage_at(Path(place)), lambda place: write_file(Path(place), [b"x"])):
        with pytest.raises(OptionError, match=r"is an address, and coldtap cannot .*: give a path of this machine"):
            use(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["c:/store", "store", "/a/s3:/store", "a:b", "weird:name"])
def test_a_name_with_a_colon_is_a_path(place):
    assert storage_at(place).root == Path(place)
