"""Fitting a compensation to a store that is there: from its features to those of the float backbone, tap by tap.

The rows that the store shares with a float store of some of the same images are read once, a few at a time; moments in
float64 are all that is kept of them (`channel_affine.py`). Samples are dealt into folds, so that whether a channel gets
a map, and what is said of the gain, is decided on rows that it was not fitted on.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldtap.errors import MissingFeaturesError, OptionError, StoreError
from coldtap.stores.compensation.channel_affine import RIDGE, ChannelAffine, ChannelMoments, fit_gated_affine
from coldtap.stores.format.codes import Floats
from coldtap.stores.format.compensation import TapMaps, compensation_bytes, compensation_file
from coldtap.stores.format.rows import SPLITS
from coldtap.stores.format.same_backbone import differences_beyond_arithmetic
from coldtap.stores.reading.array import StoredArray
from coldtap.stores.reading.store import Store, open_store
from coldtap.stores.storage.address import Place, place_of, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.writing.updates import holds_file, update_file

LEAST_SAMPLES = 32
LEAST_FOLDS = 3  # the gain is measured on one fold, and a gate needs two others
PIECE_BYTES = 1 << 23  # float32 values of a store at once: in float64, with copies, some ten times that

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

type Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TapGain:
    """What the map of a tap gains on samples that it was not fitted on.

    The SNR (dB) is the variance of the float values over the mean squared error, all channels together; None where
    there is no error or no variance. `mapped` counts the channels that passed the gate.
    """

    tap: int
    before_db: float | None
    after_db: float | None
    mapped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompensationReport:
    """How a fit ended.

    Attributes:
        store: whose features are compensated: its path, or its storage.
        name: of the compensation.
        status: `written`; `replaced` where the store had another of that name, `unchanged` where it had just this one.
        digest: SHA-256 of the store's manifest.
        split: whose rows were used.
        n_rows: pairs of rows.
        n_samples: different samples among them.
        arrays: the gain of each tap, by array.
    """

    store: Path | Storage
    name: str
    status: Literal["written", "replaced", "unchanged"]
    digest: str
    split: str
    n_rows: int
    n_samples: int
    arrays: Mapping[str, tuple[TapGain, ...]]


def fit_compensation(
    store: Place,
    float_store: Place,
    *,
    name: str = "cwac",
    split: str = "train",
    max_rows: int | None = None,
    folds: int = 4,
    ridge: float = RIDGE,
) -> CompensationReport:
    """Fit a map a channel from a store's features to those of its float backbone, and record it in the store.

    No feature is touched; the store's digest changes with the map. A map of the same name is replaced; a call that died
    is mended by the same call. Every array gets one that the float store has too, with all its taps.

    Args:
        store: features of a quantised backbone, complete.
        float_store: features of the same backbone in float, of some of the same images.
        name: of the compensation.
        split: whose rows are used; others stay unseen.
        max_rows: of the rows that both have, only so many, the first ones of the split's seeded order.
        folds: parts into which samples are dealt for the gate and for the gain that is told.
        ridge: how strongly maps are drawn towards the identity (`channel_affine.fit_affine`).

    Raises:
        OptionError: an option has a value that cannot be used.
        StoreError: a store is missing, incomplete or damaged, of another backbone, or shares too few samples; or
            another job writes to it.
    """
    _require_options(name, split, max_rows, folds, ridge)
    storage = storage_at(store)
    open_store(storage, threads=1)  # a path without a store gets no lock file
    with storage.lock():
        there, other = open_store(storage), open_store(float_store)
        _require_float_twin(there, other)
        arrays = _arrays_of_both(there, other)
        pairs = _Pairs.of(there, other, split, max_rows, folds)
        fits = {array: _fit(there.arrays[array], other.arrays[array], pairs, ridge) for array in arrays}
        data = compensation_bytes(
            {array: fit.maps for array, fit in fits.items()},
            {
                **_origin(there, other),
                "split": split,
                "rows": len(pairs.rows),
                "samples": pairs.n_samples,
                "ridge": ridge,
                "gate": {"held_out": "samples", "folds": folds},
                "gain": {array: [asdict(gain) for gain in fit.gains] for array, fit in fits.items()},
            },
        )
        file = compensation_file(name)
        status: Literal["written", "replaced", "unchanged"] = "replaced" if name in there.compensations else "written"
        if holds_file(storage, file, data):
            status = "unchanged"
        else:
            update_file(storage, file, data)
    return CompensationReport(
        store=place_of(storage),
        name=name,
        status=status,
        digest=open_store(storage, threads=1).digest,
        split=split,
        n_rows=len(pairs.rows),
        n_samples=pairs.n_samples,
        arrays={array: fit.gains for array, fit in fits.items()},
    )


def _require_options(name: str, split: str, max_rows: int | None, folds: int, ridge: float) -> None:
    if not _NAME.fullmatch(name):
        raise OptionError(f"name={name!r}: compensations are named by letters, digits and - _ . after the first")
    if split not in SPLITS:
        raise OptionError(f"split={split!r}: it must be one of {', '.join(SPLITS)}")
    if max_rows is not None and max_rows < LEAST_SAMPLES:
        raise OptionError(f"max_rows={max_rows}: a compensation needs {LEAST_SAMPLES} samples at least")
    if not LEAST_FOLDS <= folds <= LEAST_SAMPLES:
        raise OptionError(f"folds={folds}: it must be {LEAST_FOLDS} to {LEAST_SAMPLES}")
    if not 0 <= ridge < float("inf"):
        raise OptionError(f"ridge={ridge}: it must be 0 or more, and finite")


def _require_float_twin(store: Store, other: Store) -> None:
    """Refuse stores that are not of one backbone, once in float and once not."""
    old, new = store.recipe.extractor, other.recipe.extractor
    if fields := differences_beyond_arithmetic(old.to_dict(), new.to_dict()):
        raise StoreError(
            f"{store.storage} and {other.storage} are not of one backbone: {'; '.join(fields)}: give a float "
            "store of the same backbone"
        )
    if new.quantisation is not None:
        raise StoreError(f"{other.storage} is of a quantised backbone itself: give a store of the float one")
    if old == new:
        raise StoreError(f"{store.storage} and {other.storage} are of one extractor: there is nothing to compensate")


def _origin(store: Store, other: Store) -> dict[str, Any]:
    return {
        "float_store": {"address": other.recipe.address, "digest": other.digest},
        "store": {"address": store.recipe.address, "tier": store.recipe.encoding.tier},
    }


def _arrays_of_both(store: Store, other: Store) -> list[str]:
    """Names of the arrays that both have, with all taps of the first."""
    found = [
        name
        for name, array in store.arrays.items()
        if name in other.arrays and {*array.taps} <= {*other.arrays[name].taps}
    ]
    if not found:
        raise MissingFeaturesError(
            f"{other.storage} has no array of {store.storage} with all its taps: it holds {_described(other)}, "
            f"needed is one of {_described(store)}"
        )
    return found


def _described(store: Store) -> str:
    return ", ".join(f"{name} of taps {list(array.taps)}" for name, array in store.arrays.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """Rows of the same (sample, view): numbers in the store and in the float store, and the fold of each."""

    rows: Rows
    float_rows: Rows
    folds: Rows
    n_samples: int
    n_folds: int

    @classmethod
    def of(cls, store: Store, other: Store, split: str, max_rows: int | None, n_folds: int) -> "_Pairs":
        mine, theirs = store.samples, other.samples
        mine = mine.filter(pc.equal(mine["split"], split))
        if not _same_views(store, other):
            mine, theirs = (table.filter(pc.equal(table["view"], 0)) for table in (mine, theirs))
        places = pc.index_in(_keys(mine), value_set=_keys(theirs))
        mine, places = mine.filter(places.is_valid()).slice(0, max_rows), places.drop_null().slice(0, max_rows)
        theirs = theirs.take(places)
        _require_same_images(store, other, mine, theirs)
        rows = mine["row"].to_numpy()
        samples, number = np.unique(store.sample_numbers(rows), return_inverse=True)
        if len(samples) < LEAST_SAMPLES:
            raise StoreError(
                f"{store.storage} and {other.storage} have {len(samples)} {split} samples in common; a compensation "
                f"needs {LEAST_SAMPLES} at least: cache more images of the same source"
            )
        return cls(
            rows=rows,
            float_rows=theirs["row"].to_numpy(),
            # By sample: views of one image in two folds would tell the gate nothing new.
            folds=number.astype(np.int64) % n_folds,
            n_samples=len(samples),
            n_folds=n_folds,
        )

    def of_fold(self, fold: int, piece_rows: int) -> Iterator[tuple[Rows, Rows]]:
        """Yield the rows of a fold, a few at a time, in both stores."""
        at = np.flatnonzero(self.folds == fold)
        for start in range(0, len(at), piece_rows):
            some = at[start : start + piece_rows]
            yield self.rows[some], self.float_rows[some]


def _same_views(store: Store, other: Store) -> bool:
    """Whether augmented views of a sample are the same crops in both."""
    old, new = store.recipe.rows, other.recipe.rows
    return (old.seed, old.augmentation) == (new.seed, new.augmentation)


def _keys(table: pa.Table) -> pa.ChunkedArray:
    """View and sample id of each line, as one text."""
    return pc.binary_join_element_wise(pc.cast(table["view"], pa.string()), table["sample_id"], "\n")


def _require_same_images(store: Store, other: Store, mine: pa.Table, theirs: pa.Table) -> None:
    changed = pc.not_equal(mine["source_sha256"].combine_chunks(), theirs["source_sha256"].combine_chunks())
    if n_changed := pc.sum(changed).as_py():
        sample = mine["sample_id"].filter(changed)[0].as_py()
        raise StoreError(
            f"{store.storage} and {other.storage} were made from other images of the same id ({n_changed} of "
            f"{len(mine)}, such as {sample!r}): give a float store of the same source"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    maps: TapMaps
    gains: tuple[TapGain, ...]


def _fit(array: StoredArray, other: StoredArray, pairs: _Pairs, ridge: float) -> _Fit:
    """The maps of all taps of an array, and what they gain."""
    by_fold = [_moments_of_fold(array, other, pairs, fold) for fold in range(pairs.n_folds)]
    by_tap = [list(folds) for folds in zip(*by_fold, strict=True)]
    fitted = [fit_gated_affine(folds, ridge=ridge) for folds in by_tap]
    return _Fit(
        maps=TapMaps(
            scale=np.stack([affine.scale for affine in fitted]).astype(np.float32),
            offset=np.stack([affine.offset for affine in fitted]).astype(np.float32),
        ),
        gains=tuple(
            _gain(tap, folds, affine, ridge) for tap, folds, affine in zip(array.taps, by_tap, fitted, strict=True)
        ),
    )


def _moments_of_fold(array: StoredArray, other: StoredArray, pairs: _Pairs, fold: int) -> list[ChannelMoments]:
    """Moments of (value here, value in the float store) of a fold, a tap each."""
    n_values = array.spec.bytes_per_row // array.spec.dtype.itemsize
    pieces = []
    for rows, twins in pairs.of_fold(fold, max(1, PIECE_BYTES // (4 * n_values))):
        both = zip(_by_tap(array, rows, array), _by_tap(other, twins, array), strict=True)
        pieces.append([ChannelMoments.of(x, y) for x, y in both])
    return [reduce(add, of_tap) for of_tap in zip(*pieces, strict=True)]


def _by_tap(array: StoredArray, rows: Rows, wanted: StoredArray) -> list[Floats]:
    """Values (row and token, channel) of each tap of `wanted`."""
    values = np.empty((len(rows), *wanted.row_shape), np.float32)
    array.read_into(values, rows, wanted.taps)
    by_tap = values.reshape(len(rows), len(wanted.taps), *wanted.row_shape[-2:])
    return [by_tap[:, place].reshape(-1, by_tap.shape[-1]) for place in range(by_tap.shape[1])]


def _gain(tap: int, folds: Sequence[ChannelMoments], fitted: ChannelAffine, ridge: float) -> TapGain:
    """SNR before and after, each fold mapped by what the others say."""
    identity = ChannelAffine.identity(len(fitted.scale))
    signal = before = after = 0.0
    for held_out, fold in enumerate(folds):
        others = [other for i, other in enumerate(folds) if i != held_out]
        signal += float(fold.yy.sum())
        before += float(fold.squared_error(identity).sum())
        after += float(fold.squared_error(fit_gated_affine(others, ridge=ridge)).sum())
    mapped = int(((fitted.scale != 1) | (fitted.offset != 0)).sum())
    return TapGain(tap=tap, before_db=_db(signal, before), after_db=_db(signal, after), mapped=mapped)


def _db(signal: float, noise: float) -> float | None:
    return round(10 * float(np.log10(signal / noise)), 2) if signal > 0 and noise > 0 else None
