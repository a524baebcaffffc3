"""`predictions.parquet` of a run folder: what an adaptor said of each sample of the splits it was evaluated on.

    split        string
    sample_id    string
    loss         float32             nats
    target       int64               class; list<int64> the labels that are there, or the classes of the tokens
    predicted    int64               class; list<int64> of token classes; not there for labels
    probability  float32             of the class; list<float32> of all labels; not there for token classes

The schema's metadata says the `kind` of the targets. Splits follow each other, samples in the order of the store.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coldtap.adaptors.metrics.metrics import TrialRows
from coldtap.errors import CorruptStoreError, RunError
from coldtap.stores.format.tables import parse_schema, parse_table
from coldtap.stores.format.types import KINDS, TargetKind
from coldtap.stores.reading.manifest_files import MAX_TABLE_BYTES
from coldtap.stores.storage.address import Place, storage_at

PREDICTIONS = "predictions.parquet"
_INTEGERS, _FLOATS = pa.list_(pa.int64()), pa.list_(pa.float32())
_COMMON = [("split", pa.string()), ("sample_id", pa.string()), ("loss", pa.float32())]
_SCHEMAS: dict[TargetKind, pa.Schema] = {
    "class": pa.schema([*_COMMON, ("target", pa.int64()), ("predicted", pa.int64()), ("probability", pa.float32())]),
    "labels": pa.schema([*_COMMON, ("target", _INTEGERS), ("probability", _FLOATS)]),
    "token-class": pa.schema([*_COMMON, ("target", _INTEGERS), ("predicted", _INTEGERS)]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPredictions:
    """What an adaptor said of one split: the samples' ids, and the rest as metrics give it."""

    ids: Sequence[str]
    rows: TrialRows


def write_predictions(run: Place, kind: TargetKind, splits: Mapping[str, SplitPredictions]) -> None:
    """Write a run's predictions, whole or not at all; equal predictions give equal bytes.

    Raises:
        MachineError: The disk is full, read-only or refuses.
    """
    schema = _SCHEMAS[kind].with_metadata({"kind": kind})
    table = pa.concat_tables(
        [schema.empty_table(), *(_table(schema, kind, split, said) for split, said in splits.items())]
    )
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage_at(run).put(PREDICTIONS, [sink.getvalue()])


def _table(schema: pa.Schema, kind: TargetKind, split: str, said: SplitPredictions) -> pa.Table:
    rows = said.rows
    columns = {
        "split": pa.array([split] * len(said.ids), pa.string()),
        "sample_id": pa.array(said.ids, pa.string()),
        "loss": pa.array(rows.losses),
        "target": _lists_of_true(rows.targets) if kind == "labels" else _column(rows.targets),
        "predicted": _column(rows.predicted),
        "probability": _column(rows.probability),
    }
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _column(values: np.ndarray[Any, Any] | None) -> pa.Array | None:
    """Numbers (sample,), or lists of them (sample, ·)."""
    if values is None or values.ndim == 1:
        return None if values is None else pa.array(values)
    return _lists(values.ravel(), np.full(len(values), values.shape[1]))


def _lists_of_true(targets: np.ndarray[Any, np.dtype[np.bool_]]) -> pa.Array:
    """The classes that are true in each line (sample, class)."""
    return _lists(np.nonzero(targets)[1], targets.sum(axis=1))


def _lists(values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What `predictions.parquet` says: the kind of the targets, and of each split what was written."""

    kind: TargetKind
    splits: Mapping[str, SplitPredictions]

    def split(self, name: str) -> SplitPredictions:
        """Return what was said of a split.

        Raises:
            RunError: Nothing was.
        """
        if name not in self.splits:
            there = ", ".join(self.splits) or "no split"
            raise RunError(
                f"{PREDICTIONS} has no predictions of {name}, only of {there}: train again into another `out`"
            )
        return self.splits[name]


def read_predictions(run: Place) -> Predictions | None:
    """Return the predictions of a run folder; None where it has none, as those of earlier versions.

    Raises:
        RunError: The file is damaged, or has other columns.
    """
    storage = storage_at(run)
    where = storage.describe(PREDICTIONS)
    try:
        file = pa.BufferReader(storage.get(PREDICTIONS, limit=MAX_TABLE_BYTES))
        found = parse_schema(file, where=where)
        kind = _kind(found)
        if kind is None or not found.equals(_SCHEMAS[kind], check_metadata=False):
            raise RunError(f"{where} has columns {found.names} of no kind of target that this coldtap knows")
        table = parse_table(file, _SCHEMAS[kind], where=where)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{where} cannot be read ({error.strerror}): train again into another `out`") from error
    except CorruptStoreError as error:
        raise RunError(f"{error}: train again into another `out`") from error
    if problem := _problem(table, kind):
        raise RunError(f"{where} is damaged ({problem}): train again into another `out`")
    names = table["split"].unique().to_pylist()
    return Predictions(kind=kind, splits={split: _split(table, kind, split) for split in names})


def _split(table: pa.Table, kind: TargetKind, split: str) -> SplitPredictions:
    lines = table.filter(pc.equal(table["split"], split))
    columns = {name: lines[name].combine_chunks() for name in lines.column_names}
    arrays = {name: _array(column) for name, column in columns.items() if name not in ("split", "sample_id", "target")}
    target = columns["target"]
    rows = TrialRows(
        losses=arrays["loss"],
        targets=_truths(target, arrays["probability"].shape[1]) if kind == "labels" else _array(target),
        predicted=arrays.get("predicted"),
        probability=arrays.get("probability"),
    )
    return SplitPredictions(ids=columns["sample_id"].to_pylist(), rows=rows)


def _kind(schema: pa.Schema) -> TargetKind | None:
    said = (schema.metadata or {}).get(b"kind", b"").decode(errors="replace")
    return next((kind for kind in KINDS if kind == said), None)


def _problem(table: pa.Table, kind: TargetKind) -> str | None:
    """What is wrong with the lines of a table, or None."""
    lists = {name: table[name].combine_chunks() for name in table.column_names if pa.types.is_list(table[name].type)}
    if any(column.flatten().null_count for column in lists.values()):
        return "a value is null"
    fixed = ("probability",) if kind == "labels" else ("target", "predicted")
    widths = {int(n) for name in fixed if name in lists for n in np.unique(np.diff(lists[name].offsets.to_numpy()))}
    if lists and len(widths) > 1:
        return f"lists of {sorted(widths)} values"
    if kind == "labels" and widths and not _in_range(lists["target"].flatten().to_numpy(), *widths):
        return "a label is none of the classes"
    return None


def _in_range(labels: np.ndarray[Any, Any], n_classes: int) -> bool:
    return bool(((labels >= 0) & (labels < n_classes)).all())


def _array(column: pa.Array) -> np.ndarray[Any, Any]:
    """Numbers (sample,), or of lists, which are all as long, (sample, ·)."""
    if not pa.types.is_list(column.type):
        return np.asarray(column.to_numpy())
    return np.asarray(column.flatten().to_numpy()).reshape(len(column), -1)


def _truths(column: pa.Array, n_classes: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(sample, class) from the lists of the classes that are true."""
    truths = np.zeros((len(column), n_classes), bool)
    lengths = np.diff(column.offsets.to_numpy())
    truths[np.repeat(np.arange(len(column)), lengths), column.flatten().to_numpy()] = True
    return truths
