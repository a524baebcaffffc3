"""Writing a store: recipe first, then whole blocks, then the tables, and the manifest last.

One writer owns one whole block and writes each of its shards once. The order of renames is the order of
promises: a shard, then its block's journal line, then the manifest. A death between any two of them costs at
most the blocks in flight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from coldtap.errors import IncompleteStoreError
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.canonical import readable_json, sha256
from coldtap.stores.format.compensation import COMPENSATION
from coldtap.stores.format.escapes import escape_chunks, longest_list
from coldtap.stores.format.journal import (
    JOURNAL,
    JournalLine,
    Rejection,
    ShardRecord,
    journal_name,
    read_line,
    write_line,
)
from coldtap.stores.format.manifest import FEATURES, MANIFEST, Entry, file_entry, read_manifest, write_manifest
from coldtap.stores.format.metadata import escape_files, static_files
from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.shards import SealedShard
from coldtap.stores.format.tables import (
    REJECTED,
    REJECTED_SCHEMA,
    SAMPLES,
    SAMPLES_SCHEMA,
    write_rows,
)
from coldtap.stores.format.targets import TARGETS, same_targets, targets_name
from coldtap.stores.format.tiers import Numbers
from coldtap.stores.reading.recipe_file import RECIPE
from coldtap.stores.reading.stored_numbers import ROOT, stored_numbers
from coldtap.stores.storage.atomic import TEMPORARY_SUFFIX, machine_errors, write_file
from coldtap.stores.storage.faults import fault_point
from coldtap.stores.writing.block import ArrayBuffer, BlockBuffers


class StoreWriter:
    """Writes the blocks and tables of one store; the caller holds its lock."""

    def __init__(self, store: Path, recipe: Recipe, specs: Sequence[ArraySpec], plan: RowPlan) -> None:
        self.store = store
        self.recipe = recipe
        self.specs = tuple(specs)
        self.plan = plan
        self.numbers: Mapping[str, Numbers] = {}
        self._statics: tuple[str, ...] = ()

    def start(self, recorded: Mapping[str, Any], numbers: Mapping[str, Numbers], norm: FinalNorm | None) -> None:
        """Write the recipe and the arrays' metadata where they are not there yet; sweep what a dead job left.

        Args:
            recorded: what goes beside the recipe.
            numbers: how the values of each array are kept, unless an earlier call has fixed it.
            norm: the backbone's final norm.

        Raises:
            MachineError: the disk is full, read-only or refuses.
        """
        with machine_errors(self.store):
            self.store.mkdir(parents=True, exist_ok=True)
            for left in self._leftovers():
                left.unlink(missing_ok=True)
        recipe = readable_json({**self.recipe.to_dict(), "recorded": dict(recorded)})
        self._write_missing(RECIPE, recipe)
        fault_point("recipe-written")
        # What lies there from an earlier call is used for good; the root, written last, says that all of it lies there.
        begun = stored_numbers(self.store, self.specs)
        self.numbers = begun or numbers
        statics = static_files(self.recipe, self.specs, self.plan.n_rows, self.numbers, norm)
        for name in sorted(statics, key=ROOT.__eq__) if begun is None else ():
            write_file(self.store / name, [statics[name]])
            fault_point("array-created")
        self._statics = tuple(statics)
        fault_point("arrays-created")

    def _leftovers(self) -> Iterable[Path]:
        """Temporary files of a dead job; only where coldtap writes, for others may use the same ending."""
        for name in (RECIPE, SAMPLES, REJECTED, MANIFEST):
            yield self.store / (name + TEMPORARY_SUFFIX)
        for folder in (FEATURES, JOURNAL, TARGETS, COMPENSATION):
            yield from (self.store / folder).rglob(f"*{TEMPORARY_SUFFIX}")

    def _write_missing(self, name: str, data: bytes) -> None:
        if not (self.store / name).exists():
            write_file(self.store / name, [data])

    def finished_blocks(self) -> list[int]:
        """Blocks that have a journal line and every shard of it, of the size that the line says."""
        return [block for block in range(self.plan.n_blocks) if self._is_finished(block)]

    def _is_finished(self, block: int) -> bool:
        line = read_line(self.store, block)
        if line is None:
            return False
        with suppress(FileNotFoundError):
            return all(
                (self.store / FEATURES / name).stat().st_size == shard.n_bytes for name, shard in line.shards.items()
            )
        return False

    def new_buffers(self) -> BlockBuffers:
        """A buffer an array, for the rows of one block."""
        return {spec.name: ArrayBuffer(spec, self.numbers[spec.name]) for spec in self.specs}

    def write_block(
        self,
        block: int,
        buffers: BlockBuffers,
        *,
        rejected: Sequence[Rejection],
        source_sha256: Mapping[int, str],
        ranges: Mapping[str, list[list[float]]],
        environment: Mapping[str, Any],
    ) -> JournalLine:
        """Write a block's shards and then its journal line.

        Args:
            block: its number.
            buffers: values of the block's rows, an array each.
            rejected: planned rows that are not there.
            source_sha256: digest of each present row's image as it was read.
            ranges: smallest and largest value of each tap, an array each.
            environment: where the features were made.

        Raises:
            MachineError: the disk is full or refuses; the block is then not there, all others are.
        """
        present = np.zeros(self.plan.block_rows, bool)
        present[[row % self.plan.block_rows for row in source_sha256]] = True
        shards: dict[str, ShardRecord] = {}
        for spec in self.specs:
            # Taken also where no row is present: the buffer goes on to another block.
            escapes = buffers[spec.name].take_escapes(block, present)
            self._forget_escapes(spec, block)
            if present.any():
                self._place_shard(spec.shard_key(block), buffers[spec.name].shard.seal(present), shards)
            for key, data in escape_chunks(spec, block, escapes):
                self._place_escapes(key, data, shards)
        fault_point("block-renamed")
        line = JournalLine(
            block=block,
            shards=shards,
            rejected=tuple(rejected),
            source_sha256=dict(source_sha256),
            ranges=ranges,
            environment=dict(environment),
        )
        write_line(self.store, line)
        fault_point("journal-written")
        return line

    def _place_shard(self, key: str, sealed: SealedShard, shards: dict[str, ShardRecord]) -> None:
        def pieces() -> Iterable[memoryview]:
            yield from sealed.pieces
            fault_point("shard-temporary")

        write_file(self.store / FEATURES / key, pieces())
        fault_point("shard-renamed")
        shards[key] = ShardRecord(
            n_bytes=sealed.whole.n_bytes,
            sha256=sealed.whole.sha256,
            tap_bytes=tuple(tap.n_bytes for tap in sealed.taps),
            tap_sha256=tuple(tap.sha256 for tap in sealed.taps),
        )

    def _forget_escapes(self, spec: ArraySpec, block: int) -> None:
        """A longer list may lie there from a block that died, made elsewhere (`allow_mixed`)."""
        for part in ("position", "value"):
            rmtree(self.store / FEATURES / f"escapes/{spec.name}/{part}/c/{block}", ignore_errors=True)

    def _place_escapes(self, key: str, data: bytes, shards: dict[str, ShardRecord]) -> None:
        write_file(self.store / FEATURES / key, [data])
        fault_point("escapes-renamed")
        shards[key] = ShardRecord(n_bytes=len(data), sha256=sha256(data))

    def finish(
        self,
        ids: Sequence[str],
        where: Callable[[int], str],
        targets: Mapping[str, bytes],
        others: Mapping[str, bytes] | None = None,
    ) -> str:
        """Write the tables and the manifest; returns the store's digest.

        Args:
            ids: sample ids by sample index.
            where: where a sample came from, by sample index.
            targets: Parquet bytes by target name.
            others: bytes of further small files, by their path under the store.

        Raises:
            IncompleteStoreError: a block is missing.
        """
        write_rows(self.store / SAMPLES, SAMPLES_SCHEMA, self._samples(ids, where))
        write_rows(self.store / REJECTED, REJECTED_SCHEMA, self._rejected(ids, where))
        beside = {**{targets_name(name): data for name, data in targets.items()}, **(others or {})}
        for name, data in beside.items():
            write_file(self.store / name, [data])
        escapes = self._write_escape_metadata()
        fault_point("index-written")
        return write_manifest(self.store, self._entries([*self._statics, *escapes, *beside]))

    def _write_escape_metadata(self) -> Iterable[str]:
        coded = [spec for spec in self.specs if spec.kept_as.is_coded]
        longest = dict.fromkeys((spec.name for spec in coded), 0)
        for line in self._lines() if coded else ():
            for spec in coded:
                longest[spec.name] = max(longest[spec.name], longest_list(line.shards, spec))
        files = escape_files(coded, self.plan.n_blocks, longest) if coded else {}
        for name, data in files.items():
            write_file(self.store / name, [data])
        return files

    def _lines(self) -> Iterator[JournalLine]:
        """Every block's line, one at a time: together they would grow with the dataset."""
        for block in range(self.plan.n_blocks):
            line = read_line(self.store, block)
            if line is None:
                raise IncompleteStoreError(f"{self.store}: block {block} of {self.plan.n_blocks} is not there yet")
            yield line

    def _samples(self, ids: Sequence[str], where: Callable[[int], str]) -> Iterable[tuple[Any, ...]]:
        for line in self._lines():
            for row in self.plan.block(line.block):
                digest = line.source_sha256.get(row.number)
                if digest is not None:
                    yield (row.number, ids[row.sample], row.view, row.split, where(row.sample), digest)

    def _rejected(self, ids: Sequence[str], where: Callable[[int], str]) -> Iterable[tuple[Any, ...]]:
        for line in self._lines():
            reasons = {rejection.row: rejection for rejection in line.rejected}
            for row in self.plan.block(line.block):
                if rejection := reasons.get(row.number):
                    where_from = where(row.sample)
                    yield (
                        row.number,
                        ids[row.sample],
                        row.view,
                        row.split,
                        where_from,
                        rejection.reason,
                        rejection.tap,
                    )

    def _entries(self, small: Iterable[str]) -> Iterable[Entry]:
        taps_of = {spec.name: spec.taps for spec in self.specs}
        for line in self._lines():
            for key, shard in line.shards.items():
                name = f"{FEATURES}/{key}"
                yield Entry(sha256=shard.sha256, n_bytes=shard.n_bytes, name=name)
                if len(shard.tap_sha256) > 1:
                    yield from _tap_entries(name, taps_of[key.rpartition("/c/")[0]], shard)
            yield file_entry(self.store, journal_name(line.block))
        for name in (RECIPE, SAMPLES, REJECTED, *small):
            yield file_entry(self.store, name)


def _tap_entries(name: str, taps: Sequence[int], shard: ShardRecord) -> Iterator[Entry]:
    for tap, n_bytes, digest in zip(taps, shard.tap_bytes, shard.tap_sha256, strict=True):
        yield Entry(sha256=digest, n_bytes=n_bytes, name=f"{name}#{tap}")


def has_other_targets(store: Path, name: str, data: bytes) -> bool:
    """Whether the targets of a complete store are not those of a table, or not those that its manifest says."""
    known = read_manifest(store).find(targets_name(name))
    path = store / targets_name(name)
    intact = known is not None and path.exists() and file_entry(store, known.name) == known
    return not intact or not same_targets(path, data)


def update_targets(store: Path, name: str, data: bytes) -> None:
    """Replace the targets of a complete store without touching a feature; the caller holds its lock."""
    update_file(store, targets_name(name), data)


def holds_file(store: Path, file: str, data: bytes) -> bool:
    """Whether a complete store has a file of these bytes, on disk and in its manifest."""
    known = read_manifest(store).find(file)
    same = known is not None and known.sha256 == sha256(data)
    return same and (store / file).exists() and file_entry(store, file) == known


def update_file(store: Path, file: str, data: bytes) -> None:
    """Add or replace a small file of a complete store; the caller holds its lock.

    It is written before the manifest that names it; a death between the two is mended by the same call.
    """
    entries = read_manifest(store).entries()
    write_file(store / file, [data])
    write_manifest(store, {**entries, file: file_entry(store, file)}.values())


def is_complete(store: Path) -> bool:
    """Whether a store has its manifest."""
    return (store / MANIFEST).exists()
