"""Columns of an Arrow table as a source needs them: strings, labels, and names of labels."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from coldtap.errors import SourceError
from coldtap.pipeline.images.sources.labels import NULL, LabelSets
from coldtap.text import a_few

OPTIONAL_COLUMNS = ("label_name", "split", "id")


def require_columns(found: Collection[str], wanted: Collection[str], *, name: str) -> None:
    """Check that columns are there.

    Raises:
        SourceError: some are not; the message lists the columns found.
    """
    lacking = [column for column in wanted if column not in found]
    if lacking:
        raise SourceError(
            f"{name}: no column {a_few(lacking)}; found {a_few(list(found), 20) or 'none'}; "
            f"wanted {a_few(list(wanted))}, optionally {', '.join(OPTIONAL_COLUMNS)}"
        )


def strings(table: pa.Table, column: str, *, name: str) -> list[str | None] | None:
    """Return a column as strings, or None where the table has no such column.

    Raises:
        SourceError: the column holds neither strings nor integers.
    """
    if column not in table.column_names:
        return None
    values = table[column]
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not any(test(kind) for test in _STRING_LIKE):
        raise SourceError(f"{name}: column {column} is {values.type}; wanted strings")
    found: list[str | None] = values.cast(pa.large_string()).to_pylist()
    return found


def whole_strings(table: pa.Table, column: str, *, name: str) -> list[str] | None:
    """Return a column as strings of which none may be null; None where the table has no such column.

    Raises:
        SourceError: a value is null or of another type.
    """
    found = strings(table, column, name=name)
    if found is None:
        return None
    if None in found:
        raise SourceError(f"{name}: column {column} is null in row {found.index(None)}")
    return [str(value) for value in found]


def labels_of(table: pa.Table, *, name: str) -> npt.NDArray[np.int64] | LabelSets | None:
    """Return the label column, NULL where it is null, or of a column of lists the set of each; None without one.

    Lists may hold integers, or strings, whose numbers are their places in `class_names_of`.

    Raises:
        SourceError: the column holds neither integers nor lists of integers or strings.
    """
    if "label" not in table.column_names:
        return None
    values = table["label"]
    if _is_list(values.type):
        return _label_sets(values, name=name)
    if not (pa.types.is_integer(values.type) or pa.types.is_null(values.type)):
        raise SourceError(
            f"{name}: column label is {values.type}; wanted integers 0 … C-1 (names go to column label_name), or lists"
        )
    found: npt.NDArray[np.int64] = values.cast(pa.int64()).fill_null(NULL).to_numpy()
    return found


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _label_sets(values: pa.ChunkedArray, *, name: str) -> LabelSets:
    kind = values.type.value_type
    if not (pa.types.is_integer(kind) or _is_text(kind) or pa.types.is_null(kind)):
        raise SourceError(f"{name}: column label has lists of {kind}; wanted integers 0 … C-1, or names")
    rows = values.to_pylist()
    for row, labels in enumerate(rows):
        if labels is not None and None in labels:
            raise SourceError(f"{name}: column label has a list with a null in row {row}")
    if _is_text(kind):
        number = {label: place for place, label in enumerate(_names_in_lists(values))}
        return [None if labels is None else tuple(number[label] for label in labels) for labels in rows]
    return [None if labels is None else tuple(labels) for labels in rows]


def _names_in_lists(values: pa.ChunkedArray) -> list[str]:
    """Every name that occurs, sorted."""
    return sorted(pc.unique(pc.list_flatten(values)).drop_null().to_pylist())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def class_names_of(table: pa.Table, *, name: str) -> list[str] | None:
    """Return the name of each label 0 … C-1, or None without names or where labels have gaps.

    Raises:
        SourceError: a name is null, a label has two names, or label_name stands beside lists of labels.
    """
    if "label" in table.column_names and _is_list(table["label"].type):
        if "label_name" in table.column_names:
            raise SourceError(f"{name}: column label_name beside lists of labels: put the names into the lists instead")
        return _names_in_lists(table["label"]) if _is_text(table["label"].type.value_type) else None
    if not {"label", "label_name"} <= set(table.column_names):
        return None
    pairs = table.select(["label", "label_name"]).filter(pc.field("label") >= 0)
    pairs = pairs.group_by(["label", "label_name"]).aggregate([])
    names: dict[int, str] = {}
    called = strings(pairs, "label_name", name=name) or []
    for label, class_name in zip(pairs["label"].to_pylist(), called, strict=True):
        if class_name is None:
            raise SourceError(f"{name}: column label_name is null where label is {label}")
        if names.setdefault(label, class_name) != class_name:
            raise SourceError(f"{name}: label {label} has two names: {names[label]!r} and {class_name!r}")
    if set(names) != set(range(len(names))):
        return None
    return [names[label] for label in range(len(names))] or None


_STRING_LIKE = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_integer,
    pa.types.is_null,
)
