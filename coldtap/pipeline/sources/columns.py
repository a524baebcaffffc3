"""Columns of an Arrow table as a source needs them: strings, labels, and names of labels."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from coldtap.pipeline.sources.labels import NULL
from coldtap.pipeline.sources.wording import a_few
from coldtap.stores.errors import SourceError

OPTIONAL_COLUMNS = ("label_name", "split", "id")


def require_columns(found: Collection[str], wanted: Collection[str], *, name: str) -> None:
    """Check that columns are there.

    Raises:
        SourceError: Some are not; the message lists the columns found.
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
        SourceError: The column holds neither strings nor integers.
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
        SourceError: A value is null or of another type.
    """
    found = strings(table, column, name=name)
    if found is None:
        return None
    if None in found:
        raise SourceError(f"{name}: column {column} is null in row {found.index(None)}")
    return [str(value) for value in found]


def labels_of(table: pa.Table, *, name: str) -> npt.NDArray[np.int64] | None:
    """Return the label column, NULL where it is null; None where the table has none.

    Raises:
        SourceError: The column does not hold integers.
    """
    if "label" not in table.column_names:
        return None
    values = table["label"]
    if not (pa.types.is_integer(values.type) or pa.types.is_null(values.type)):
        raise SourceError(
            f"{name}: column label is {values.type}; wanted integers 0 … C-1 (names go to column label_name)"
        )
    found: npt.NDArray[np.int64] = values.cast(pa.int64()).fill_null(NULL).to_numpy()
    return found


def class_names_of(table: pa.Table, *, name: str) -> list[str] | None:
    """Return the name of each label 0 … C-1, or None without label_name or where labels have gaps.

    Raises:
        SourceError: A name is null, or a label has two names.
    """
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
