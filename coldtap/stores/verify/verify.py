"""Verification: every byte of a store held against its manifest, its checksums and its metadata."""

from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from typing import Any

import numpy as np

from coldtap.errors import CorruptStoreError, StoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunk_digests import DIGESTS, digests_name
from coldtap.stores.format.compensation import compensation_file
from coldtap.stores.format.escape_segments import ESCAPES
from coldtap.stores.format.manifest import FEATURES, MANIFEST, Entry
from coldtap.stores.format.tables import REJECTED, REJECTED_SCHEMA, SAMPLES, SAMPLES_SCHEMA
from coldtap.stores.reading.digest_lists import ReadDigests, digests_of
from coldtap.stores.reading.manifest_files import file_entry, files_of, is_complete, read_manifest
from coldtap.stores.reading.recipe_file import read_recipe
from coldtap.stores.reading.shard_files import ShardFile
from coldtap.stores.reading.store import Store
from coldtap.stores.reading.tables import read_table
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import TEMPORARY_SUFFIX, Storage
from coldtap.stores.storage.threads import usable_cores
from coldtap.stores.verify.escapes import escape_problems
from coldtap.stores.verify.problems import Problem
from coldtap.stores.verify.shard import shard_problems

MAX_THREADS = 16
FILES_AT_ONCE = 4096  # futures in memory: a store may have a million files

type Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was checked and what is wrong."""

    digest: str
    n_files: int
    n_bytes: int
    n_rows: int
    problems: tuple[Problem, ...]


def verify_store(
    path: Place,
    *,
    begin: Callable[[int], None] = lambda n_bytes: None,
    advance: Callable[[int], None] = lambda n_bytes: None,
    n_threads: int | None = None,
) -> Verification:
    """Check every file, digest, checksum, shape and row of a store.

    Args:
        path: the store.
        begin: called once with the bytes that will be read.
        advance: called with the bytes read, as files are done.
        n_threads: None for one a core, up to 16: beyond, Python's own lock is what they wait for.

    Raises:
        StoreError: there is no store to check, or it is incomplete.
        CorruptStoreError: its manifest cannot be read at all.
    """
    storage = storage_at(path)
    if not is_complete(storage) and read_recipe(storage) is None:
        raise StoreError(f"there is no store at {storage}: make one with `cache-features SOURCE {storage}`")
    manifest = read_manifest(storage)
    entries = manifest.entries()
    problems = [*_file_problems(storage, entries)]
    files = [entry for name, entry in entries.items() if "#" not in name]
    begin(sum(entry.n_bytes for entry in files))
    damaged = {problem.where for problem in problems}
    opened: Store | None = None
    try:
        opened = Store(storage)
    except CorruptStoreError as error:
        problems.append(Problem(where=".", what=str(error)))
    arrays = {array.name: array.spec for array in opened.arrays.values()} if opened else {}
    read_digests = digests_of(opened.files, opened.recipe) if opened else None
    if read_digests:
        problems.extend(problem for problem in _list_problems(entries, arrays) if problem.where not in damaged)
    if opened is not None:
        problems.extend(_tap_line_problems(entries, arrays, by_tap=read_digests is None))

    def check(entry: Entry) -> list[Problem]:
        found = [] if entry.name in damaged else [*_content_problems(storage, entry, entries, arrays, read_digests)]
        advance(entry.n_bytes)
        return found

    with ThreadPoolExecutor(n_threads or min(usable_cores(), MAX_THREADS)) as pool:
        for some in batched(files, FILES_AT_ONCE):
            for found in pool.map(check, some):
                problems.extend(found)
    n_rows = 0
    if opened is not None:
        damaged |= {problem.where for problem in problems}
        problems.extend(_compensation_problems(opened, damaged))
        for array in opened.arrays.values():
            problems.extend(escape_problems(opened, array, entries, damaged))
        found_rows, n_rows = _row_problems(opened, damaged)
        problems.extend(found_rows)
    return Verification(
        digest=manifest.digest,
        n_files=len(files),
        n_bytes=sum(entry.n_bytes for entry in files),
        n_rows=n_rows,
        problems=tuple(problems),
    )


def _file_problems(storage: Storage, entries: Mapping[str, Entry]) -> Iterator[Problem]:
    """Files that are missing, of another size, or not listed."""
    there = files_of(storage)
    for name, entry in entries.items():
        if "#" in name:
            continue
        if name not in there:
            yield Problem(where=name, what="the file is missing")
        elif what := _size_problem(storage, name, entry.n_bytes):
            yield Problem(where=name, what=what)
    for name in sorted(there - set(entries) - {MANIFEST}):
        yield Problem(where=name, what=_link_problem(storage, name) or "the manifest does not list this file")


def _size_problem(storage: Storage, name: str, n_bytes: int) -> str | None:
    try:
        there = storage.stat(name)
    except (OSError, CorruptStoreError) as error:
        return f"the file cannot be read ({error})"
    if there is None:
        return "the file cannot be read (a link to nothing, such as git-annex leaves)"
    return None if there.n_bytes == n_bytes else f"{there.n_bytes} bytes; the manifest says {n_bytes}"


def _link_problem(storage: Storage, name: str) -> str | None:
    """What stands in the place of a file, such as a link to a folder."""
    if name.endswith(TEMPORARY_SUFFIX):  # what a dead job left, which is no object
        return None
    try:
        storage.stat(name)
    except CorruptStoreError as error:
        return str(error)
    except OSError:
        pass
    return None


def _content_problems(
    storage: Storage,
    entry: Entry,
    entries: Mapping[str, Entry],
    arrays: Mapping[str, ArraySpec],
    read_digests: ReadDigests | None,
) -> Iterator[Problem]:
    name, _, key = entry.name.removeprefix(f"{FEATURES}/").partition("/c/")
    if name in arrays and key:
        yield from shard_problems(storage, entry, arrays[name], int(key.split("/")[0]), entries, read_digests)
    elif file_entry(storage, entry.name) != entry:
        yield Problem(where=entry.name, what="its SHA-256 is not the manifest's")


def _compensation_problems(store: Store, damaged: Set[str]) -> Iterator[Problem]:
    """Files of compensations that are what the manifest says, and yet no maps of this store's arrays."""
    for name in store.compensations:
        if (file := compensation_file(name)) in damaged:
            continue
        try:
            store.compensation(name)
        except CorruptStoreError as error:
            yield Problem(where=file, what=str(error))


def _list_problems(entries: Mapping[str, Entry], arrays: Mapping[str, ArraySpec]) -> Iterator[Problem]:
    """Shards and escapes that have no list of digests, and lists of none."""
    wanted = set()
    for entry in entries:
        if entry.startswith(f"{ESCAPES}/"):
            wanted.add(f"{DIGESTS}/{entry}")
        name, _, key = entry.removeprefix(f"{FEATURES}/").partition("/c/")
        if name in arrays and key and "#" not in key:
            wanted.add(digests_name(name, int(key.split("/")[0])))
    there = {name for name in entries if name.startswith(f"{DIGESTS}/")}
    yield from (Problem(where=name, what="the manifest does not list these digests") for name in sorted(wanted - there))
    yield from (Problem(where=name, what="digests of what is not there") for name in sorted(there - wanted))


def _tap_line_problems(
    entries: Mapping[str, Entry], arrays: Mapping[str, ArraySpec], *, by_tap: bool
) -> Iterator[Problem]:
    """Lines of the manifest about taps that no shard has; with lists of digests there are none."""
    for name in entries:
        shard, mark, tap = name.partition("#")
        spec = arrays.get(shard.removeprefix(f"{FEATURES}/").partition("/c/")[0])
        known = spec is not None and spec.chunks_per_row > 1 and tap in map(str, spec.taps) and shard in entries
        if mark and not (by_tap and known):
            yield Problem(where=name, what="the manifest lists a tap that is not there")


def _row_problems(store: Store, damaged: Set[str]) -> tuple[list[Problem], int]:
    """Rows on which the tables, the plan and the shards do not agree; damaged files are reported themselves."""
    try:
        # Read as they are: their digests are reported with the files.
        samples = read_table(store.storage, SAMPLES, SAMPLES_SCHEMA, ["row", "view", "split"])
        listed = samples["row"].to_numpy()
        rejected = read_table(store.storage, REJECTED, REJECTED_SCHEMA, ["row"])["row"].to_numpy()
    except CorruptStoreError as error:
        return [Problem(where=".", what=str(error))], 0
    problems = [*_plan_problems(store, samples, rejected)]
    for array in store.arrays.values():
        there, unknown = _present_rows(array.spec, array.n_rows, store.storage, damaged)
        for row in np.setdiff1d(np.setxor1d(there, listed), unknown)[:3].tolist():
            what = "has a chunk and no line" if row in there else "has a line and no chunk"
            problems.append(Problem(where=SAMPLES, what=f"row {row} of {array.name} {what}"))
    return [problem for problem in problems if problem.where not in damaged], len(listed)


def _plan_problems(store: Store, samples: Any, rejected: Rows) -> Iterator[Problem]:
    """Lines of the tables that are not rows of the recipe's plan."""
    listed = samples["row"].to_numpy()
    both = np.intersect1d(listed, rejected)
    if len(both):
        yield Problem(where=SAMPLES, what=f"row {both[0]} is also listed as rejected")
    planned = np.zeros(len(listed), bool)
    splits, views = samples["split"].to_numpy(), samples["view"].to_numpy()
    for segment in store.segments:
        first = segment.first_block * store.recipe.encoding.block_rows
        inside = (listed >= first) & (listed < first + segment.n_samples)
        planned |= inside & (splits == segment.split) & (views == segment.view)
    if not planned.all():
        row = listed[~planned][0]
        yield Problem(where=SAMPLES, what=f"row {row} is not where the recipe's plan has its split and view")


def _present_rows(array: ArraySpec, n_rows: int, storage: Storage, damaged: Set[str]) -> tuple[Rows, Rows]:
    """Rows of an array that have their chunks, and rows of which a damaged shard does not say."""
    there, unknown = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in range(n_rows // array.block_rows):
        name = f"{FEATURES}/{array.shard_key(block)}"
        rows = np.arange(block * array.block_rows, (block + 1) * array.block_rows)
        try:
            if name in damaged:
                unknown.append(rows)
            elif storage.stat(name) is not None:
                there.append(rows[ShardFile(storage, name, array, int(rows[0])).present()])
        except CorruptStoreError:
            unknown.append(rows)
    return np.concatenate(there), np.concatenate(unknown)


def source_problems(store: Store, read_digest: Callable[[str], str | None]) -> Iterator[Problem]:
    """Samples whose image is not what was read when the store was made.

    Args:
        store: an open store.
        read_digest: SHA-256 of a sample's image now, by sample id; None where the source has no such sample.
    """
    seen = set()
    samples = store.samples
    columns = (samples[name].to_pylist() for name in ("sample_id", "source", "source_sha256"))
    for sample, where, digest in zip(*columns, strict=True):
        if sample in seen:
            continue
        seen.add(sample)
        now = read_digest(sample)
        if now is None:
            yield Problem(where=where, what=f"sample {sample!r} is not in the source")
        elif now != digest:
            yield Problem(where=where, what=f"the image of sample {sample!r} has changed since it was cached")
