"""Verifying escapes: that each points to a place in its own block; their digests, or in format 1 their metadata."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.canonical import parse_json
from coldtap.stores.format.chunk_digests import digests_name
from coldtap.stores.format.escape_segments import escape_digests, escapes_folder, escapes_name, parse_escapes
from coldtap.stores.format.escapes import longest_list
from coldtap.stores.format.features import ESCAPE_SEGMENTS
from coldtap.stores.format.manifest import FEATURES, Entry
from coldtap.stores.format.metadata import escape_files
from coldtap.stores.reading.array import StoredArray
from coldtap.stores.reading.store import Store
from coldtap.stores.verify.problems import Problem

COMPARED = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "attributes")


def escape_problems(
    store: Store, array: StoredArray, entries: Mapping[str, Entry], damaged: Set[str]
) -> Iterator[Problem]:
    """Yield what is wrong with the escapes of one array.

    Args:
        store: an open store.
        array: one of its arrays.
        entries: the manifest.
        damaged: files that are reported already; escapes in such files are not looked at.
    """
    if not array.spec.kept_as.is_coded:
        return
    if ESCAPE_SEGMENTS in store.recipe.requires:
        yield from _segment_problems(store, array, entries, damaged)
        return
    folder = f"{FEATURES}/escapes/{array.name}"
    if any(name.startswith(f"{folder}/") for name in damaged):
        return
    n_blocks = array.n_rows // array.spec.block_rows
    expected = escape_files([array.spec], n_blocks, {array.name: longest_list(entries, array.spec)})
    for part in ("position", "value"):
        name = f"{folder}/{part}/zarr.json"
        if what := _differences(store, name, parse_json(expected[name])):
            yield Problem(where=name, what=what)
            return
    yield from _list_problems(store, array, folder, n_blocks)


def _differences(store: Store, name: str, expected: Mapping[str, Any]) -> str | None:
    """The fields that are not what the lists need; codecs by name, for their settings may be those of another Zarr."""
    try:
        there = parse_json(store.read_file(name))
        codecs = [codec["name"] for codec in there["codecs"]]
        differing = [key for key in COMPARED if there[key] != expected[key]]
    except (CorruptStoreError, ValueError, KeyError, TypeError) as error:
        return f"not the metadata of a list of escapes ({error!r})"
    if codecs != [codec["name"] for codec in expected["codecs"]]:
        differing.append("codecs")
    return f"{', '.join(differing)}: not what the lists of this store need" if differing else None


def _segment_problems(
    store: Store, array: StoredArray, entries: Mapping[str, Entry], damaged: Set[str]
) -> Iterator[Problem]:
    for block in range(array.n_rows // array.spec.block_rows):
        name, list_name = escapes_name(array.name, block), digests_name(escapes_folder(array.name), block)
        if name not in entries or {name, list_name} & damaged:
            continue
        try:
            data = store.read_file(name)
            parse_escapes(data, array.spec, where=name)
            if escape_digests(data, array.spec, where=name) != store.read_file(list_name):
                yield Problem(where=list_name, what="not the digests of the segments of the block's escapes")
        except CorruptStoreError as error:
            yield Problem(where=name, what=str(error))


def _list_problems(store: Store, array: StoredArray, folder: str, n_blocks: int) -> Iterator[Problem]:
    assert array.escapes is not None
    for block in range(n_blocks):
        try:
            array.escapes.of_block(block)
        except CorruptStoreError as error:
            yield Problem(where=folder, what=str(error))
