"""Adding targets to a store that is there, without touching a feature."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldtap.errors import OptionError, SourceError
from coldtap.stores.convert.rows import sample_columns
from coldtap.stores.format.targets import MOST_CLASSES, places_in, targets_bytes
from coldtap.stores.format.types import IGNORED, KINDS, TargetKind
from coldtap.stores.reading.store import Store, open_store
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.writing.updates import has_other_targets, update_targets

SHOWN = 3  # ids in a message
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_AXES: dict[TargetKind, int] = {"class": 0, "labels": 1, "token-class": 2}
_WANTED: dict[TargetKind, str] = {
    "class": "an integer",
    "labels": "the numbers of its classes, each once",
    "token-class": "integers (h, w), one a patch",
}

type Integers = np.ndarray[Any, np.dtype[np.int64]]


def add_targets(
    store: Place,
    name: str,
    targets: Mapping[str, Any] | tuple[Sequence[str], Sequence[Any]],
    *,
    kind: TargetKind,
    class_names: Sequence[str] | None = None,
) -> str:
    """Add targets to a complete store, or replace those of the same name; no feature is touched.

    The store's digest changes with them. A call that died is mended by the same call.

    Args:
        store: its folder, or the storage whose root it is.
        name: of the targets, such as `species`; `label` is what adaptors learn unless told otherwise.
        targets: by sample id, or ids and as many targets. Of kind `class` an integer each; of `labels` the numbers of
            the classes that are there; of `token-class` an integer map (h, w) on the patch grid, −1 where a token
            is to be ignored. Every sample whose features are there needs one; rejected samples may have one.
        kind: of the targets.
        class_names: of all classes, by number. Without them there are as many classes as the largest number says.

    Returns:
        The store's digest.

    Raises:
        OptionError: the name or the kind cannot be used.
        SourceError: a target is missing, stands twice, is of no sample, of no class or of the wrong shape.
        StoreError: there is no complete store, or another job writes to it.
    """
    if not _NAME.fullmatch(name):
        raise OptionError(f"name={name!r}: targets are named by letters, digits and - _ . after the first")
    if kind not in KINDS:
        raise OptionError(f"kind={kind!r}: targets are of kind {', '.join(KINDS)}")
    storage = storage_at(store)
    open_store(storage, threads=1)  # a path without a store gets no lock file
    with storage.lock():
        there = open_store(storage, threads=1)
        data = _table(there, f"targets {name!r} of {storage}", targets, kind, class_names)
        if has_other_targets(storage, name, data):
            update_targets(storage, name, data)
    return open_store(storage, threads=1).digest


def _table(
    store: Store,
    what: str,
    targets: Mapping[str, Any] | tuple[Sequence[str], Sequence[Any]],
    kind: TargetKind,
    class_names: Sequence[str] | None,
) -> bytes:
    """The table in row order: of every sample of the plan, or of those that have a target."""
    given, values = (list(targets), list(targets.values())) if isinstance(targets, Mapping) else targets
    if len(given) != len(values):
        raise SourceError(f"{what}: {len(given)} ids and {len(values)} targets")
    ids, lines = _lines(store, what, pa.array(given, pa.string()))
    new = _Values.of(store, what, given, values, kind)
    n_classes = _count_classes(what, given, new, class_names, lowest=IGNORED if new.grid else 0)
    return targets_bytes(
        ids,
        new.take(lines, kind),
        class_names,
        kind=kind,
        n_classes=n_classes,
        grid=new.grid,
        order=store.recipe.rows.order if len(ids) == store.recipe.rows.n_samples else None,
    )


def _lines(store: Store, what: str, given: pa.Array) -> tuple[pa.Array, Integers]:
    """The ids of the samples that have a target, in row order, and where each stands among those given."""
    planned = pa.array(sample_columns(store)[0], pa.string())
    if len(pc.unique(given)) != len(given):
        counts = pc.value_counts(given)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise SourceError(f"{what}: {_some(twice)} stand there twice")
    unknown = given.filter(pc.is_null(pc.index_in(given, planned)))
    if len(unknown):
        raise SourceError(f"{what}: {_some(unknown)} of {len(given)} are no samples of this store")
    lines = pc.index_in(planned, given)
    missing = np.intersect1d(np.flatnonzero(lines.is_null().to_numpy(zero_copy_only=False)), _present_samples(store))
    if len(missing):
        raise SourceError(
            f"{what}: {_some(planned.take(pa.array(missing)))} of {len(planned)} samples have no target: give one each"
        )
    there = lines.is_valid()
    return planned.filter(there), lines.filter(there).to_numpy()


def _present_samples(store: Store) -> Integers:
    """Numbers of the samples of which a row is there."""
    rows = [store.rows(segment.split, segment.view) for segment in store.segments]
    return np.unique(store.sample_numbers(np.concatenate(rows)))


def _some(ids: pa.Array) -> str:
    shown = ", ".join(map(repr, ids[:SHOWN].to_pylist()))
    return f"{len(ids)} ids ({shown}{' …' if len(ids) > SHOWN else ''})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    """The numbers of all targets, one sample after another; `starts` says where each sample's begin."""

    flat: Integers
    starts: Integers
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, store: Store, what: str, ids: Sequence[str], values: Sequence[Any], kind: TargetKind) -> "_Values":
        each = [_integers(what, sample, value, kind) for sample, value in zip(ids, values, strict=True)]
        grid = _common_grid(store, what, ids, each) if kind == "token-class" else None
        flat = np.concatenate([np.empty(0, np.int64), *(numbers.ravel() for numbers in each)])
        return cls(flat=flat, starts=np.cumsum([0, *(numbers.size for numbers in each)]), grid=grid)

    def take(self, lines: Integers, kind: TargetKind) -> pa.Array:
        """Return the targets of some samples, as Arrow keeps them."""
        places, counts = places_in(self.starts, lines)
        if kind == "class":
            return pa.array(self.flat[places])
        item = pa.int32() if kind == "token-class" else pa.int64()
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(self.flat[places], item))


def _integers(what: str, sample: str, value: Any, kind: TargetKind) -> Integers:
    """One sample's target; labels in ascending order."""
    try:
        found = np.asarray(sorted(value) if kind == "labels" else value)
    except (TypeError, ValueError):
        found = np.asarray(None)  # ragged, or not to be sorted
    integers = np.issubdtype(found.dtype, np.integer) or (kind == "labels" and found.shape == (0,))
    if not integers or found.ndim != _AXES[kind] or (kind == "labels" and (found[1:] == found[:-1]).any()):
        raise SourceError(f"{what}: that of {sample!r} is {_short(value)}; wanted {_WANTED[kind]}")
    return found.astype(np.int64)


def _common_grid(store: Store, what: str, ids: Sequence[str], maps: Sequence[Integers]) -> tuple[int, int] | None:
    """The grid of all maps, which is that of a geometry of the store."""
    grids = sorted({tap.grid for tap in store.recipe.extractor.taps})
    wanted = [maps[0].shape] if maps and maps[0].shape in grids else grids
    for sample, found in zip(ids, maps, strict=True):
        if found.shape not in wanted:
            expected = " or ".join(f"{h} × {w}" for h, w in wanted)
            raise SourceError(
                f"{what}: the map of {sample!r} is {found.shape[0]} × {found.shape[1]}; expected {expected}, "
                "the patch grid"
            )
    return wanted[0]


def _count_classes(
    what: str, ids: Sequence[str], new: _Values, class_names: Sequence[str] | None, *, lowest: int
) -> int:
    """How many classes there are; every number must be one of them."""
    n_classes = len(class_names) if class_names is not None else max(int(new.flat.max(initial=0)) + 1, 1)
    if not 1 <= n_classes <= MOST_CLASSES:
        raise SourceError(f"{what}: {n_classes} classes; there may be 1 to {MOST_CLASSES}")
    outside = np.flatnonzero((new.flat < lowest) | (new.flat >= n_classes))
    if len(outside):
        sample = ids[int(np.searchsorted(new.starts, outside[0], side="right")) - 1]
        ignored = ", and -1 where a token is to be ignored" if lowest < 0 else ""
        raise SourceError(
            f"{what}: {sample!r} has class {new.flat[outside[0]]}; the classes are 0 to {n_classes - 1}{ignored}"
        )
    return n_classes


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
