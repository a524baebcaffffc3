"""The tests that every storage must pass: subclass `StorageTests`, say how to make one and to look past it, run pytest.

    class TestShelf(StorageTests):
        @pytest.fixture
        def storage(self, tmp_path):
            return Shelf(tmp_path)

        def raw_set(self, storage, key, data): ...
        def raw_get(self, storage, key): ...

This module needs pytest, and nothing else in coldtap imports it.
"""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldtap.errors import CorruptStoreError, StoreLockedError
from coldtap.stores.storage.contract import LOCK_NAME, TEMPORARY_SUFFIX, Storage

N_THREADS = 20
BAD_KEYS = (
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "./a",
    "../a",
    "a/../b",
    "a/./b",
    "a/..",
    "/",
    "a\0b",
    f"a/b{TEMPORARY_SUFFIX}",
    LOCK_NAME,
)
ACTIONS: dict[str, Callable[[Storage, str], object]] = {
    "get": lambda storage, key: storage.get(key),
    "get_ranges": lambda storage, key: storage.get_ranges(key, [(0, 1)]),
    "open": lambda storage, key: storage.open(key),
    "stat": lambda storage, key: storage.stat(key),
    "put": lambda storage, key: storage.put(key, [b"x"]),
    "put_if_absent": lambda storage, key: storage.put_if_absent(key, [b"x"]),
    "put_if_match": lambda storage, key: storage.put_if_match(key, [b"x"], "etag"),
    "writer": lambda storage, key: storage.writer(key).__enter__(),
    "delete": lambda storage, key: storage.delete(key),
    "copy from": lambda storage, key: storage.copy(key, "copy"),
    "copy to": lambda storage, key: storage.copy("there", key),
    "link from": lambda storage, key: storage.link(key, "link"),
    "link to": lambda storage, key: storage.link("there", key),
    "below": lambda storage, key: storage.below(key),
}


class StorageTests:
    """What a storage promises by `Storage`, as tests.

    They ask for a fixture `storage`, fresh and empty, and for two methods that reach the bytes without the storage.
    """

    def raw_set(self, storage: Storage, key: str, data: bytes) -> None:
        """Put the bytes of an object in place by other means than the storage's own."""
        raise NotImplementedError

    def raw_get(self, storage: Storage, key: str) -> bytes | None:
        """Return the bytes of an object by other means; None where there is none."""
        raise NotImplementedError

    def test_bytes_come_back(self, storage: Storage) -> None:
        """What is put is got, and is what others see; what others put is got."""
        storage.put("a/b/c", [b"one", memoryview(b"two"), bytearray(b"three")])
        assert storage.get("a/b/c") == self.raw_get(storage, "a/b/c") == b"onetwothree"
        storage.put("empty", [])
        assert storage.get("empty") == self.raw_get(storage, "empty") == b""
        self.raw_set(storage, "a/other", b"theirs")
        assert storage.get("a/other") == b"theirs"

    def test_names_of_any_text_come_back(self, storage: Storage) -> None:
        """Blanks, signs and letters beyond ASCII are text as any other."""
        keys = sorted(["a b", "a#1", "a?b=c", "a%20b", "é/ü", "日本", "...", ".hidden", "a.partial.b", "x/.lock"])
        for key in keys:
            storage.put(key, [key.encode()])
        assert [*storage.list()] == keys
        assert [storage.get(key).decode() for key in keys] == keys

    def test_a_put_replaces_and_the_etag_follows(self, storage: Storage) -> None:
        """Equal etags, equal bytes; each put gives the etag that `stat` then says, also of bytes of equal length."""
        etags = [storage.put("a", [data]) for data in (b"one", b"two", b"six", b"one", b"longer")]
        found = storage.stat("a")
        assert found is not None
        assert (found.etag, found.n_bytes, storage.get("a")) == (etags[-1], 6, b"longer")
        assert len({*etags[:3], etags[4]}) == 4
        assert storage.stat("a") == found
        self.raw_set(storage, "a", b"theirs, longer")
        changed = storage.stat("a")
        assert changed is not None
        assert changed.etag != found.etag

    def test_a_put_that_breaks_off_changes_nothing(self, storage: Storage) -> None:
        """Neither a new object nor an old one shows that somebody began; others see nothing half made."""
        storage.put("old", [b"whole"])
        for key in ("old", "new", "deep/er/new"):
            with pytest.raises(RuntimeError, match="in the middle"):
                storage.put(key, self.broken(storage, key))
        assert [*storage.list()] == ["old"]
        assert [*storage.leftovers()] == []
        assert (storage.get("old"), self.raw_get(storage, "new")) == (b"whole", None)

    def broken(self, storage: Storage, key: str) -> Iterator[bytes]:
        """Yield some bytes, look at what is seen of them, and raise."""
        before = self.raw_get(storage, key)
        yield b"half"
        assert self.raw_get(storage, key) == before
        assert [*storage.list()] == ["old"]
        raise RuntimeError("in the middle")

    def test_a_stream_is_there_in_the_end(self, storage: Storage) -> None:
        """A writer of Parquet can write into it; an error and `abort` leave what was there."""
        table = pa.table({"row": range(1000)})
        with storage.writer("tables/a.parquet") as sink, pq.ParquetWriter(sink, table.schema) as writer:
            writer.write_table(table)
            assert storage.stat("tables/a.parquet") is None
        data = storage.get("tables/a.parquet")
        assert (sink.tell(), pq.read_table(pa.BufferReader(data))) == (len(data), table)
        with pytest.raises(RuntimeError, match="no more"):
            self.break_off(storage, "tables/a.parquet")
        for key in ("tables/a.parquet", "new"):
            with storage.writer(key) as sink:
                sink.write(b"half")
                sink.abort()
        assert storage.get("tables/a.parquet") == data
        assert [*storage.list(), *storage.leftovers()] == ["tables/a.parquet"]

    def break_off(self, storage: Storage, key: str) -> None:
        """Raise in the middle of a stream."""
        with storage.writer(key) as sink:
            sink.write(b"half")
            raise RuntimeError("no more")

    def test_ranges(self, storage: Storage) -> None:
        """Many, in any order, overlapping, empty; past the end there is an error that names the object."""
        data = bytes(range(256)) * 40
        storage.put("a/b", [data])
        ranges = [(9000, 10_240), (0, 1), (5, 5), (3, 300), (100, 200), (0, len(data)), (10_240, 10_240)]
        assert [*storage.get_ranges("a/b", ranges)] == [data[start:end] for start, end in ranges]
        assert [*storage.get_ranges("a/b", [])] == []
        for start, end in ((10_000, 10_241), (10_241, 10_242), (-1, 1), (2, 1)):
            with pytest.raises(CorruptStoreError, match=r"a/b has 10240 bytes; wanted are those from"):
                storage.get_ranges("a/b", [(0, 1), (start, end)])

    def test_an_open_object_is_what_was_opened(self, storage: Storage) -> None:
        """Reading at random, into a buffer and piece by piece goes on while the object is replaced and deleted."""
        etag = storage.put("a", [b"0123456789"])
        with storage.open("a") as reader:
            assert (reader.n_bytes, reader.size_now(), reader.etag) == (10, 10, etag)
            storage.put("a", [b"new"])
            storage.delete("a")
            buffer = bytearray(3)
            reader.read_into(4, memoryview(buffer))
            reader.will_need(2, 5)
            assert (reader.read(2, 5), bytes(buffer)) == (b"234", b"456")
            assert [*reader.pieces(at_once=4)] == [b"0123", b"4567", b"89"]
            with pytest.raises(CorruptStoreError, match="has 10 bytes"):
                reader.read_into(8, memoryview(buffer))
            reader.close()

    def test_a_map_where_there_are_maps(self, storage: Storage) -> None:
        """It outlives its reader; a storage without says so."""
        storage.put("a", [b"0123456789"])
        reader = storage.open("a")
        if not storage.capabilities.map:
            with pytest.raises(OSError, match="cannot be mapped"):
                reader.map()
            return
        with reader.map() as mapped:
            reader.close()
            assert (mapped[2:5], mapped.size()) == (b"234", 10)
            with pytest.raises(TypeError):
                mapped[0] = 1

    def test_the_limit_is_held_before_reading(self, storage: Storage) -> None:
        """One byte more than the limit is refused."""
        storage.put("a", [bytes(100)])
        assert len(storage.get("a", limit=100)) == len(storage.get("a", limit=None)) == 100
        with pytest.raises(CorruptStoreError, match="a is larger than any such file: more than 99 bytes"):
            storage.get("a", limit=99)

    def test_what_is_not_there(self, storage: Storage) -> None:
        """The error is FileNotFoundError, with the whole name; `stat` is None, and to delete it is no error."""
        storage.put("there/too", [b"x"])
        for key in ("a", "there/a", "no/such/folder", "there/too/deep"):
            for action in (storage.get, storage.open, lambda key: storage.copy(key, "b")):
                with pytest.raises((FileNotFoundError, NotADirectoryError)) as error:
                    action(key)
                assert error.value.filename == storage.describe(key)
                assert error.value.strerror
            assert storage.stat(key) is None
            storage.delete(key)
        assert [*storage.list()] == ["there/too"]

    def test_conditions(self, storage: Storage) -> None:
        """A put of a condition that does not hold changes nothing and returns None."""
        if not storage.capabilities.condition:
            pytest.skip("it has no conditional puts")
        assert storage.put_if_match("a", [b"x"], "etag") is None
        first = storage.put_if_absent("a", [b"one"])
        assert first is not None
        assert storage.put_if_absent("a", [b"two"]) is None
        second = storage.put_if_match("a", [b"two"], first)
        assert second not in (None, first)
        assert storage.put_if_match("a", [b"six"], first) is None
        found = storage.stat("a")
        assert found is not None
        assert (storage.get("a"), found.etag) == (b"two", second)
        storage.delete("a")
        assert storage.put_if_match("a", [b"six"], found.etag) is None
        assert storage.put_if_absent("a", [b"new"]) is not None
        assert [*storage.list(), *storage.leftovers()] == ["a"]

    def test_of_many_at_once_one_wins(self, storage: Storage) -> None:
        """Twenty threads want to create one object, or to replace the same state of it: exactly one does."""
        if not storage.capabilities.condition:
            pytest.skip("it has no conditional puts")
        for _ in range(5):
            storage.delete("a")
            won = self.race(lambda number: storage.put_if_absent("a", [b"%d" % number, b"!"]))
            assert storage.get("a") == b"%d!" % won
            found = storage.stat("a")
            assert found is not None
            etag = found.etag
            won = self.race(lambda number: storage.put_if_match("a", [b"%d" % number, b"?"], etag))  # noqa: B023
            assert storage.get("a") == b"%d?" % won

    def test_of_many_plain_puts_one_stays_whole(self, storage: Storage) -> None:
        """Twenty threads put different bytes under one key: those of one of them are there in the end."""
        with ThreadPoolExecutor(N_THREADS) as pool:
            etags = [*pool.map(lambda number: storage.put("a", [b"%03d" % number] * 1000), range(N_THREADS))]
        data, found = storage.get("a"), storage.stat("a")
        assert data == data[:3] * 1000
        assert found is not None
        assert found.etag == etags[int(data[:3])]

    def race(self, put: Callable[[int], str | None]) -> int:
        """Have all threads put at once; returns the number of the only one whose put took place."""
        start = threading.Barrier(N_THREADS)

        def one(number: int) -> str | None:
            start.wait()
            return put(number)

        with ThreadPoolExecutor(N_THREADS) as pool:
            won = [number for number, etag in enumerate(pool.map(one, range(N_THREADS))) if etag is not None]
        assert len(won) == 1
        return won[0]

    def test_listing(self, storage: Storage) -> None:
        """In the order of the text, at any depth; of a folder only what is below it, not what begins alike."""
        keys = ["a", "a.b", "b/1/x", "b/10/x", "b/2", "b/2x", "b.c", "bc/d", "c-d/e", "c/d/e/f", "Z/a"]
        for key in keys:
            storage.put(key, [b""])
        assert [*storage.list()] == sorted(keys)
        assert [*storage.list("b")] == ["b/1/x", "b/10/x", "b/2", "b/2x"]
        assert [*storage.list("b/1")] == ["b/1/x"]
        assert [*storage.list("c")] == ["c/d/e/f"]
        assert [*storage.list("a")] == [*storage.list("nothing")] == [*storage.list("a/b")] == []
        storage.delete("b/2")
        assert [*storage.list("b")] == ["b/1/x", "b/10/x", "b/2x"]

    def test_a_folder_is_a_storage(self, storage: Storage) -> None:
        """`below` has the keys of the folder, and shares its objects."""
        storage.put("a/b/c", [b"x"])
        below = storage.below("a").below("b")
        assert (below.get("c"), [*below.list()], below.describe("c")) == (b"x", ["c"], storage.describe("a/b/c"))
        below.put("d/e", [b"y"])
        assert storage.get("a/b/d/e") == b"y"

    def test_an_empty_storage_is_empty(self, storage: Storage) -> None:
        """Nothing was put there yet: nothing is found, and nothing is made by looking."""
        assert [*storage.list(), *storage.list("a"), *storage.leftovers()] == []
        assert storage.stat("a") is None
        storage.delete("a")
        storage.sweep()
        with pytest.raises(FileNotFoundError):
            storage.get("a")
        free = storage.free_bytes()
        assert free is None or free > 0

    def test_copies_and_links(self, storage: Storage) -> None:
        """A copy replaces, a link does not; neither follows what becomes of the first."""
        storage.put("a", [b"one"])
        storage.put("copy", [b"old"])
        storage.copy("a", "copy")
        assert storage.link("a", "deep/link") is not None
        assert storage.link("copy", "deep/link") is None
        storage.put("a", [b"two"])
        storage.delete("a")
        assert (storage.get("copy"), storage.get("deep/link")) == (b"one", b"one")
        with pytest.raises(FileNotFoundError):
            storage.link("a", "b")
        assert [*storage.list(), *storage.leftovers()] == ["copy", "deep/link"]

    @pytest.mark.parametrize("action", ACTIONS)
    def test_a_bad_key_is_refused_before_anything_happens(self, storage: Storage, action: str) -> None:
        """No key leaves the root, and none has two spellings."""
        storage.put("there", [b"x"])
        for key in BAD_KEYS:
            with pytest.raises(CorruptStoreError, match="is no name of an object"):
                ACTIONS[action](storage, key)
        for folder in {*BAD_KEYS} - {""}:
            with pytest.raises(CorruptStoreError, match="is no name of an object"):
                [*storage.list(folder)]
        assert [*storage.list(), *storage.leftovers()] == ["there"]

    def test_one_writer_at_a_time(self, storage: Storage) -> None:
        """The lock keeps others out, an equal storage too, and is free when the block ends, however it does."""
        for named in (True, False):
            with storage.lock(named=named):
                for other in (storage, self.again(storage)):
                    with pytest.raises(StoreLockedError, match="is being written by"), other.lock(named=named):
                        pass
                storage.put("a", [b"x"])
            with pytest.raises(RuntimeError, match="broken"), storage.lock(named=named):
                raise RuntimeError("broken")
            with storage.lock(named=named):
                pass
        assert [*storage.list(), *storage.leftovers()] == ["a"]

    def test_it_can_be_sent(self, storage: Storage) -> None:
        """A pickled storage comes back as one of the same objects."""
        storage.put("a/b", [b"x"])
        again = self.again(storage)
        assert (again.get("a/b"), str(again)) == (b"x", str(storage))
        again.put("c", [b"y"])
        assert storage.get("c") == b"y"
        assert self.again(storage.below("a")).get("b") == b"x"

    def again(self, storage: Storage) -> Storage:
        """Return the storage as another process would get it."""
        again: Storage = pickle.loads(pickle.dumps(storage))
        return again

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_it_lives_on_after_a_fork(self, storage: Storage) -> None:
        """A forked process reads and writes as if nothing had happened."""
        storage.put("a", [b"x"])
        reader = storage.open("a")
        child = os.fork()
        if child == 0:
            try:
                with storage.lock():
                    storage.put("b", [b"y"])
                os._exit(0 if (reader.read(0, 1), storage.get("a"), storage.get("b")) == (b"x", b"x", b"y") else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert reader.read(0, 1) == storage.get("a") == b"x"
        with storage.lock():
            pass

    def test_messages_name_objects_without_secrets(self, storage: Storage) -> None:
        """The text of an object begins with that of the root, ends with the key, and has no query."""
        assert storage.describe("a/b").startswith(str(storage))
        assert storage.describe("a/b").endswith("/a/b")
        assert storage.describe() == str(storage)
        assert "?" not in storage.describe("a/b")
