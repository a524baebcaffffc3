"""A folder of datasets: a Parquet file each, or a folder each in the VTAB-1K layout or with class folders."""

from collections.abc import Collection
from pathlib import Path

from coldtap.errors import MachineError, SourceError
from coldtap.pipeline.images.sources.folder import JUNK_FOLDERS
from coldtap.pipeline.images.sources.parquet import parquet_files
from coldtap.pipeline.images.sources.splits import canonical_split
from coldtap.pipeline.images.sources.vtab import is_vtab
from coldtap.text import a_few

WANTED = (
    "a folder of datasets, each a NAME.parquet, or each a folder NAME in the VTAB-1K layout (train800.txt …), with "
    "class folders, or with Parquet files"
)


def find_datasets(folder: Path, only: Collection[str] = ()) -> dict[str, Path]:
    """Return the datasets in a folder by name, sorted; their images are not read.

    The folder holds a Parquet file per dataset, or a folder per dataset; other files are passed over. `only` are names
    to pick; all by default.

    Raises:
        SourceError: there are none, both kinds, folders that are none, or not those that are picked; or the folder is
            itself a dataset.
        MachineError: it cannot be listed.
    """
    files, folders = _entries(folder)
    if is_vtab(folder) or _are_splits([*files, *folders]):
        raise SourceError(f"{folder} is itself one dataset; wanted {WANTED}: give the folder above it")
    if only and (missing := sorted(set(only) - {*files, *folders})):
        there = a_few([*files, *folders]) or "no dataset"
        raise SourceError(f"{folder} has no dataset {a_few(missing)}; it holds {there}")
    if only:
        files = {name: path for name, path in files.items() if name in only}
        folders = {name: path for name, path in folders.items() if name in only}
    datasets = {name: path for name, path in folders.items() if _is_dataset(path)}
    if files and datasets:
        raise SourceError(
            f"{folder} holds both Parquet files ({a_few(list(files))}) and folders that are datasets "
            f"({a_few(list(datasets))}); keep one kind, or pick some with `sets`"
        )
    if not files and not datasets:
        raise SourceError(f"{folder}: found no dataset; wanted {WANTED}")
    if datasets and (others := [name for name in folders if name not in datasets]):
        raise SourceError(
            f"{folder}: {a_few(others)} beside {a_few(list(datasets))}: neither the list files of VTAB-1K, nor class "
            "folders, nor Parquet files are in there; move it away, or pick the others with `sets`"
        )
    return dict(sorted((files or datasets).items()))


def _entries(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The Parquet files and the folders in a folder, by name."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError as error:
        raise SourceError(f"{folder}: no such folder; wanted {WANTED}") from error
    except NotADirectoryError as error:
        raise SourceError(f"{folder} is a file; wanted {WANTED}") from error
    except OSError as error:
        raise MachineError(f"{folder}: the folder cannot be listed: {error.strerror}") from error
    files = {entry.stem: entry for entry in entries if entry.suffix.lower() == ".parquet" and entry.is_file()}
    folders = {entry.name: entry for entry in entries if entry.is_dir() and entry.name not in JUNK_FOLDERS}
    return files, folders


def _are_splits(names: list[str]) -> bool:
    """Whether these are the splits of one dataset: train/ and test/, or train-00000-of-00002.parquet."""
    return bool(names) and all(canonical_split(name.partition("-")[0]) for name in names)


def _is_dataset(path: Path) -> bool:
    try:
        if is_vtab(path) or parquet_files(path):
            return True
        return any(entry.is_dir() for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise MachineError(f"{path}: the folder cannot be listed: {error.strerror}") from error
