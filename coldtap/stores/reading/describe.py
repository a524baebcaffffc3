"""What `inspect` shows of a store, complete or not."""

from math import prod
from typing import Any

import numpy as np

from coldtap.errors import StoreError
from coldtap.stores.format.codes import describe_bound
from coldtap.stores.format.escape_segments import escapes_folder
from coldtap.stores.format.journal import JOURNAL
from coldtap.stores.format.manifest import FEATURES
from coldtap.stores.format.recipe import PARTS
from coldtap.stores.reading.journal_lines import read_line
from coldtap.stores.reading.manifest_files import is_complete
from coldtap.stores.reading.recipe_file import read_recipe
from coldtap.stores.reading.row_index import Rows
from coldtap.stores.reading.store import Store
from coldtap.stores.storage.address import Place, storage_at


def describe_store(path: Place) -> dict[str, Any]:
    """Recipe, arrays, sizes, splits, labels, ranges and state of a store, as JSON.

    Raises:
        StoreError: there is no store at `path`.
        CorruptStoreError: its recipe, metadata or tables cannot be read.
    """
    storage = storage_at(path)
    found = read_recipe(storage)
    if found is None:
        raise StoreError(f"there is no store at {storage}: make one with `cache-features SOURCE {storage}`")
    recipe, recorded = found
    signed = recipe.to_dict()
    lines = (name for name in storage.list(JOURNAL) if name.endswith(".json"))
    about: dict[str, Any] = {
        "path": str(storage),
        "complete": is_complete(storage),
        "address": signed["address"],
        "format": recipe.format,
        "requires": list(recipe.requires),
        "recipe": {part: signed[part] for part in PARTS},
        "recorded": recorded,
        "n_bytes": storage.occupied_bytes(),
        "finished_blocks": sum(1 for _ in lines),
    }
    return about | _contents(Store(storage)) if about["complete"] else about


def _contents(store: Store) -> dict[str, Any]:
    rejected = store.index.rejected()
    return {
        "digest": store.digest,
        "n_rows": store.n_rows,
        "n_rejected": rejected.num_rows,
        "rejected": rejected.slice(0, 20).to_pylist(),
        "splits": {split: _split(store, split) for split in store.splits},
        "targets": {name: _targets(store, name) for name in store.target_names},
        "norm": store.norm.kind if store.norm else None,
        "compensations": {name: dict(store.compensation(name).fitted) for name in store.compensations},
        "arrays": [_array(store, name) for name in store.arrays],
    }


def _split(store: Store, split: str) -> dict[str, Any]:
    rows = store.rows(split)
    views = sum(len(store.rows(split, view)) for view in range(1, store.views + 1))
    about: dict[str, Any] = {"samples": len(rows), "augmented_rows": views}
    if store.has_targets():
        about["labels"] = _label_counts(store, "label", rows)
    return about


def _targets(store: Store, name: str) -> dict[str, Any]:
    """Kind, classes, and how many samples (of token classes, tokens) of each split have which class."""
    names, grid = store.class_names(name), store.target_grid(name)
    return {
        "kind": store.target_kind(name),
        "n_classes": store.n_classes(name),
        "class_names": None if names is None else list(names),
        "grid": None if grid is None else list(grid),
        "counts": {split: _label_counts(store, name, store.rows(split)) for split in store.splits},
    }


def _label_counts(store: Store, name: str, rows: Rows) -> dict[str, int]:
    """How many of some rows have each class that occurs; of token classes, how many tokens, ignored ones aside."""
    names, targets = store.class_names(name), store.targets(rows, name)
    found = np.nonzero(targets)[1] if targets.dtype == bool else targets[targets >= 0]
    classes, counts = np.unique(found, return_counts=True)
    return {
        names[label] if names and label < len(names) else str(label): n
        for label, n in zip(classes.tolist(), counts.tolist(), strict=True)
    }


def _array(store: Store, name: str) -> dict[str, Any]:
    array = store.arrays[name]
    n_bytes = _bytes_below(store, f"{name}/c")
    about = {
        "name": name,
        "shape": [array.n_rows, *array.row_shape],
        "dimensions": list(array.spec.dimensions),
        "taps": list(array.taps),
        "tier": array.spec.tier,
        "layout": array.spec.layout,
        "scale_exponents": list(array.numbers.exponents),
        "errors": store.recorded.get("errors", {}).get(name, []),
        "bytes_per_row": array.bytes_per_row,
        "n_bytes": n_bytes,
        "ranges": _ranges(store, name, len(array.taps)),
    }
    return about | _codes(store, name, n_bytes) if array.spec.kept_as.is_coded else about


def _codes(store: Store, name: str, n_bytes: int) -> dict[str, Any]:
    """What an int8 array takes on disk, and how many values its codes do not hold."""
    array = store.arrays[name]
    n_values = store.n_rows * prod(array.row_shape)
    escapes = _count_escapes(store, name)
    of_format_1 = _bytes_below(store, f"escapes/{name}")
    beside = of_format_1 + _bytes_below(store, f"scales/{name}") + store.storage.occupied_bytes(escapes_folder(name))
    return {
        "bound": describe_bound(store.recipe.encoding.scales),
        "n_bytes_beside": beside,
        "bits_per_value": 8 * (n_bytes + beside) / max(n_values, 1),
        "escapes": sum(escapes),
        "escapes_by_tap": escapes,
        "escaped_share": sum(escapes) / max(n_values, 1),
    }


def _bytes_below(store: Store, folder: str) -> int:
    return store.storage.occupied_bytes(f"{FEATURES}/{folder}")


def _count_escapes(store: Store, name: str) -> list[int]:
    """Escapes of each tap over all blocks."""
    array = store.arrays[name]
    assert array.escapes is not None
    counts = np.zeros(len(array.taps), np.int64)
    for block in range(array.n_rows // array.spec.block_rows):
        counts += np.bincount(array.escapes.of_block(block).place, minlength=len(counts))
    return [int(n) for n in counts]


def _ranges(store: Store, name: str, n_taps: int) -> list[list[float]]:
    """Smallest and largest value of each tap over all blocks, from the journal."""
    ranges: list[list[float]] = [[float("inf"), float("-inf")] for _ in range(n_taps)]
    block = 0
    while (line := read_line(store.storage, block)) is not None:
        for total, (low, high) in zip(ranges, line.ranges.get(name, ()), strict=False):
            total[0], total[1] = min(total[0], low), max(total[1], high)
        block += 1
    return [pair for pair in ranges if pair[0] <= pair[1]]
