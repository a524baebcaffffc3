"""A VTAB-1K folder: train800.txt, val200.txt and test.txt beside the images, lines of path and label."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldtap.errors import MachineError, SourceError
from coldtap.pipeline.images.sources.files import FileSource, file_sizes
from coldtap.pipeline.images.sources.listing import fingerprint_of, make_listing
from coldtap.pipeline.images.sources.splits import Labels

TRAIN, VAL, UNION, TEST = "train800.txt", "val200.txt", "train800val200.txt", "test.txt"


@dataclass(frozen=True, slots=True)
class _List:
    """The lines of one list file."""

    file: str
    paths: list[str]
    labels: list[int]
    lines: list[int]  # line numbers from 1


def is_vtab(root: Path) -> bool:
    """Say whether a folder has the list files of VTAB-1K."""
    return any((root / file).is_file() for file in (TRAIN, UNION))


def open_vtab(root: Path, *, labels: Labels, seed: int) -> FileSource:
    """List a VTAB-1K folder.

    train800val200 is the union of the other two and is never listed beside them. It stands for train, of which
    a val split is then cut, only where train800 or val200 is missing.

    Raises:
        SourceError: a line is not a path and an integer, or train800val200 is not the union.
    """
    name = str(root)
    lists = {file: _read_list(root, file) for file in (TRAIN, VAL, UNION, TEST) if (root / file).is_file()}
    if TRAIN in lists and VAL in lists:
        used = {"train": lists[TRAIN], "val": lists[VAL]}
        if UNION in lists:
            _check_union(lists[TRAIN], lists[VAL], lists[UNION], name)
    else:
        used = {"train": lists.get(UNION) or lists[TRAIN]}
    if TEST in lists:
        used["test"] = lists[TEST]
    paths = [path for found in used.values() for path in found.paths]
    places = [(found.file, line) for found in used.values() for line in found.lines]
    sizes, missing = file_sizes(name, paths, name=name)
    listing = make_listing(
        name=name,
        ids=paths,
        splits=[split for split, found in used.items() for _ in found.paths],
        targets=np.array([label for found in used.values() for label in found.labels], dtype=np.int64),
        class_names=None,
        fingerprint=fingerprint_of(paths, sizes, name=name),
        place=lambda index: f"{places[index][0]} line {places[index][1]}",
        labels=labels,
        seed=seed,
        notes=[missing],
    )
    return FileSource(name=name, listing=listing, root=name, paths=listing.ids)


def _read_list(root: Path, file: str) -> _List:
    found = _List(file, [], [], [])
    try:
        lines = (root / file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{root / file}: not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise MachineError(f"{root / file}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            path, label = _fields(line, f"{root / file} line {number}")
            found.paths.append(path)
            found.labels.append(label)
            found.lines.append(number)
    if not found.paths:
        raise SourceError(f"{root / file}: no lines; wanted 'path label' in each")
    return found


def _fields(line: str, place: str) -> tuple[str, int]:
    path, _, label = line.strip().replace("\t", " ").rpartition(" ")  # a path may contain spaces
    try:
        if path:
            return os.path.normpath(path.strip()), int(label)
    except ValueError:
        pass
    raise SourceError(f"{place}: wanted 'path label' with an integer label, found {line.strip()[:80]!r}")


def _check_union(train: _List, val: _List, union: _List, name: str) -> None:
    """Check that nothing is lost by leaving train800val200 aside.

    Collections differ: some list the same files again, others copies under images/train800val200/. Copies can
    only be compared by their labels.
    """
    parts = dict(zip(train.paths + val.paths, train.labels + val.labels, strict=True))
    whole = dict(zip(union.paths, union.labels, strict=True))
    by_label = sorted(train.labels + val.labels) == sorted(union.labels)
    if parts != whole if parts.keys() & whole.keys() else not by_label:
        raise SourceError(
            f"{name}: {UNION} ({len(union.paths)} lines) is not the union of {TRAIN} ({len(train.paths)}) "
            f"and {VAL} ({len(val.paths)}); mend or remove it"
        )
