"""Whether labels can be trained on: integers 0 … C-1, none missing, at least two classes; or a set of them each."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from coldtap.errors import SourceError
from coldtap.pipeline.images.sources.splits import Labels
from coldtap.text import a_few, a_few_of, images

type LabelSets = list[tuple[int, ...] | None]
"""The classes of each sample, any number of them; None where they are missing."""

NULL = int(np.iinfo(np.int64).min)
"""Stands for a missing label in arrays of labels."""


def check_labels(
    targets: npt.NDArray[np.int64] | None,
    class_names: Sequence[str] | None,
    *,
    name: str,
    place: Callable[[int], str],
    labels: Labels,
) -> tuple[npt.NDArray[np.int64] | None, str | None]:
    """Check labels over a whole source.

    Where labels are optional, gaps and a single class are fine, and labels of which some are null or negative
    (Hugging Face marks an unlabelled image by -1) are left out.

    Returns:
        The labels, or None where there are none, and a sentence where labels were left out.

    Raises:
        SourceError: labels are missing, null, negative, with gaps, beyond the class names, or of one class.
    """
    if targets is None:
        if labels == "required":
            raise SourceError(f"{name}: there are no labels; training needs one for each image")
        return None, None
    bad = targets < 0
    if bad.any():
        first = int(bad.argmax())
        found = "null" if targets[first] == NULL else str(targets[first])
        what = f"{int(bad.sum())} of {len(targets)} labels are null or negative, first {found} at {place(first)}"
        if labels == "optional":
            return None, f"labels are left out: {what}"
        raise SourceError(f"{name}: {what}; labels must be 0 … C-1")
    _check_range(targets, class_names, name=name, place=place, labels=labels)
    return targets, None


def _check_range(
    targets: npt.NDArray[np.int64],
    class_names: Sequence[str] | None,
    *,
    name: str,
    place: Callable[[int], str],
    labels: Labels,
) -> None:
    present = np.unique(targets)
    n_classes = len(class_names) if class_names is not None else int(present[-1]) + 1
    if present[-1] >= n_classes:
        index = int((targets == present[-1]).argmax())
        raise SourceError(f"{name}: label {present[-1]} at {place(index)}, but only {n_classes} class names")
    if labels == "optional":
        return
    _refuse_gaps(present.tolist(), n_classes, name)
    if n_classes < 2:
        raise SourceError(f"{name}: a single class, {_called(0, class_names)}; an adaptor needs at least two")


def check_label_sets(
    sets: LabelSets,
    class_names: Sequence[str] | None,
    *,
    name: str,
    place: Callable[[int], str],
    labels: Labels,
) -> tuple[list[tuple[int, ...]] | None, str | None]:
    """Check sets of labels over a whole source; each comes back in ascending order.

    An image may have none of the labels. Where labels are optional, sets of which some are null are left out.

    Returns:
        The sets, or None where they are left out, and a sentence where they were.

    Raises:
        SourceError: a set is null, a label stands twice, is negative, or beyond the class names; without names, labels
            have gaps; no image has a label.
    """
    nulls = [index for index, found in enumerate(sets) if found is None]
    if nulls:
        what = f"{len(nulls)} of {len(sets)} lists of labels are null, first at {place(nulls[0])}"
        if labels == "optional":
            return None, f"labels are left out: {what}"
        raise SourceError(f"{name}: {what}; an image without labels has an empty list")
    found = [tuple(sorted(labels_of)) for labels_of in sets if labels_of is not None]
    present = sorted({label for labels_of in found for label in labels_of})
    n_classes = len(class_names) if class_names is not None else (present[-1] + 1 if present else 0)
    for index, labels_of in enumerate(found):
        if len(set(labels_of)) < len(labels_of):
            raise SourceError(
                f"{name}: a label stands twice at {place(index)}: {list(labels_of)}; wanted the numbers of its "
                "classes, not a flag for each"
            )
        if labels_of and (labels_of[0] < 0 or labels_of[-1] >= n_classes):
            wrong = labels_of[0] if labels_of[0] < 0 else labels_of[-1]
            raise SourceError(f"{name}: label {wrong} at {place(index)}; the classes are 0 to {n_classes - 1}")
    if labels == "required" and not present:
        raise SourceError(f"{name}: no image has a label; an adaptor needs at least one")
    if labels == "required" and class_names is None:
        _refuse_gaps(present, n_classes, name)
    return found, None


def _refuse_gaps(present: Sequence[int], n_classes: int, name: str) -> None:
    if gaps := n_classes - len(present):
        absent = np.setdiff1d(np.arange(min(n_classes, len(present) + 5)), present)
        raise SourceError(
            f"{name}: labels have gaps: of the classes 0 … {n_classes - 1} no image has "
            f"{a_few_of(absent, gaps)}; renumber them 0 … {len(present) - 1}"
        )


def classes_without_train(
    targets: npt.NDArray[np.int64], splits: Sequence[str], class_names: Sequence[str] | None
) -> str | None:
    """Return a sentence that names the classes of val and test that train lacks, or None."""
    in_train = np.fromiter((split == "train" for split in splits), dtype=bool, count=len(splits))
    lacking = np.setdiff1d(targets, targets[in_train])
    if not len(lacking):
        return None
    n_images = int(np.isin(targets, lacking).sum())
    called = a_few([_called(int(label), class_names) for label in lacking])
    return f"{images(n_images)} of val and test are of classes that train lacks: {called}"


def label_sets_without_train(
    sets: Sequence[tuple[int, ...]], splits: Sequence[str], class_names: Sequence[str] | None
) -> str | None:
    """Return a sentence that names the labels of val and test that no train image has, or None."""
    in_train = {label for found, split in zip(sets, splits, strict=True) if split == "train" for label in found}
    lacking = {label for found in sets for label in found} - in_train
    if not lacking:
        return None
    n_images = sum(not lacking.isdisjoint(found) for found in sets)
    called = a_few([_called(label, class_names) for label in sorted(lacking)])
    return f"{images(n_images)} of val and test have labels that no train image has: {called}"


def _called(label: int, class_names: Sequence[str] | None) -> str:
    return f"{label} ({class_names[label]})" if class_names is not None else str(label)
