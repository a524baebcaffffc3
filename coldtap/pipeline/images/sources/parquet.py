"""Parquet files with the images in them: columns image and label, optionally label_name, split, id.

`label` holds an integer, or a list of integers or names where an image has any number of labels.
`image` holds bytes, or the {bytes, path} struct of Hugging Face. One file, or a folder of files.
"""

import bisect
import itertools
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coldtap.errors import SourceError
from coldtap.pipeline.images.decode import BadImageError
from coldtap.pipeline.images.sources.columns import (
    OPTIONAL_COLUMNS,
    class_names_of,
    labels_of,
    require_columns,
    strings,
    whole_strings,
)
from coldtap.pipeline.images.sources.files import read_file
from coldtap.pipeline.images.sources.listing import Listing, fingerprint_of, make_listing
from coldtap.pipeline.images.sources.splits import Labels, canonical_split
from coldtap.pipeline.images.sources.spool import SharedSpool, Spool
from coldtap.stores.format.canonical import parse_json


@dataclass(frozen=True, slots=True)
class _File:
    """One Parquet file, without its images."""

    path: str
    relative: str  # to the folder that the user named
    columns: pa.Table
    class_names: list[str] | None  # as Hugging Face's metadata has them
    size: str  # stands for the sizes of the images


class _Rows:
    """Which row of which file a sample is, from path and number of rows of each file."""

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self.files = files
        self._starts = list(itertools.accumulate((rows for _, rows in files), initial=0))

    def locate(self, index: int) -> tuple[str, int]:
        """Return the path of the file, and the row within it from 0."""
        number = bisect.bisect_right(self._starts, index) - 1
        return self.files[number][0], index - self._starts[number]

    def where(self, index: int) -> str:
        """Return 'FILE row N'."""
        path, row = self.locate(index)
        return f"{path} row {row}"


class ParquetSource:
    """Images in the rows of Parquet files. Nothing of the image column is read before the first image is."""

    def __init__(self, name: str, listing: Listing, rows: _Rows) -> None:
        self.name = name
        self.listing = listing
        self._rows = rows
        self._spool: Spool | None = None
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image; the first call copies all images to a temporary file.

        Raises:
            BadImageError: the row has neither bytes nor a path that can be read.
            SourceError: the files are broken or have changed.
            MachineError: there is no room for the temporary file.
        """
        found = self._spooled().read(index)
        if isinstance(found, bytes):
            return found
        if found is None:
            raise BadImageError("null image")
        folder = os.path.dirname(self._rows.locate(index)[0])
        return read_file(os.path.join(folder, found))

    def where(self, index: int) -> str:
        """Return 'FILE row N', counting from 0 within the file."""
        return self._rows.where(index)

    def share_spool(self) -> SharedSpool:
        """Return what another process needs to read the images without a copy of its own; raises as `read`."""
        return self._spooled().share()

    def use_spool(self, shared: SharedSpool) -> None:
        """Read from the spool of another process of this machine, if it can be reached."""
        with self._lock:
            if self._spool is None:
                self._spool = Spool.join(shared)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "listing": self.listing, "_rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"], state["listing"], state["_rows"])  # type: ignore[misc] # a lock of its own

    def _spooled(self) -> Spool:
        with self._lock:
            if self._spool is None:
                self._spool = Spool(self._rows.files)
            return self._spool


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a folder, of its data/ and of its split folders, sorted."""
    below = [path for path in folder.iterdir() if path.name == "data" or canonical_split(path.name)]
    found = [file for place in [folder, *below] if place.is_dir() for file in place.glob("*.parquet")]
    return sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def open_parquet(path: Path, *, labels: Labels, seed: int) -> ParquetSource:
    """List a Parquet file, or a folder of them.

    The split of a sample is its split column, else the file's name (train-00000-of-00002.parquet) or folder.
    Its id is the id column, else the struct's path if that is unique, else FILE:row.

    Raises:
        SourceError: a file cannot be read, lacks columns, or has others than the first.
    """
    name = str(path)
    root = path if path.is_dir() else path.parent
    files = [_open_file(file, root, labels) for file in (parquet_files(path) if path.is_dir() else [path])]
    table = _one_table(files)
    rows = _Rows([(file.path, file.columns.num_rows) for file in files])
    ids = whole_strings(table, "id", name=name) or _unique_paths(table, name) or _numbered(files)
    listing = make_listing(
        name=name,
        ids=ids,
        splits=_splits(files, table, name),
        targets=labels_of(table, name=name),
        class_names=class_names_of(table, name=name) or files[0].class_names,
        fingerprint=fingerprint_of(ids, more=[file.size for file in files], name=name),
        place=rows.where,
        labels=labels,
        seed=seed,
    )
    return ParquetSource(name, listing, rows)


def _open_file(path: Path, root: Path, labels: Labels) -> _File:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = ("image", "label") if labels == "required" else ("image",)
            require_columns(schema.names, wanted, name=str(path))
            has_path = _check_image_type(schema.field("image").type, path)
            columns = [column for column in ("label", *OPTIONAL_COLUMNS) if column in schema.names]
            table = file.read([*columns, "image.path"] if has_path and "id" not in columns else columns)
            # A table without columns has no number of rows.
            table = table.append_column("nothing", pa.nulls(file.metadata.num_rows))
            size = _size_of_images(file.metadata)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: not a Parquet file that can be read: {error}") from error
    return _File(str(path), path.relative_to(root).as_posix(), table, _hugging_face_names(schema), size)


def _check_image_type(kind: pa.DataType, path: Path) -> bool:
    """Check the type of the image column, and say whether it is a struct with paths."""
    is_struct = pa.types.is_struct(kind)
    if is_struct and kind.get_field_index("bytes") >= 0:
        return bool(kind.get_field_index("path") >= 0)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        raise SourceError(f"{path}: column image is {kind}; wanted bytes, or a struct of bytes and path")
    return False


def _size_of_images(metadata: pq.FileMetaData) -> str:
    sizes = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(column) for column in range(group.num_columns))
        image = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == "image"]
        sizes.append(f"{group.num_rows}:{sum(chunk.total_uncompressed_size for chunk in image)}")
    return " ".join(sizes)


def _hugging_face_names(schema: pa.Schema) -> list[str] | None:
    """Return the names of a ClassLabel, which Hugging Face's datasets writes into the schema's metadata."""
    try:
        label = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]
        one = label[0] if isinstance(label, list) else label.get("feature", label)  # of a list, or of a sequence
        return [str(name) for name in one["names"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def _one_table(files: list[_File]) -> pa.Table:
    first = files[0]
    for file in files:
        if set(file.columns.column_names) != set(first.columns.column_names):
            raise SourceError(f"{file.path}: columns {_named(file)}, but {_named(first)} in {first.path}")
    return pa.concat_tables([file.columns for file in files], promote_options="permissive")


def _named(file: _File) -> str:
    return ", ".join(column for column in file.columns.column_names if column != "nothing")


def _unique_paths(table: pa.Table, name: str) -> list[str] | None:
    if "image" not in table.column_names:
        return None
    paths = strings(pa.table({"path": pc.struct_field(table["image"], "path")}), "path", name=name) or []
    found = [path for path in paths if path]
    return found if len(found) == len(paths) == len(set(found)) else None


def _numbered(files: list[_File]) -> list[str]:
    return [f"{file.relative}:{row}" for file in files for row in range(file.columns.num_rows)]


def _splits(files: list[_File], table: pa.Table, name: str) -> list[str | None] | None:
    column = strings(table, "split", name=name)
    if column is not None:
        return column
    by_file = [_split_of_name(file.relative) for file in files]
    if not any(by_file):
        return None
    if None in by_file:
        named, unnamed = next(filter(None, by_file)), files[by_file.index(None)].relative
        raise SourceError(f"{name}: another file is {named} by its name, but {unnamed} names no split")
    return [split for split, file in zip(by_file, files, strict=True) for _ in range(file.columns.num_rows)]


def _split_of_name(relative: str) -> str | None:
    folder, _, file = relative.rpartition("/")
    word = re.split(r"[-_.]", file, maxsplit=1)[0]
    return canonical_split(word) or canonical_split(folder)
