"""Where images come from: folders, Parquet files, VTAB-1K folders, lists of paths, Python objects."""

import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from coldtap.errors import MachineError, SourceError
from coldtap.pipeline.images.sources.folder import open_folder
from coldtap.pipeline.images.sources.indexable import Indexable, IndexableSource
from coldtap.pipeline.images.sources.listing import Listing, Source
from coldtap.pipeline.images.sources.parquet import open_parquet, parquet_files
from coldtap.pipeline.images.sources.splits import Labels
from coldtap.pipeline.images.sources.table import open_table
from coldtap.pipeline.images.sources.vtab import is_vtab, open_vtab

__all__ = ["Labels", "Listing", "Source", "open_source"]

ACCEPTED = (
    "a folder of class folders, a VTAB-1K folder (train800.txt, val200.txt, test.txt), a .parquet file or a folder "
    "of them, a .csv or .parquet list of paths, or from Python any indexable of (image, target)"
)


def open_source(source: object, *, labels: Labels = "required", seed: int = 0) -> Source:
    """List a source, whatever it is, without reading its images.

    Args:
        source: a path, an indexable of (image, target), or a dict of such by split.
        labels: 'required' to train from it: labels without gaps, two classes, a train split; a missing val split
            is cut from train. 'optional' only to look at it: any images will do, samples without a split are
            test, and no val split is cut.
        seed: draws the val split that is cut from train.

    Raises:
        SourceError: the source cannot be used, or is none that is known.
        MachineError: it cannot be reached.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source), labels, seed)
    if isinstance(source, (Mapping, Indexable)) and not isinstance(source, (bytes, bytearray)):
        return IndexableSource(source, labels=labels, seed=seed)
    raise SourceError(f"source is a {type(source).__name__}; wanted {ACCEPTED}")


def _open_path(path: Path, labels: Labels, seed: int) -> Source:
    try:
        if path.is_dir():
            return _open_directory(path, labels, seed)
        if path.is_file():
            return _open_file(path, labels, seed)
    except PermissionError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from error
    if path.exists():
        raise SourceError(f"{path}: neither a file nor a folder; wanted {ACCEPTED}")
    raise SourceError(f"{path}: no such file or folder")


def _open_directory(path: Path, labels: Labels, seed: int) -> Source:
    if is_vtab(path):
        return open_vtab(path, labels=labels, seed=seed)
    if parquet_files(path):
        return open_parquet(path, labels=labels, seed=seed)
    return open_folder(path, labels=labels, seed=seed)


def _open_file(path: Path, labels: Labels, seed: int) -> Source:
    if path.suffix.lower() == ".csv":
        return open_table(path, labels=labels, seed=seed)
    if path.suffix.lower() != ".parquet":
        raise SourceError(f"{path}: a {path.suffix or 'nameless'} file is no source; wanted {ACCEPTED}")
    if _is_list_of_paths(path):
        return open_table(path, labels=labels, seed=seed)
    return open_parquet(path, labels=labels, seed=seed)


def _is_list_of_paths(path: Path) -> bool:
    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: not a Parquet file: {error}") from error
    return "path" in columns and "image" not in columns
