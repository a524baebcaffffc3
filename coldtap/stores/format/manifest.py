"""The manifest: `sha256 bytes name` for every file, sorted by name, written last.

The root, `manifest`, lists the small files and the parts, `manifest-parts/<sha256>`; a part lists what up to
`BLOCKS_A_PART` blocks wrote, each part in lines of the same form. The store's digest is the SHA-256 of the root. In a
store of format 1 the root lists all, and a name with `#tap` after it is one tap's chunks inside a `layers` shard.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coldtap.errors import CorruptStoreError

MANIFEST = "manifest"
MANIFEST_PARTS = "manifest-parts"
BLOCKS_A_PART = 4096
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
    """All that a manifest lists: its own lines, the root, and those of the parts that it names.

    Attributes:
        digest: SHA-256 of the root: the store's digest.
    """

    def __init__(self, root: "ManifestLines", parts: Sequence["ManifestLines"] = ()) -> None:
        """Parse nothing yet."""
        self._root, self._parts = root, parts
        self.digest = root.sha256

    @property
    def most_lines(self) -> int:
        """No more lines than this; they are not counted."""
        return sum(lines.most_lines for lines in (self._root, *self._parts))

    def find(self, name: str) -> Entry | None:
        """Return the entry of a name; raises as `ManifestLines.find`."""
        found = (lines.find(name) for lines in (self._root, *self._parts))
        return next((entry for entry in found if entry is not None), None)

    def root_entries(self) -> dict[str, Entry]:
        """Return the root's own entries by name, sorted: small files, and parts; raises as `ManifestLines.entries`."""
        return self._root.entries()

    def entries(self) -> dict[str, Entry]:
        """Return every entry by name, sorted.

        Raises:
            CorruptStoreError: a line is not of its form, stands twice or in the wrong order, or leaves the store.
        """
        every = self._root.entries()
        for part in self._parts:
            entries = part.entries()
            if twice := min(entries.keys() & every.keys(), default=None):
                raise CorruptStoreError(f"{part.where}: {twice} is listed elsewhere too")
            every |= entries
        return dict(sorted(every.items(), key=lambda item: item[0].encode())) if self._parts else every


class ManifestLines:
    """The lines of the root or of a part, of which there may be half a million: looked up, not parsed, one by one.

    Attributes:
        where: the file, for errors.
        sha256: of the whole.
    """

    def __init__(self, data: bytes | bytearray, *, where: str) -> None:
        """Parse nothing yet."""
        self._data, self.where = data, where
        self.sha256 = hashlib.sha256(data).hexdigest()

    @property
    def most_lines(self) -> int:
        """No more lines than this; they are not counted."""
        return len(self._data) // SHORTEST_LINE

    def parts(self) -> list[Entry]:
        """Return the entries of the parts that are named here.

        Raises:
            CorruptStoreError: such a line is not of its form, or the name is not that of the digest.
        """
        found, at = [], 0
        while (at := self._data.find(f" {MANIFEST_PARTS}/".encode(), at)) >= 0:
            start, end = self._data.rfind(b"\n", 0, at) + 1, self._data.find(b"\n", at)
            entry = self._parse(start, len(self._data) if end < 0 else end)
            if entry.name != part_name(entry.sha256):
                raise self._damaged(start)
            found.append(entry)
            at += 1
        return found

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
            f"{self.where}, line {line}: not `sha256 bytes name` of a file in the store, in the order of the names"
        )


def part_name(sha256: str) -> str:
    """Path of a part of this digest under the store."""
    return f"{MANIFEST_PARTS}/{sha256}"


def manifest_bytes(entries: Iterable[Entry]) -> bytes:
    """Return the bytes of a root or a part of these entries, which may be in any order."""
    lines = sorted((entry.name.encode(), f"{entry.sha256} {entry.n_bytes} {entry.name}\n") for entry in entries)
    return "".join(line for _, line in lines).encode()
