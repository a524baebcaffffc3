"""Any Python object that gives (image, target) by index: a torchvision data set, a list, a dict of splits.

A target is an integer, or a sequence of integers where an image has any number of labels. Arrays are such sequences
too, but where the array of every image holds one number, they are classes.
"""

import math
import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from coldtap.errors import SourceError
from coldtap.pipeline.images.decode import BadImageError, RawImage, content_digest, is_raw_image
from coldtap.pipeline.images.sources.labels import NULL, LabelSets
from coldtap.pipeline.images.sources.listing import Listing, fingerprint_of, make_listing
from coldtap.pipeline.images.sources.splits import ACCEPTED, Labels, canonical_split

FINGERPRINT_SAMPLES = 64

type _Target = int | tuple[int, ...]  # NULL where it is missing


class _Numbers(tuple[int, ...]):
    """What an array held: a class or labels, which only the whole column tells."""

    __slots__ = ()


@runtime_checkable
class Indexable(Protocol):
    """A length, and an item (image, target) for each index below it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class _Part(NamedTuple):
    """One split, or the whole source where it has none."""

    split: str | None
    data: Indexable
    start: int  # index in the source of its first item


class _Probe(NamedTuple):
    """What one item looked like when it was listed."""

    at: int  # index in the source
    digest: str
    target: _Target | None


class IndexableSource:
    """Images that Python code gives.

    There is no cheap size, so the fingerprint is of the content of up to 64 evenly spaced items. An object whose
    images change from one access to the next, as with random transforms, is another source each time it is
    opened: leave augmentation to coldtap's views.

    Targets are taken from `.targets` or `.labels` where the probed items agree with them, else from the items,
    which decodes each image once.

    Items are fetched by one thread at a time, since few such objects can do more (a shared file handle gives
    wrong images, not errors). What decodes inside the object therefore does so on one core.
    """

    def __init__(self, source: Indexable | Mapping[str, Indexable], *, labels: Labels, seed: int) -> None:
        self.name = type(source).__name__
        self._lock = threading.Lock()
        self._parts = _parts(source, self.name)
        self._labelled = self._check_first(labels)
        self.listing = self._list(labels, seed)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, index: int) -> RawImage:
        """Return the image of an item.

        Raises:
            BadImageError: the object raised an error, or gave no image.
        """
        try:
            image = self._image(self._item(index))
        except MemoryError:
            raise
        except Exception as error:  # whatever the object's own code raises
            raise BadImageError(f"{type(error).__name__}: {error}") from error
        if not is_raw_image(image):
            raise BadImageError(f"not an image: a {type(image).__name__}")
        return image

    def where(self, index: int) -> str:
        """Return 'item 12', or 'item 12 of val'."""
        part = self._part(index)
        return f"item {index - part.start}" + (f" of {part.split}" if part.split else "")

    def _part(self, index: int) -> _Part:
        return next(part for part in reversed(self._parts) if part.start <= index)

    def _item(self, index: int) -> Any:
        part = self._part(index)
        with self._lock:
            return part.data[index - part.start]

    def _image(self, item: Any) -> Any:
        return item[0] if self._labelled else item

    def _target(self, index: int, item: Any) -> _Target:
        found = _as_target(item[1])
        if found is None:
            raise SourceError(
                f"{self.name}: the target of {self.where(index)} is a {type(item[1]).__name__}; wanted an integer, "
                "or a sequence of integers"
            )
        return found

    def _check_first(self, labels: Labels) -> bool:
        """Look at the first item, and say whether items are pairs of image and target."""
        first = next((part.start for part in self._parts if len(part.data)), None)
        if first is None:
            raise SourceError(f"{self.name}: no items")
        try:
            item = self._item(first)
        except Exception as error:
            raise SourceError(f"{self.name}: {self.where(first)} failed: {error!r}") from error
        pair = isinstance(item, (tuple, list)) and len(item) == 2
        image = item[0] if pair else item
        if not is_raw_image(image) or not (pair or labels == "optional"):
            found = "({})".format(", ".join(type(x).__name__ for x in item)) if pair else type(item).__name__
            raise SourceError(
                f"{self.name}: {self.where(first)} is {found}; wanted (image, target), the image a PIL image, "
                "an array, a tensor, or the bytes of an encoded file"
            )
        return pair

    def _list(self, labels: Labels, seed: int) -> Listing:
        count = sum(len(part.data) for part in self._parts)
        spaced = np.unique(np.linspace(0, count - 1, FINGERPRINT_SAMPLES).astype(np.int64))
        probes = [self._probe(index) for index in spaced.tolist()]
        ids = [
            f"{part.split}/{index}" if part.split else str(index)
            for part in self._parts
            for index in range(len(part.data))
        ]
        return make_listing(
            name=self.name,
            ids=ids,
            splits=None if self._parts[0].split is None else [self._part(i).split for i in range(count)],
            targets=self._targets(probes) if self._labelled else None,
            class_names=self._class_names(),
            fingerprint=fingerprint_of(ids, more=[probe.digest for probe in probes], name=self.name),
            place=self.where,
            labels=labels,
            seed=seed,
        )

    def _probe(self, index: int) -> _Probe:
        try:
            item = self._item(index)
            digest = content_digest(self._image(item))
        except Exception:  # will be a rejected sample when it is read
            return _Probe(index, "unreadable", None)
        return _Probe(index, digest, self._target(index, item) if self._labelled else None)

    def _targets(self, probes: list[_Probe]) -> npt.NDArray[np.int64] | LabelSets:
        declared = [_declared(part.data) for part in self._parts]
        columns = [column for column in declared if column is not None]
        if len(columns) == len(self._parts):
            whole = [target for column in columns for target in column]
            if all(_agrees(probe.target, whole[probe.at]) for probe in probes):
                return self._column(whole)
        return self._column([self._target_of(index) for index in range(sum(len(part.data) for part in self._parts))])

    def _column(self, targets: list[_Target]) -> npt.NDArray[np.int64] | LabelSets:
        """One column of all targets: integers, or sets of labels.

        MedMNIST keeps each class as an array of one number; in detection an image with a single label has such an array
        beside longer ones.
        """
        arrays = [target for target in targets if isinstance(target, _Numbers)]
        if arrays and all(isinstance(target, _Numbers) or target == NULL for target in targets):
            widths = {len(numbers) for numbers in arrays}
            if widths == {1}:
                return np.array([target[0] if isinstance(target, tuple) else target for target in targets], np.int64)
            if len(widths) == 1 and 0 not in widths and {label for numbers in arrays for label in numbers} <= {0, 1}:
                raise SourceError(
                    f"{self.name}: the targets are arrays of {len(arrays[0])} numbers, all of them 0 or 1: flags, not "
                    "numbers of classes; give np.flatnonzero(target) of each"
                )
        sets: LabelSets = [target if isinstance(target, tuple) else None for target in targets]
        if all(labels is None for labels in sets):
            return np.array(targets, np.int64)
        for index, (target, labels) in enumerate(zip(targets, sets, strict=True)):
            if labels is None and target != NULL:
                raise SourceError(
                    f"{self.name}: the target of {self.where(index)} is an integer, that of "
                    f"{self.where(next(i for i, other in enumerate(sets) if other is not None))} a sequence; wanted "
                    "one or the other"
                )
        return sets

    def _target_of(self, index: int) -> _Target:
        try:
            item = self._item(index)
        except Exception as error:
            raise SourceError(
                f"{self.name}: {self.where(index)} failed: {error!r}; "
                "an object with .targets is listed without reading its items"
            ) from error
        return self._target(index, item)

    def _class_names(self) -> list[str] | None:
        names = getattr(self._parts[0].data, "classes", None)
        if not isinstance(names, (list, tuple)):
            return None
        return [name if isinstance(name, str) else repr(name) for name in names]


def _parts(source: Indexable | Mapping[str, Indexable], name: str) -> list[_Part]:
    if not isinstance(source, Mapping):
        return [_Part(None, source, 0)]
    parts: list[_Part] = []
    start = 0
    for key, data in source.items():
        split = canonical_split(str(key))
        if split is None:
            raise SourceError(f"{name}: unknown split {key!r}; accepted: {ACCEPTED}")
        if split in [part.split for part in parts]:
            raise SourceError(f"{name}: two keys are the {split} split: {', '.join(map(str, source))}")
        if not isinstance(data, Indexable):
            raise SourceError(f"{name}: split {key!r} is a {type(data).__name__}; wanted (image, target) by index")
        parts.append(_Part(split, data, start))
        start += len(data)
    if not parts:
        raise SourceError(f"{name}: no splits; accepted: {ACCEPTED}")
    return parts


def _declared(data: Indexable) -> Sequence[_Target] | None:
    """Return `.targets` or `.labels` if it is a plain column of integers, or of sequences of integers."""
    for attribute in ("targets", "labels"):
        found = getattr(data, attribute, None)
        if found is None:
            continue
        try:
            column = np.asarray(found)
        except (TypeError, ValueError):
            column = np.asarray(None)  # sequences of several lengths
        if column.shape == (len(data),) and np.issubdtype(column.dtype, np.integer):
            integers: list[int] = column.tolist()
            return integers
        if isinstance(found, (list, tuple)) and len(found) == len(data):
            targets = [_as_target(value) for value in found]
            return None if None in targets else [target for target in targets if target is not None]
    return None


def _as_target(value: Any) -> _Target | None:
    """An integer or a sequence of them as it is kept, NULL for None; None where it is neither."""
    if value is None:
        return NULL
    if hasattr(value, "ndim"):
        return _of_array(value)
    with suppress(TypeError):
        return operator.index(value)
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        return None
    try:
        return tuple(operator.index(label) for label in value)
    except TypeError:
        return None


def _of_array(array: Any) -> _Target | None:
    """A scalar's integer, or the numbers of an array or tensor; None where they are none, or lie in rows of several."""
    try:
        if array.ndim == 0:
            return operator.index(array.item())
        numbers = array.reshape(-1) if array.ndim > 1 and math.prod(array.shape) == 1 else array
        return _Numbers(operator.index(number) for number in numbers.tolist())
    except TypeError:
        return None


def _agrees(probed: _Target | None, declared: _Target) -> bool:
    """Whether an item that could be read has the declared target, of the same kind."""
    return probed is None or (isinstance(probed, _Numbers) == isinstance(declared, _Numbers) and probed == declared)
