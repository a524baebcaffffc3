"""The counting storage passes the shipped suite, and counts."""

import pytest

from coldtap.stores.storage.address import storage_at
from coldtap.stores.storage.counted import CountedStorage, opened
from tests.stores.storage.test_memory import TestMemoryStorage


class TestCountedStorage(TestMemoryStorage):
    @pytest.fixture
    def storage(self):
        return CountedStorage()


def test_whole_reads_are_counted_by_key():
    storage = storage_at("counted:here")
    storage.put("read twice", [b"x"])
    assert storage.get("read twice") == storage.get("read twice")
    assert opened["read twice"] == 2
