"""Run folders at and below some paths, finished or not."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from coldtap.adaptors.runs.run_folder import FAILED, RUN
from coldtap.adaptors.training.checkpoint import CHECKPOINT
from coldtap.errors import RunError


def find_run_folders(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among `paths` and below the others, each once, sorted below each path.

    Raises:
        RunError: A path is not there.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path} is no folder: give run folders, or folders of trials")
        for folder in _below(path):
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each folder: its path below the folder that all of them share."""
    whole = [folder.resolve() for folder in folders]
    if not whole:
        return {}
    shared = Path(os.path.commonpath([folder.parent for folder in whole]))
    return {folder: str(path.relative_to(shared)) for folder, path in zip(folders, whole, strict=True)}


def _below(path: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(path):
        inside.sort()
        ended = RUN in files or FAILED in files
        if ended:
            inside.clear()
        if ended or CHECKPOINT in files:  # trials under way have theirs in the folder above them
            yield Path(folder)
