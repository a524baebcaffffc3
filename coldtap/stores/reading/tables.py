"""Reading Parquet tables where they lie: only the columns that are wanted, at their places in the file."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.tables import parse_table
from coldtap.stores.storage.contract import Reader, Storage


@contextmanager
def opened_table(storage: Storage, name: str) -> Iterator[pa.NativeFile]:
    """Open a table for the parsers of `format`.

    Raises:
        CorruptStoreError: it is missing, or cannot be read.
    """
    try:
        reader = storage.open(name)
    except OSError as error:
        raise CorruptStoreError(f"{storage.describe(name)} cannot be read: {error}") from error
    with reader:
        yield pa.PythonFile(_SeekableFile(reader), mode="r")


def read_table(storage: Storage, name: str, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a table of the given columns, or some of them; raises as `parse_table` does, or `opened_table`."""
    with opened_table(storage, name) as file:
        return parse_table(file, schema, columns, where=storage.describe(name))


class _SeekableFile(io.RawIOBase):
    """An open object as the file that Arrow wants."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._at = reader, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._reader.n_bytes}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._reader.n_bytes - self._at, 0)
        end = self._at + (left if size is None or size < 0 else min(size, left))
        data = self._reader.read(min(self._at, end), end)
        self._at = end
        return data
