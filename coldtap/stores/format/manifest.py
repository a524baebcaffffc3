"""The manifest: `sha256 bytes name` for every file, sorted by name, written last.

A name with `#tap` after it is one tap's chunks inside a `layers` shard, so that a part of a store can be
checked alone. The store's digest is the SHA-256 of the manifest's bytes.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from coldtap.errors import CorruptStoreError

MANIFEST = "manifest"
FEATURES = "features.zarr"
SHORTEST_LINE = len(f"{'0' * 64} 0 x\n")
_LINE = re.compile(r"([0-9a-f]{64}) (\d{1,18}) (\S.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the manifest; `name` is relative to the store, with `/` between parts."""

    sha256: str
    n_bytes: int
    name: str


class Manifest:
    """A manifest's lines. A store of ten million rows has half a million: they are looked up, not parsed, one by one.

    Attributes:
        digest: SHA-256 of the whole: the store's digest.
    """

    def __init__(self, data: bytes | bytearray, *, where: str) -> None:
        """Parse nothing yet; `where` names the file in errors."""
        self._data, self._where = data, where
        self.digest = hashlib.sha256(data).hexdigest()

    @property
    def most_lines(self) -> int:
        """No more lines than this; they are not counted."""
        return len(self._data) // SHORTEST_LINE

    def find(self, name: str) -> Entry | None:
        """Return the entry of a name, by bisection over the sorted lines.

        Raises:
            CorruptStoreError: a line on the way is not of its form.
        """
        low, high = 0, len(self._data)
        wanted = name.encode()
        while low < high:
            start = self._data.rfind(b"\n", low, (low + high) // 2) + 1 or low
            start = max(start, low)
            end = self._data.find(b"\n", start)
            end = len(self._data) if end < 0 else end
            entry = self._parse(start, end)
            found = entry.name.encode()
            if found == wanted:
                return entry
            if found < wanted:
                low = end + 1
            else:
                high = start
        return None

    def entries(self) -> dict[str, Entry]:
        """Return every entry by name.

        Raises:
            CorruptStoreError: a line is not of its form, stands twice or in the wrong order, or leaves the store.
        """
        entries: dict[str, Entry] = {}
        start, last = 0, ""
        while start < len(self._data):
            end = self._data.find(b"\n", start)
            end = len(self._data) if end < 0 else end
            entry = self._parse(start, end)
            if entry.name <= last:
                raise self._damaged(start)
            entries[entry.name] = entry
            start, last = end + 1, entry.name
        return entries

    def _parse(self, start: int, end: int) -> Entry:
        match = _LINE.fullmatch(self._data[start:end].decode(errors="replace"))
        if match is None or ".." in match[3].split("/") or match[3].startswith("/"):
            raise self._damaged(start)
        return Entry(sha256=match[1], n_bytes=int(match[2]), name=match[3])

    def _damaged(self, start: int) -> CorruptStoreError:
        line = self._data.count(b"\n", 0, start) + 1
        return CorruptStoreError(
            f"{self._where}, line {line}: not `sha256 bytes name` of a file in the store, in the order of the names"
        )


def manifest_bytes(entries: Iterable[Entry]) -> bytes:
    """Return the bytes of a manifest of these entries, which may be in any order."""
    lines = sorted((entry.name.encode(), f"{entry.sha256} {entry.n_bytes} {entry.name}\n") for entry in entries)
    return "".join(line for _, line in lines).encode()
