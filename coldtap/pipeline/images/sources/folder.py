"""A folder of class folders, with or without train/ val/ test/ above them.

Hidden files and folders are passed over. Within a class folder images are found at any depth; symbolic links
are followed, but not round in circles. Everything is sorted by name, so the order does not depend on the disk.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coldtap.errors import MachineError, SourceError
from coldtap.pipeline.images.sources.files import FileSource
from coldtap.pipeline.images.sources.labels import NULL
from coldtap.pipeline.images.sources.listing import fingerprint_of, make_listing
from coldtap.pipeline.images.sources.splits import ACCEPTED, SPLITS, Labels, canonical_split
from coldtap.text import a_few, images

IMAGE_EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir"})  # left by unzipping on a Mac and by Synology disks

type _Folder = tuple[int, int]  # device and inode


@dataclass(frozen=True, slots=True)
class _Group:
    """One folder of images that share a split and a class; None where the layout says nothing."""

    split: str | None
    class_name: str | None
    folder: str  # relative to the root, '' for the root itself


@dataclass(slots=True)
class _Found:
    """Image files in order, and how many other files were passed over, by extension."""

    ids: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    n_loose: int = 0


def open_folder(root: Path, *, labels: Labels, seed: int) -> FileSource:
    """List a folder.

    Where labels are optional, images outside class folders are fine, and then all images are unlabelled.

    Raises:
        SourceError: no class folders, one without images, an unknown split, a class that train lacks.
        MachineError: a folder cannot be listed.
    """
    name = str(root)
    found = _Found()
    groups = _layout(root, found, labels)
    class_names = _class_names(groups, name, labels)
    counts = [_collect_group(root, group, found, labels) for group in groups]
    ids = found.ids
    listing = make_listing(
        name=name,
        ids=ids,
        splits=_splits(groups, counts),
        targets=_targets(groups, counts, class_names) if class_names else None,
        class_names=class_names or None,
        fingerprint=fingerprint_of(ids, found.sizes, name=name),
        place=lambda index: os.path.join(root, ids[index]),
        labels=labels,
        seed=seed,
        notes=_notes(found),
    )
    return FileSource(name=name, listing=listing, root=str(root), paths=listing.ids)


def _layout(root: Path, found: _Found, labels: Labels) -> list[_Group]:
    folders = _folders(root, found)
    split_folders = [folder for folder in folders if canonical_split(folder)]
    # A class may be called 'train'. It is a split if it has folders of its own, or if nothing else is there.
    if split_folders and (
        len(split_folders) == len(folders) or any(_has_folders(root / folder) for folder in split_folders)
    ):
        return _split_layout(root, folders, found, labels)
    if labels == "optional" and (found.n_loose or not folders):
        found.n_loose = 0
        found.ignored.clear()  # counted again, with those in deeper folders
        return [_Group(None, None, "")]
    if not folders:
        holds = f"{images(found.n_loose)} but no class folders" if found.n_loose else "no class folders"
        raise SourceError(f"{root}: found {holds}; wanted CLASS/image or train/CLASS/image")
    return [_Group(None, folder, folder) for folder in folders]


def _split_layout(root: Path, folders: list[str], found: _Found, labels: Labels) -> list[_Group]:
    by_split: dict[str, str] = {}
    for folder in folders:
        split = canonical_split(folder)
        if split is None:
            known = a_few([other for other in folders if canonical_split(other)])
            raise SourceError(
                f"{root}: unknown split {folder!r} beside {known}; accepted: {ACCEPTED}. "
                "If these are classes, put them under train/"
            )
        if split in by_split:
            raise SourceError(f"{root}: both {by_split[split]}/ and {folder}/ are the {split} split; keep one")
        by_split[split] = folder
    return [
        group
        for split in SPLITS
        if split in by_split
        for group in _split_groups(root, split, by_split[split], found, labels)
    ]


def _split_groups(root: Path, split: str, folder: str, found: _Found, labels: Labels) -> list[_Group]:
    n_loose = found.n_loose
    classes = _folders(root / folder, found)
    if classes:
        return [_Group(split, name, os.path.join(folder, name)) for name in classes]
    if labels == "required":
        raise SourceError(f"{root / folder}: no class folders in the {split} split; wanted {folder}/CLASS/image")
    found.n_loose = n_loose
    return [_Group(split, None, folder)]


def _class_names(groups: list[_Group], name: str, labels: Labels) -> list[str]:
    """Return the sorted names of the classes; training knows only those of the train split."""
    named = [group for group in groups if group.class_name is not None]
    in_train = {str(group.class_name) for group in named if group.split in (None, "train")}
    everywhere = {str(group.class_name) for group in named}
    if labels == "required" and in_train and in_train != everywhere:
        lacking = sorted(everywhere - in_train)
        folders = a_few([group.folder for group in named if group.class_name in lacking])
        raise SourceError(f"{name}: train lacks the class of {folders}")
    return sorted(everywhere)


def _splits(groups: list[_Group], counts: list[int]) -> list[str | None] | None:
    if all(group.split is None for group in groups):
        return None
    return [group.split for group, count in zip(groups, counts, strict=True) for _ in range(count)]


def _targets(groups: list[_Group], counts: list[int], class_names: list[str]) -> npt.NDArray[np.int64]:
    label = {name: index for index, name in enumerate(class_names)}
    labels = [NULL if group.class_name is None else label[group.class_name] for group in groups]
    return np.repeat(np.array(labels, dtype=np.int64), counts)


def _notes(found: _Found) -> list[str]:
    notes = []
    if found.n_loose:
        notes.append(f"ignored {images(found.n_loose)} outside class folders")
    if found.ignored:
        kinds = a_few([f"{count} {extension}" for extension, count in found.ignored.most_common()])
        notes.append(f"ignored files that are no images by their names: {kinds}")
    return notes


def _folders(path: Path, found: _Found) -> list[str]:
    """Return the names of the folders in a folder, and count the files beside them."""
    folders = []
    for entry in _entries(str(path)):
        if _is_folder(entry):
            folders.append(entry.name)
        elif _is_image(entry):
            found.n_loose += 1
        else:
            found.ignored[_extension(entry)] += 1
    return folders


def _has_folders(path: Path) -> bool:
    return any(_is_folder(entry) for entry in _entries(str(path)))


def _collect_group(root: Path, group: _Group, found: _Found, labels: Labels) -> int:
    """Add the images of a group and return their number."""
    before = len(found.ids)
    folder = root / group.folder
    _collect(str(folder), group.folder, found, (_identity(os.stat(folder)),))
    count = len(found.ids) - before
    if not count and labels == "required":
        raise SourceError(f"{folder}: class folder without images; accepted: {' '.join(sorted(IMAGE_EXTENSIONS))}")
    return count


def _collect(path: str, relative: str, found: _Found, above: tuple[_Folder, ...]) -> None:
    for entry in _entries(path):
        if _is_folder(entry):
            identity = _identity(entry.stat())
            if identity not in above:  # else a link back to a folder that we are in
                _collect(entry.path, os.path.join(relative, entry.name), found, (*above, identity))
        elif _is_image(entry):
            found.ids.append(os.path.join(relative, entry.name))
            found.sizes.append(entry.stat().st_size)
        else:
            found.ignored[_extension(entry)] += 1


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise MachineError(f"{path}: the folder cannot be listed: {error.strerror}") from error
    return sorted((entry for entry in seen if entry.name not in JUNK_FOLDERS), key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    try:
        return _extension(entry) in IMAGE_EXTENSIONS and entry.is_file()
    except OSError:
        return False


def _extension(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower() or entry.name


def _identity(found: os.stat_result) -> _Folder:
    return found.st_dev, found.st_ino
