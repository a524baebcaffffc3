"""The storage in memory passes the shipped suite; one name is one place."""

import os
import pickle
import subprocess
import sys

import pytest

from coldtap.errors import StoreError
from coldtap.stores.storage.memory import MemoryStorage
from coldtap.stores.storage.testing import StorageTests


class TestMemoryStorage(StorageTests):
    @pytest.fixture
    def storage(self):
        return MemoryStorage()

    def raw_set(self, storage, key, data):
        storage._space.place(storage._folder + key, data, None)

    def raw_get(self, storage, key):
        found = storage._space.objects.get(storage._folder + key)
        return found.data if found else None


def test_storages_of_one_name_share_their_objects():
    one = MemoryStorage("shared")
    one.put("a", [b"x"])
    assert MemoryStorage("shared").get("a") == b"x"
    assert [*MemoryStorage("other").list()] == [*MemoryStorage().list()] == []
    del one
    assert [*MemoryStorage("shared").list()] == []


def test_another_process_is_told_that_it_cannot_see_it():
    storage = MemoryStorage("here")
    code = f"import pickle; pickle.loads({pickle.dumps(storage)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert "StoreError: memory://here lies in the memory of another process: use a folder that both can see" in (
        result.stderr.replace("coldtap.errors.", "")
    )
    data = pickle.dumps(storage)
    del storage
    with pytest.raises(StoreError, match="memory of another process"):
        pickle.loads(data)
