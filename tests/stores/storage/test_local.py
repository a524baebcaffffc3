"""A folder passes the shipped suite; and what files alone can be: links, pipes, half written, refused."""

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading

import pytest

from coldtap.errors import CorruptStoreError, MachineError, StoreLockedError
from coldtap.stores.storage.address import storage_at
from coldtap.stores.storage.atomic import TEMPORARY_SUFFIX
from coldtap.stores.storage.local import LocalStorage
from coldtap.stores.storage.memory import MemoryStorage
from coldtap.stores.storage.testing import StorageTests


class TestLocalStorage(StorageTests):
    @pytest.fixture
    def storage(self, tmp_path):
        return LocalStorage(tmp_path / "folder")

    def raw_set(self, storage, key, data):
        path = storage.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_get(self, storage, key):
        path = storage.root / key
        return path.read_bytes() if path.exists() else None


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "folder")


def test_the_place_of_a_storage_is_a_path_or_a_storage(tmp_path):
    memory = MemoryStorage()
    assert storage_at(memory) is memory
    for place in (tmp_path / "a", str(tmp_path / "a")):
        assert storage_at(place).describe("b") == str(tmp_path / "a/b")


def test_looking_makes_no_folder(storage):
    assert [*storage.list()] == []
    assert storage.stat("a") is None
    assert storage.free_bytes() > 0
    assert not storage.root.exists()


KILLED = """
import os, signal, sys
from coldtap.stores.storage.local import LocalStorage

storage, call = LocalStorage(sys.argv[1]), sys.argv[2]
original = getattr(os, call)

def die(*arguments, **named):
    if call not in ("write", "fsync") or sys.argv[3] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    original(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(os, call, die)
storage.put("old", [b"new bytes"])
"""


@pytest.mark.parametrize("call", ["write", "utime", "fsync", "rename"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_writer_killed_between_two_steps_leaves_nothing_that_is_seen(storage, call, when):
    storage.put("old", [b"whole"])
    command = [sys.executable, "-c", KILLED, str(storage.root), call, when]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (storage.get("old"), [*storage.list()]) == (b"whole", ["old"])
    assert [*storage.leftovers()] == [*storage.leftovers("old")] == ["old" + TEMPORARY_SUFFIX]
    storage.put("old", [b"next"])
    assert (storage.get("old"), [*storage.leftovers()]) == (b"next", [])


def test_leftovers_are_swept_where_asked(storage):
    for name in ("a.partial", "b/c.partial", "b/d/e.partial", "f/g.partial"):
        (storage.root / name).parent.mkdir(parents=True, exist_ok=True)
        (storage.root / name).write_bytes(b"half")
    assert [*storage.leftovers()] == ["a.partial", "b/c.partial", "b/d/e.partial", "f/g.partial"]
    storage.sweep("b")
    storage.sweep("a")
    assert [*storage.leftovers()] == ["f/g.partial"]
    assert [*storage.list()] == []


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "second name", "half"])
def test_what_lies_under_the_temporary_name_is_never_written_to(storage, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.write_bytes(b"" if kind == "second name" else b"precious")
    storage.put("b", [b"x"])
    temporary = storage.root / f"a{TEMPORARY_SUFFIX}"
    if kind == "pipe":
        os.mkfifo(temporary)
    elif kind == "second name":
        temporary.hardlink_to(outside)
    elif kind == "half":
        temporary.write_bytes(b"half of another, and a longer one")
    else:
        temporary.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    storage.put("a", [b"new"])
    assert (storage.get("a"), [*storage.leftovers()]) == (b"new", [])
    assert outside.read_bytes() in (b"", b"precious")
    assert not (tmp_path / "nowhere").exists()


def test_only_regular_files_are_read(storage):
    storage.put("a/b", [b"x"])
    os.mkfifo(storage.root / "pipe")
    for key in ("a", "pipe"):
        for action in (storage.get, storage.open, storage.stat):
            with pytest.raises(CorruptStoreError, match=f"{storage.root}/{key} is not a regular file"):
                action(key)
    assert [*storage.list()] == ["a/b", "pipe"]


@pytest.fixture
def linked(storage, tmp_path):
    """A storage with links in it: to a folder, to a file, to nothing and to itself; what lies outside is precious."""
    storage.put("a/b", [b"x"])
    (tmp_path / "outside").mkdir()
    for name in ("c", "c.partial", ".lock"):
        (tmp_path / "outside" / name).write_bytes(b"precious")
    (storage.root / "folder").symlink_to(tmp_path / "outside")
    (storage.root / "file").symlink_to(tmp_path / "outside/c")
    (storage.root / "nothing").symlink_to(tmp_path / "nothing")
    (storage.root / "loop").symlink_to("loop")
    yield storage
    assert {path.name: path.read_bytes() for path in (tmp_path / "outside").iterdir()} == dict.fromkeys(
        ("c", "c.partial", ".lock"), b"precious"
    )
    assert not (tmp_path / "nothing").exists()


READS = ("get", "open", "stat")


def test_no_link_is_read(linked):
    for key in ("file", "nothing", "loop", "folder/c", "folder"):
        for read in READS:
            with pytest.raises(
                CorruptStoreError, match=rf"{linked.root}/{key.partition('/')[0]} is a link, to .*, which"
            ):
                getattr(linked, read)(key)
    below = linked.below("folder")
    for read in READS:
        with pytest.raises(CorruptStoreError, match=f"{linked.root}/folder is a link, to "):
            getattr(below, read)("c")
    with pytest.raises(CorruptStoreError, match=r"is a link, to .*put the folder itself there"):
        [*linked.list("folder")]
    assert [*linked.list()] == ["a/b", "file", "folder", "loop", "nothing"]
    assert linked.occupied_bytes("a") == 1


def test_a_link_to_a_file_is_read_where_the_caller_says_so_and_no_other(linked):
    following = LocalStorage(linked.root, follow_links=True)
    for storage in (following, pickle.loads(pickle.dumps(following))):
        assert (storage.get("file"), storage.stat("file").n_bytes) == (b"precious", 8)
        assert storage.stat("nothing") is storage.stat("loop") is None
        with pytest.raises(CorruptStoreError, match="folder is a link"):
            storage.get("folder/c")
        with pytest.raises(CorruptStoreError, match="is not a regular file"):
            storage.get("folder")
    with pytest.raises(CorruptStoreError, match="folder is a link"):
        following.put("folder/new", [b"x"])


def test_nothing_is_written_through_a_link(linked):
    for write in (
        lambda: linked.put("folder/new", [b"x"]),
        lambda: linked.put_if_absent("folder/new", [b"x"]),
        lambda: linked.copy("a/b", "folder/new"),
        lambda: linked.link("a/b", "folder/new"),
        lambda: linked.copy("file", "new"),
        lambda: linked.link("file", "new"),
        lambda: linked.delete("folder/c"),
        lambda: linked.sweep("folder"),
        lambda: linked.below("folder").put("new", [b"x"]),
        lambda: linked.below("folder/deep").put("new", [b"x"]),
        lambda: linked.below("folder").sweep(),
        lambda: linked.below("folder").lock().__enter__(),
        lambda: linked.below("folder").lock(named=False).__enter__(),
    ):
        with pytest.raises(CorruptStoreError, match="is a link, to"):
            write()
    linked.sweep()
    linked.put("file", [b"new"])
    assert (linked.get("file"), (linked.root / "file").is_symlink()) == (b"new", False)
    assert linked.put_if_absent("nothing", [b"x"]) is None
    linked.delete("folder")
    assert not (linked.root / "folder").is_symlink()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "second name", "folder"])
def test_a_lock_is_written_to_a_file_of_its_own_alone(storage, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    storage.put("a", [b"x"])
    place = storage.root / ".lock"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "second name":
        place.hardlink_to(outside)
    else:
        place.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    with pytest.raises((CorruptStoreError, MachineError), match=r"\.lock"), storage.lock():
        pass
    assert (outside.read_bytes(), (tmp_path / "nowhere").exists()) == (b"precious", False)


def test_the_path_that_is_given_may_be_a_link(storage, tmp_path):
    storage.put("a/b", [b"x"])
    (tmp_path / "way").symlink_to(storage.root)
    given = LocalStorage(tmp_path / "way")
    with given.lock():
        given.put("a/c", [b"y"])
    assert (given.get("a/b"), given.below("a").get("c"), storage.get("a/c")) == (b"x", b"y", b"y")
    assert LocalStorage(tmp_path / "way/a").get("b") == b"x"


def test_a_folder_where_a_file_should_be_and_the_other_way_round(storage, tmp_path):
    storage.put("a/b", [b"x"])
    with pytest.raises(MachineError, match=f"cannot write {storage.root}/a: a folder is there: choose another path"):
        storage.put("a", [b"x"])
    for key in ("a/b/c", "a/b/c/d"):
        with pytest.raises(MachineError, match=f"cannot write {storage.root}/{key}: a file is where a folder would"):
            storage.put(key, [b"x"])
    (tmp_path / "file").write_bytes(b"x")
    for root in (tmp_path / "file", tmp_path / "file/deep"):
        with pytest.raises(MachineError, match="a file is where a folder would have to be"):
            LocalStorage(root).put("a", [b"x"])
        with pytest.raises(NotADirectoryError, match=r"is a file|[Nn]ot a directory|below a file"):
            LocalStorage(root).get("a")
        assert (LocalStorage(root).stat("a"), [*LocalStorage(root).list()]) == (None, [])
    assert [*storage.list(), *storage.leftovers()] == ["a/b"]


def test_a_name_that_is_too_long(storage):
    with pytest.raises(MachineError, match="a name in this path is too long: choose a shorter one"):
        storage.put(250 * "n", [b"x"])
    with pytest.raises(OSError, match="File name too long"):
        storage.get(300 * "n")
    storage.put(247 * "n", [b"x"])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "no permission to write there"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_refusal_is_one_clear_error_and_leaves_nothing(storage, monkeypatch, call, code, reason):
    storage.put("a/old", [b"whole"])

    def refuse(*arguments, **named):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        for key in ("a/old", "a/new"):
            with pytest.raises(MachineError, match=f"cannot write {storage.root}/{key}: {reason}"):
                storage.put(key, [b"bytes"])
    assert ([*storage.list()], [*storage.leftovers()], storage.get("a/old")) == (["a/old"], [], b"whole")


def test_a_file_that_may_not_be_read_says_which(storage, monkeypatch):
    storage.put("a", [b"x"])
    storage.get("a")
    original = os.open

    def refuse(path, *arguments, **named):
        if path == "a":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return original(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="Permission denied") as error:
        storage.get("a")
    assert (error.value.filename, error.value.strerror) == (f"{storage.root}/a", "Permission denied")


def test_links_become_copies_where_the_file_system_has_none(storage, monkeypatch):
    storage.put("a", [b"x"])
    original = os.link

    def refuse(source, *arguments, **named):
        if source == "a":
            raise OSError(errno.EPERM, "Operation not permitted")
        original(source, *arguments, **named)

    monkeypatch.setattr(os, "link", refuse)
    assert storage.link("a", "b/c") is not None
    assert storage.link("a", "b/c") is None
    assert (storage.get("b/c"), (storage.root / "a").stat().st_nlink) == (b"x", 1)


def test_a_renamed_folder_stays_the_one_that_was_opened(storage, tmp_path):
    storage.put("a", [b"x"])
    storage.root.rename(tmp_path / "moved")
    storage.put("b", [b"y"])
    assert (storage.get("a"), (tmp_path / "moved/b").read_bytes()) == (b"x", b"y")
    assert not storage.root.exists()


def test_a_file_that_is_cut_while_it_is_open(storage):
    storage.put("a", [bytes(100)])
    with storage.open("a") as reader:
        os.truncate(storage.root / "a", 50)
        assert (reader.n_bytes, reader.size_now()) == (100, 50)
        with pytest.raises(CorruptStoreError, match="a has 50 bytes; wanted are those from 0 to 100"):
            reader.read(0, 100)
        with pytest.raises(CorruptStoreError, match="it was cut while it was opened"):
            reader.map()


def test_descriptors_are_closed(storage):
    storage.put("a/b", [b"x"])
    gc.collect()  # what other tests have left open
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        storage.get("a/b")
        storage.open("a/b")
        storage.put("a/b", [b"y"])
        assert [*storage.list()] == ["a/b"]
        storage.below("a").get("b")
        with storage.lock(), storage.lock(named=False):
            pass
        with pytest.raises(MachineError, match="a folder is there"):
            storage.put("a", [b"y"])
    assert len(os.listdir("/proc/self/fd")) == before


def _hold(root, held, release):
    with LocalStorage(root).lock():
        held.set()
        release.wait()


def test_the_lock_names_its_holder_and_dies_with_it(storage):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(storage.root, held, release))
    holder.start()
    held.wait(60)
    message = f"{storage.root} is being written by process {holder.pid} on "
    with pytest.raises(StoreLockedError, match=message), storage.lock():
        pass
    holder.kill()
    holder.join()
    with storage.lock():
        assert (storage.root / ".lock").exists()


def test_writers_of_one_name_take_turns(storage):
    """The second begins when the first has ended; neither sees the other's bytes."""
    began = threading.Event()

    def second():
        began.set()
        storage.put("a", [b"second"])

    with storage.writer("a") as sink:
        sink.write(b"fir")
        thread = threading.Thread(target=second)
        thread.start()
        began.wait()
        thread.join(0.1)
        sink.write(b"st")
        assert thread.is_alive()
    thread.join()
    assert (storage.get("a"), [*storage.leftovers()]) == (b"second", [])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_drive_that_cannot_sync_folders_keeps_stores_all_the_same(storage, monkeypatch, code):
    original = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    storage.put("a/b", [b"x"])
    assert storage.link("a/b", "c") is not None
    assert (storage.get("a/b"), storage.get("c")) == (b"x", b"x")


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.EIO, "the disk, or the network drive, fails"), (errno.ESTALE, "was mounted anew or moved")],
)
def test_what_a_network_drive_refuses_has_a_reason(storage, monkeypatch, code, reason):
    def refuse(*arguments, **named):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(MachineError, match=reason):
        storage.put("a", [b"x"])
