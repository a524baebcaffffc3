"""Images of Parquet files in a form that threads can read in any order.

Parquet is read in runs of rows; a job reads rows shuffled. So all images are copied once, batch by batch, into
one temporary file, and read from there by offset. `pread` and not a memory map: pages of a map count as memory of
the process, which would then grow with the data set. The file has no name, so it vanishes with the process,
however that ends. It lies in the folder for temporary files (TMPDIR) and is as large as the images together.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coldtap.errors import MachineError, SourceError

BATCH_ROWS = 64
_BYTES, _PATH, _NOTHING = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpool:
    """How another process of this machine finds a spool.

    Attributes:
        path: the open file, under the process that made it.
        identity: device, inode and size in bytes of that file.
        offsets: where each image begins.
        kinds: what stands for it.
    """

    path: str
    identity: tuple[int, int, int]
    offsets: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]


class Spool:
    """The image column of some Parquet files, in a temporary file.

    Args:
        files: path and number of rows of each.

    Raises:
        SourceError: a file is broken, or no longer what it was when it was listed.
        MachineError: the temporary file cannot be written, as on a full disk.
    """

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        n_rows = sum(rows for _, rows in files)
        self._offsets = np.zeros(n_rows + 1, dtype=np.int64)
        self._kinds = np.zeros(n_rows, dtype=np.uint8)
        self._file = _nameless_file()
        weakref.finalize(self, os.close, self._file)
        row = 0
        for path, rows in files:
            end = row + rows
            for images in _image_batches(path):
                if row + len(images) <= end:
                    self._append(images, row)
                row += len(images)
            if row != end:
                raise SourceError(f"{path}: {rows} rows when it was listed, now another number; list it again")

    def read(self, row: int) -> bytes | str | None:
        """Return the bytes of an image, the path that a struct has in their place, or None."""
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        stored = os.pread(self._file, end - start, start)
        if len(stored) != end - start:
            raise MachineError(f"{tempfile.gettempdir()}: reading the images spooled there failed")
        kind = self._kinds[row]
        return stored if kind == _BYTES else stored.decode() if kind == _PATH else None

    def share(self) -> SharedSpool:
        """Return what another process needs to read this spool while this process lives."""
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        return SharedSpool(path=path, identity=_identity(self._file), offsets=self._offsets, kinds=self._kinds)

    @classmethod
    def join(cls, shared: SharedSpool) -> "Spool | None":
        """Return another process's spool, or None where it cannot be reached: on another machine, or without /proc."""
        try:
            file = os.open(shared.path, os.O_RDONLY)
        except OSError:
            return None
        if _identity(file) != shared.identity:
            os.close(file)
            return None
        spool = cls.__new__(cls)
        spool._offsets, spool._kinds, spool._file = shared.offsets, shared.kinds, file
        weakref.finalize(spool, os.close, file)
        return spool

    def _append(self, images: pa.Array, row: int) -> None:
        """Write images, of shape (row,), binary or struct, at a row."""
        kinds = np.full(len(images), _BYTES, dtype=np.uint8)
        if pa.types.is_struct(images.type):
            kinds[pc.is_null(pc.struct_field(images, "bytes")).to_numpy(zero_copy_only=False)] = _PATH
            images = _bytes_or_path(images)
        values = images.cast(pa.large_binary())
        kinds[values.is_null().to_numpy(zero_copy_only=False)] = _NOTHING
        _, offsets, data = values.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
        if data is not None:
            _write(self._file, memoryview(data)[ends[0] : ends[-1]])
        self._kinds[row : row + len(values)] = kinds
        self._offsets[row + 1 : row + len(values) + 1] = ends[1:] - ends[0] + self._offsets[row]


def _image_batches(path: str) -> Iterator[pa.Array]:
    try:
        # By default whole row groups, and the column of all of them, would be read into memory beforehand.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=["image"], use_threads=False):
                yield batch.column(0)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: the image column cannot be read: {error}") from error


def _bytes_or_path(images: pa.Array) -> pa.Array:
    encoded = pc.struct_field(images, "bytes").cast(pa.large_binary())
    if images.type.get_field_index("path") < 0:
        return encoded
    return pc.coalesce(encoded, pc.struct_field(images, "path").cast(pa.large_binary()))


def _nameless_file() -> int:
    try:
        file, path = tempfile.mkstemp(prefix="coldtap-images-")
        os.unlink(path)
    except OSError as error:
        raise MachineError(f"no temporary file for the images: {error.strerror}; set TMPDIR") from error
    return file


def _identity(file: int) -> tuple[int, int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size


def _write(file: int, data: memoryview) -> None:
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError as error:
        raise MachineError(
            f"{tempfile.gettempdir()}: images cannot be spooled there: {error.strerror}; "
            "set TMPDIR to a folder with room for all images of the Parquet files"
        ) from error
