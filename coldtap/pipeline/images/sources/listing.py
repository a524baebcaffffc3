"""What a source is to the rest of coldtap: a listing in columns, and a way to read each image."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from coldtap.errors import SourceError
from coldtap.pipeline.images.decode import RawImage
from coldtap.pipeline.images.sources.labels import (
    LabelSets,
    check_label_sets,
    check_labels,
    classes_without_train,
    label_sets_without_train,
)
from coldtap.pipeline.images.sources.splits import Labels, cut_val, resolve_splits


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All that is known of a source before an image is read, one entry per sample in each column.

    Attributes:
        ids: unique over the source: the path relative to its root, or its id column.
        splits: 'train', 'val' or 'test'.
        targets: 0 … C-1 without gaps, or None where the source has no labels. A source opened with
            labels='optional' may have gaps.
        label_sets: of a source with any number of labels per sample, those of each, ascending; it has no targets then.
        class_names: one name per class, where the source has names.
        notes: sentences that a user must be told.
        val_is_cut: whether val was cut from train here, because the source has no val split.
        fingerprint: SHA-256 over id and size in bytes of each sample in order, or over ids and what stands for the
            sizes where they cannot be had cheaply (Parquet: row-group sizes; Python: up to 64 hashed items).
    """

    ids: tuple[str, ...]
    splits: tuple[str, ...]
    targets: tuple[int, ...] | None
    label_sets: tuple[tuple[int, ...], ...] | None = None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    val_is_cut: bool = False
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)


class Source(Protocol):
    """Images with their listing. `read` and `where` may be called from many threads."""

    @property
    def name(self) -> str:
        """What the user named."""

    @property
    def listing(self) -> Listing:
        """What is known of the samples."""

    def read(self, index: int) -> RawImage:
        """Return the undecoded image of a sample.

        Raises:
            BadImageError: this image cannot be had; others can.
            MachineError: the machine fails, not the image.
        """

    def where(self, index: int) -> str:
        """Return the place of a sample: a file path, or 'FILE row 12'."""


def make_listing(
    *,
    name: str,
    ids: Sequence[str],
    splits: Sequence[str | None] | None,
    targets: npt.NDArray[np.int64] | LabelSets | None,
    class_names: Sequence[str] | None,
    fingerprint: str,
    place: Callable[[int], str],
    labels: Labels,
    seed: int,
    notes: Sequence[str | None] = (),
) -> Listing:
    """Check the columns of a source and complete them. All sources pass through here.

    `name` (what the user named) and `place` (of a sample) are for messages. `splits` are in any accepted spelling, None
    where the source knows none; `targets` are labels, NULL where one is missing, or a set of labels each; `seed` draws
    the val split where there is none; None among the notes are left out. The others are as in `Listing`.

    Raises:
        SourceError: the columns cannot be used.
    """
    if not ids:
        raise SourceError(f"{name}: no images")
    _check_unique(ids, name=name, place=place)
    resolved = resolve_splits(splits, len(ids), name=name, place=place, labels=labels)
    if isinstance(targets, list):
        sets, left_out = check_label_sets(targets, class_names, name=name, place=place, labels=labels)
        checked = None
    else:
        checked, left_out = check_labels(targets, class_names, name=name, place=place, labels=labels)
        sets = None
    told = [*notes, left_out]
    val_is_cut = labels == "required" and "val" not in resolved
    if val_is_cut:
        resolved, note = cut_val(resolved, checked, ids, name=name, seed=seed)
        told.append(note)
    if labels == "required" and checked is not None:
        told.append(classes_without_train(checked, resolved, class_names))
    if labels == "required" and sets is not None:
        told.append(label_sets_without_train(sets, resolved, class_names))
    return Listing(
        ids=tuple(ids),
        splits=tuple(resolved),
        targets=None if checked is None else tuple(checked.tolist()),
        label_sets=None if sets is None else tuple(sets),
        class_names=None if class_names is None or (checked is None and sets is None) else tuple(class_names),
        notes=tuple(note for note in told if note),
        val_is_cut=val_is_cut,
        fingerprint=fingerprint,
    )


def fingerprint_of(
    ids: Sequence[str], sizes_bytes: Iterable[int] | None = None, more: Iterable[str] = (), *, name: str
) -> str:
    """Return the SHA-256 over the samples in order.

    Args:
        ids: one per sample.
        sizes_bytes: one per sample, -1 where a file is missing; None where a size cannot be had cheaply.
        more: what stands for the sizes then.
        name: what the user named, for messages.

    Raises:
        SourceError: an id cannot be written as UTF-8.
    """
    digest = hashlib.sha256()
    sizes = iter(sizes_bytes) if sizes_bytes is not None else None
    for sample_id in ids:
        try:
            encoded = sample_id.encode()
        except UnicodeEncodeError as error:
            raise SourceError(f"{name}: {sample_id!r} is not UTF-8; rename it") from error
        # The length before the id keeps any two different listings apart, whatever the ids contain.
        digest.update(b"%d:%s%d;" % (len(encoded), encoded, next(sizes) if sizes is not None else -1))
    for line in more:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _check_unique(ids: Sequence[str], *, name: str, place: Callable[[int], str]) -> None:
    if len(set(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for index, sample_id in enumerate(ids):
        earlier = first.setdefault(sample_id, index)
        if earlier != index:
            raise SourceError(f"{name}: id {sample_id!r} is there twice: {place(earlier)} and {place(index)}")
