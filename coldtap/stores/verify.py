"""Verification: every byte of a store held against its manifest, its checksums and its metadata."""

import os
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from coldtap.stores.array_reader import StoredArray
from coldtap.stores.canonical import sha256
from coldtap.stores.errors import CorruptStoreError, StoreError
from coldtap.stores.index import REJECTED, REJECTED_SCHEMA, SAMPLES, SAMPLES_SCHEMA, read_table
from coldtap.stores.lock import LOCK_NAME
from coldtap.stores.manifest import FEATURES, MANIFEST, Entry, files_of, read_manifest
from coldtap.stores.recipe_file import read_recipe
from coldtap.stores.shards import CRC_BYTES, ShardFile, tap_digests
from coldtap.stores.store import Store

MAX_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: where (relative to the store), and what."""

    where: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was checked and what is wrong."""

    digest: str
    n_files: int
    n_bytes: int
    n_rows: int
    problems: tuple[Problem, ...]


def verify_store(
    path: str | Path, *, advance: Callable[[int], None] = lambda n_bytes: None, n_threads: int | None = None
) -> Verification:
    """Check every file, digest, checksum, shape and row of a store.

    Args:
        path: the store.
        advance: called with the bytes read, as files are done.
        n_threads: None for one a core, up to 8: each holds a shard, twice.

    Raises:
        StoreError: there is no store to check, or it is incomplete.
        CorruptStoreError: its manifest cannot be read at all.
    """
    store = Path(path)
    if not (store / MANIFEST).exists() and read_recipe(store) is None:
        raise StoreError(f"there is no store at {store}: make one with `cache-features SOURCE {store}`")
    entries, digest = read_manifest(store)
    problems = [*_file_problems(store, entries)]
    files = [entry for name, entry in entries.items() if "#" not in name]
    damaged = {problem.where for problem in problems}
    opened: Store | None = None
    try:
        opened = Store(store)
        arrays = opened.arrays
    except CorruptStoreError as error:
        problems.append(Problem(where=".", what=str(error)))
        arrays = {}
    shards = {
        f"{FEATURES}/{array.spec.shard_key(block)}": (array, block)
        for array in arrays.values()
        for block in range(array.n_rows // array.spec.block_rows)
    }

    def check(entry: Entry) -> list[Problem]:
        found = [] if entry.name in damaged else [*_content_problems(store, entry, entries, shards)]
        advance(entry.n_bytes)
        return found

    with ThreadPoolExecutor(n_threads or min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        for found in pool.map(check, files):
            problems.extend(found)
    n_rows = 0
    if opened is not None:
        found_rows, n_rows = _row_problems(opened, damaged)
        problems.extend(problem for problem in found_rows if problem.where not in damaged)
    return Verification(
        digest=digest,
        n_files=len(files),
        n_bytes=sum(entry.n_bytes for entry in files),
        n_rows=n_rows,
        problems=tuple(problems),
    )


def _file_problems(store: Path, entries: Mapping[str, Entry]) -> Iterator[Problem]:
    """Files that are missing, of another size, or not listed."""
    there = files_of(store)
    for name, entry in entries.items():
        if "#" in name:
            continue
        if name not in there:
            yield Problem(where=name, what="the file is missing")
        elif (size := (store / name).stat().st_size) != entry.n_bytes:
            yield Problem(where=name, what=f"{size} bytes; the manifest says {entry.n_bytes}")
    for name in sorted(there - set(entries) - {MANIFEST, LOCK_NAME}):
        yield Problem(where=name, what="the manifest does not list this file")


def _content_problems(
    store: Path, entry: Entry, entries: Mapping[str, Entry], shards: Mapping[str, tuple[StoredArray, int]]
) -> Iterator[Problem]:
    data = (store / entry.name).read_bytes()
    same = sha256(data) == entry.sha256
    if entry.name not in shards:
        if not same:
            yield Problem(where=entry.name, what="its SHA-256 is not the manifest's")
        return
    array, block = shards[entry.name]
    found = [*_shard_problems(store, entry.name, data, array, block, entries)]
    yield from found
    if not same and not found:
        yield Problem(where=entry.name, what="its SHA-256 is not the manifest's, though all checksums hold")


def _shard_problems(
    store: Path, name: str, data: bytes, array: StoredArray, block: int, entries: Mapping[str, Entry]
) -> Iterator[Problem]:
    """Chunks whose checksum does not hold, and taps whose digest is not the manifest's."""
    spec = array.spec
    try:
        shard = ShardFile(store / name, spec)
        present = shard.present()
    except CorruptStoreError as error:
        yield Problem(where=name, what=str(error))
        return
    length = spec.chunk_bytes + CRC_BYTES
    offsets = shard.entries[present][:, :, 0].astype(np.int64)
    chunks = np.empty((*offsets.shape, length), np.uint8)
    rows = np.flatnonzero(present)
    whole = np.frombuffer(data, np.uint8)
    for i, row in enumerate(rows):
        for position, offset in enumerate(offsets[i]):
            chunk = chunks[i, position] = whole[offset : offset + length]
            stored = int.from_bytes(chunk[-CRC_BYTES:].tobytes(), "little")
            if google_crc32c.value(np.ascontiguousarray(chunk[:-CRC_BYTES])) != stored:
                tap = spec.taps[position] if spec.gather == "layers" else None
                where = f"row {block * spec.block_rows + int(row)}" + ("" if tap is None else f", tap {tap}")
                yield Problem(where=name, what=f"{where}: the chunk's checksum does not hold")
    if spec.chunks_per_row > 1:
        for tap, digest in zip(spec.taps, tap_digests(chunks), strict=True):
            listed = entries.get(f"{name}#{tap}")
            if listed is None or listed.sha256 != digest:
                yield Problem(where=f"{name}#{tap}", what="the tap's SHA-256 is not the manifest's")


def _row_problems(store: Store, damaged: Set[str]) -> tuple[list[Problem], int]:
    """Rows that the tables and the shards do not agree on; shards that are damaged are reported themselves."""
    problems = []
    try:
        # Read as they are: their digests are reported with the files.
        listed = set(read_table(store.path / SAMPLES, SAMPLES_SCHEMA)["row"].to_pylist())
        rejected = set(read_table(store.path / REJECTED, REJECTED_SCHEMA)["row"].to_pylist())
    except CorruptStoreError as error:
        return [Problem(where=".", what=str(error))], 0
    if both := sorted(listed & rejected):
        problems.append(Problem(where="samples.parquet", what=f"row {both[0]} is also listed as rejected"))
    for array in store.arrays.values():
        there, unknown = _present_rows(array, store.path, damaged)
        for row in sorted((there ^ listed) - unknown)[:3]:
            what = "has a chunk and no line" if row in there else "has a line and no chunk"
            problems.append(Problem(where="samples.parquet", what=f"row {row} of {array.name} {what}"))
    return problems, len(listed)


def _present_rows(array: StoredArray, store: Path, damaged: Set[str]) -> tuple[set[int], set[int]]:
    """Rows of an array that have their chunks, and rows of which a damaged shard does not say."""
    there: set[int] = set()
    unknown: set[int] = set()
    for block in range(array.n_rows // array.spec.block_rows):
        name = f"{FEATURES}/{array.spec.shard_key(block)}"
        rows = np.arange(block * array.spec.block_rows, (block + 1) * array.spec.block_rows)
        try:
            if name in damaged:
                unknown.update(rows.tolist())
            elif (store / name).exists():
                there.update(rows[ShardFile(store / name, array.spec).present()].tolist())
        except CorruptStoreError:
            unknown.update(rows.tolist())
    return there, unknown


def source_problems(store: Store, read_digest: Callable[[str], str | None]) -> Iterator[Problem]:
    """Samples whose image is not what was read when the store was made.

    Args:
        store: an open store.
        read_digest: SHA-256 of a sample's image now, by sample id; None where the source has no such sample.
    """
    seen = set()
    columns = (store.samples[name].to_pylist() for name in ("sample_id", "source", "source_sha256"))
    for sample, where, digest in zip(*columns, strict=True):
        if sample in seen:
            continue
        seen.add(sample)
        now = read_digest(sample)
        if now is None:
            yield Problem(where=where, what=f"sample {sample!r} is not in the source")
        elif now != digest:
            yield Problem(where=where, what=f"the image of sample {sample!r} has changed since it was cached")
