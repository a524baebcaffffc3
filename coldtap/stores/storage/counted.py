"""A storage in memory that counts what is opened, to show how many requests a work would make elsewhere."""

from collections import Counter

from coldtap.stores.storage.contract import Reader
from coldtap.stores.storage.memory import MemoryStorage

opened: Counter[str] = Counter()


class CountedStorage(MemoryStorage):
    """Objects in memory, each opening counted by its key."""

    def open(self, key: str) -> Reader:
        """Open an object; raises as `Storage.open` does."""
        opened[key] += 1
        return super().open(key)
