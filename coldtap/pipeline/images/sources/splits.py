"""Which split each sample is in: spellings, defaults, and the val split that is cut from train."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from coldtap.errors import SourceError
from coldtap.text import a_few, images

type Labels = Literal["required", "optional"]
"""Whether a source is trained from (labels, two classes and a train split are required) or only looked at."""

SPLITS = ("train", "val", "test")
SPELLINGS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
ACCEPTED = ", ".join(SPELLINGS)
CUT_FRACTION = 0.1


def canonical_split(spelling: str) -> str | None:
    """Return 'train', 'val' or 'test' for a spelling in any case, or None where it is none of them."""
    return SPELLINGS.get(spelling.strip().lower())


def resolve_splits(
    given: Sequence[str | None] | None,
    count: int,
    *,
    name: str,
    place: Callable[[int], str],
    labels: Labels,
) -> list[str]:
    """Return the canonical split of each of `count` samples.

    A source without any split is all train, or all test where labels are optional.

    Raises:
        SourceError: a split is unknown or null, or there is no train split in a source to train from.
    """
    if given is None:
        return ["train" if labels == "required" else "test"] * count
    known = {split: _known(split, labels) for split in set(given)}
    for split, canonical in known.items():
        if canonical is None:
            index = given.index(split)
            found = "null" if split is None else repr(split)
            raise SourceError(
                f"{name}: unknown split {found}, in {images(given.count(split))}, first {place(index)}; "
                f"accepted: {ACCEPTED}"
            )
    splits = [str(known[split]) for split in given]
    if labels == "required" and "train" not in splits:
        raise SourceError(f"{name}: no train split; found only {a_few(sorted(set(splits)))}")
    return splits


def _known(split: str | None, labels: Labels) -> str | None:
    if split is None:
        return "test" if labels == "optional" else None
    return canonical_split(split)


def cut_val(
    splits: list[str], targets: npt.NDArray[np.int64] | None, ids: Sequence[str], *, name: str, seed: int
) -> tuple[list[str], str]:
    """Turn a tenth of train into val, stratified by label: at least one image of each class that has two.

    Sets of labels give no strata (`targets` is None): the tenth is then of all images.

    Which images go is ranked by SHA-256 over (seed, id), not drawn: it depends neither on the order of the
    listing nor on a library's random numbers, and adding images moves few others.

    Returns:
        The new splits, and a sentence that says what was done.

    Raises:
        SourceError: no class has two train images.
    """
    of_class: dict[int, list[int]] = {}
    strata = [0] * len(splits) if targets is None else targets.tolist()
    for index, (split, target) in enumerate(zip(splits, strata, strict=True)):
        if split == "train":
            of_class.setdefault(target, []).append(index)
    cut = list(splits)
    for members in of_class.values():
        take = max(1, round(CUT_FRACTION * len(members))) if len(members) > 1 else 0
        for index in sorted(members, key=lambda index: _rank(seed, ids[index]))[:take]:
            cut[index] = "val"
    n_val, n_train = cut.count("val"), splits.count("train")
    if n_val == 0:
        raise SourceError(f"{name}: no val split, and none can be cut: every class has a single train image")
    tenth = "a tenth" if targets is None else "a stratified tenth"
    return cut, f"no val split: {n_val} of the {n_train} train images, {tenth} by seed {seed}, became it"


def _rank(seed: int, sample_id: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{sample_id}".encode()).digest()
