"""Targets tables, `targets/NAME.parquet`: what is to be learnt of each sample, of one of three kinds.

    class        target int64          one class
    labels       target list<int64>    any number of classes, ascending
    token-class  target list<int32>    one class a patch token of a grid, row-major; −1 where it is ignored

The schema's metadata names the kind (none means `class`), the classes, the grid, and the order of the lines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.canonical import parse_json
from coldtap.stores.format.fields import MAX_CLASSES
from coldtap.stores.format.tables import parse_schema, parse_table
from coldtap.stores.format.types import IGNORED, TargetKind

TARGETS = "targets"
MOST_CLASSES = 1 << 16  # of labels and token classes: a reader makes room for them before it sees one
_TYPES: dict[TargetKind, pa.DataType] = {
    "class": pa.int64(),
    "labels": pa.list_(pa.int64()),
    "token-class": pa.list_(pa.int32()),
}
_SCHEMAS = {kind: pa.schema([("sample_id", pa.string()), ("target", arrow)]) for kind, arrow in _TYPES.items()}
TARGETS_SCHEMA = _SCHEMAS["class"]

type Integers = np.ndarray[Any, np.dtype[np.int64]]


def targets_name(name: str) -> str:
    """Path of a named target's table under the store."""
    return f"{TARGETS}/{name}.parquet"


def targets_bytes(
    ids: Sequence[str],
    targets: Sequence[Any] | np.ndarray[Any, Any] | pa.Array,
    class_names: Sequence[str] | None,
    *,
    kind: TargetKind = "class",
    n_classes: int | None = None,
    grid: tuple[int, int] | None = None,
    order: str | None = None,
) -> bytes:
    """Return the Parquet bytes of a targets table.

    Args:
        ids: sample ids.
        targets: of each: a class, its labels ascending, or the classes of its tokens.
        class_names: of all classes, kept in the schema's metadata.
        kind: of the targets.
        n_classes: how many there are; None counts the names. Not kept for `class`.
        grid: (h, w) of token classes.
        order: the recipe's digest of the order of samples, where `ids` are all of them in that order: readers then
            find a target by its place, which for ten million samples takes no look-up by id.
    """
    metadata: dict[bytes, bytes] = {}
    if class_names:
        metadata[b"class_names"] = json.dumps(list(class_names)).encode()
    if order is not None:
        metadata[b"order"] = order.encode()
    if kind != "class":
        metadata[b"kind"] = kind.encode()
        metadata[b"n_classes"] = str(n_classes or len(class_names or ())).encode()
    if grid is not None:
        metadata[b"grid"] = json.dumps(list(grid)).encode()
    schema = _SCHEMAS[kind].with_metadata(metadata or None)
    table = pa.Table.from_arrays([pa.array(ids, pa.string()), pa.array(targets, _TYPES[kind])], schema=schema)
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A targets table without its ids.

    Attributes:
        values: the targets of all lines, one line after another: int64, of token classes int32.
        class_names: by class, where known.
        order: digest of the order of samples that the lines follow; None for any order.
        kind: of the targets.
        stated_classes: how many classes the table says there are; None of `class`.
        grid: (h, w) of token classes.
        starts: (line + 1,) where the labels of each line begin in `values`.
    """

    values: np.ndarray[Any, Any]
    class_names: tuple[str, ...] | None
    order: str | None
    kind: TargetKind = "class"
    stated_classes: int | None = None
    grid: tuple[int, int] | None = None
    starts: Integers | None = None

    @property
    def n_lines(self) -> int:
        """Lines of the table."""
        if self.starts is not None:
            return len(self.starts) - 1
        return len(self.values) // self._line_values

    @cached_property
    def n_classes(self) -> int:
        """How many classes there are, occurring or not."""
        if self.stated_classes is not None:
            return self.stated_classes
        return len(self.class_names) if self.class_names else int(self.values.max(initial=-1)) + 1

    def of(self, lines: Integers) -> np.ndarray[Any, Any]:
        """Return targets of lines: (line,) int64; labels (line, class) bool; token classes (line, patch) int64."""
        if self.starts is not None:
            return self._labels_of(self.starts, lines)
        if self.kind == "token-class":
            return self.values.reshape(-1, self._line_values)[lines].astype(np.int64)
        return np.asarray(self.values[lines])

    @property
    def _line_values(self) -> int:
        return self.grid[0] * self.grid[1] if self.grid else 1

    def _labels_of(self, starts: Integers, lines: Integers) -> np.ndarray[Any, np.dtype[np.bool_]]:
        places, counts = places_in(starts, lines)
        there = np.zeros((len(lines), self.n_classes), bool)
        there[np.repeat(np.arange(len(lines)), counts), self.values[places]] = True
        return there


def places_in(starts: Integers, lines: Integers) -> tuple[Integers, Integers]:
    """Return where the values of some lines stand, one line after another, and how many each line has."""
    counts = starts[lines + 1] - starts[lines]
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(starts[lines] - ends + counts, counts), counts


def parse_targets(file: pa.NativeFile, *, most_lines: int, where: str) -> Targets:
    """Return a targets table without its ids.

    Args:
        file: its bytes.
        most_lines: the samples of its store; a table of labels or token classes has no more lines.
        where: the file, for errors.

    Raises:
        CorruptStoreError: the file is not such a table.
    """
    found = parse_schema(file, where=where).metadata or {}
    metadata = {key.decode(errors="replace"): value for key, value in found.items()}
    kind, names = _kind(where, metadata), _class_names(where, metadata)
    order = metadata["order"].decode(errors="replace") if "order" in metadata else None
    if kind == "class":
        values = parse_table(file, TARGETS_SCHEMA, ["target"], where=where)["target"].to_numpy()
        _require_in_range(where, values, MAX_CLASSES, lowest=np.iinfo(np.int64).min)
        return Targets(values=values, class_names=names, order=order)
    n_classes = _stated_classes(where, metadata, names)
    if kind == "labels":
        values, starts = _parse_lists(file, kind, most_values=most_lines * n_classes, where=where)
        _require_in_range(where, values, n_classes, lowest=0)
        _require_ascending(where, values, starts)
        return Targets(
            values=values, class_names=names, order=order, kind=kind, stated_classes=n_classes, starts=starts
        )
    grid = _grid(where, metadata)
    values, starts = _parse_lists(file, kind, most_values=most_lines * grid[0] * grid[1], where=where)
    _require_in_range(where, values, n_classes, lowest=IGNORED)
    if (np.diff(starts) != grid[0] * grid[1]).any():
        raise CorruptStoreError(f"{where}: a line has not the {grid[0]} × {grid[1]} targets of its grid")
    return Targets(values=values, class_names=names, order=order, kind=kind, stated_classes=n_classes, grid=grid)


def parse_target_ids(file: pa.NativeFile, kind: TargetKind, *, where: str) -> pa.ChunkedArray:
    """Return the sample ids of a targets table, in its order.

    Raises:
        CorruptStoreError: the file is not such a table.
    """
    return parse_table(file, _SCHEMAS[kind], ["sample_id"], where=where)["sample_id"]


def _kind(where: str, metadata: Mapping[str, bytes]) -> TargetKind:
    found = metadata.get("kind", b"class").decode(errors="replace")
    for kind in _SCHEMAS:
        if kind == found:
            return kind
    raise CorruptStoreError(f"{where}: its targets are of kind {found!r}; this coldtap knows {', '.join(_SCHEMAS)}")


def _class_names(where: str, metadata: Mapping[str, bytes]) -> tuple[str, ...] | None:
    data = metadata.get("class_names")
    if not data:
        return None
    try:
        names = parse_json(data)
    except ValueError as error:
        raise CorruptStoreError(f"{where}: its class names are not JSON ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptStoreError(f"{where}: its class names are not a list of names")
    return tuple(names)


def _parse_lists(
    file: pa.NativeFile, kind: TargetKind, *, most_values: int, where: str
) -> tuple[np.ndarray[Any, Any], Integers]:
    """The values of all lines, one line after another, and where each line begins."""
    table = parse_table(file, _SCHEMAS[kind], ["target"], most_values=most_values, where=where)
    column = table["target"].combine_chunks()
    values = column.flatten()
    if values.null_count:
        raise CorruptStoreError(f"{where}: a target has a value that is null")
    return values.to_numpy(), column.offsets.to_numpy().astype(np.int64)


def _stated_classes(where: str, metadata: Mapping[str, bytes], names: tuple[str, ...] | None) -> int:
    text = metadata.get("n_classes", b"").decode(errors="replace")
    n_classes = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0
    if not 1 <= n_classes <= MOST_CLASSES or (names is not None and len(names) != n_classes):
        raise CorruptStoreError(
            f"{where}: its number of classes is {text!r}; expected 1 to {MOST_CLASSES}, and a name for each or none"
        )
    return n_classes


def _grid(where: str, metadata: Mapping[str, bytes]) -> tuple[int, int]:
    try:
        grid = parse_json(metadata.get("grid", b"null"))
    except ValueError:
        grid = None
    if not (isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and 0 < n < 1 << 15 for n in grid)):
        raise CorruptStoreError(f"{where}: its token classes have no grid [h, w]")
    return grid[0], grid[1]


def _require_in_range(where: str, values: np.ndarray[Any, Any], n_classes: int, *, lowest: int) -> None:
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if low < lowest or high >= n_classes:
        raise CorruptStoreError(f"{where} has targets from {low} to {high}; its classes are 0 to {n_classes - 1}")


def _require_ascending(where: str, values: Integers, starts: Integers) -> None:
    rising = np.diff(values) > 0
    ends = starts[1:-1]  # between two lines anything may follow anything
    rising[ends[(ends > 0) & (ends < len(values))] - 1] = True
    if not rising.all():
        raise CorruptStoreError(f"{where}: the labels of a line are not ascending")


def same_targets(file: pa.NativeFile, data: bytes, *, where: str) -> bool:
    """Return whether a stored table says what `data` says; its bytes may differ, as those of two pyarrow versions do.

    Raises:
        CorruptStoreError: the stored file is not such a table.
    """
    new = pq.read_table(BytesIO(data))
    if not parse_schema(file, where=where).equals(new.schema, check_metadata=True):
        return False
    return bool(parse_table(file, new.schema, where=where).equals(new, check_metadata=True))
