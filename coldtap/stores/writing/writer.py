"""Writing a store: recipe first, then whole blocks, then the tables, and the manifest last.

One writer owns one whole block and writes each of its shards once. The order of renames is the order of
promises: a shard, then its block's journal line, then the manifest. A death between any two of them costs at
most the blocks in flight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import batched
from typing import Any, Self

import numpy as np

from coldtap.errors import IncompleteStoreError
from coldtap.stores.format import manifest
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.canonical import readable_json, sha256
from coldtap.stores.format.chunk_digests import DIGESTS, digests_name
from coldtap.stores.format.codes import Escapes
from coldtap.stores.format.compensation import COMPENSATION
from coldtap.stores.format.escape_segments import ESCAPES, escape_bytes, escape_digests, escapes_folder, escapes_name
from coldtap.stores.format.journal import JOURNAL, JournalLine, Rejection, WrittenFile, journal_name
from coldtap.stores.format.manifest import FEATURES, MANIFEST, Entry
from coldtap.stores.format.metadata import static_files
from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.shards import SealedShard
from coldtap.stores.format.tables import REJECTED, REJECTED_SCHEMA, SAMPLES, SAMPLES_SCHEMA
from coldtap.stores.format.targets import TARGETS, targets_name
from coldtap.stores.format.tiers import Numbers
from coldtap.stores.reading.journal_lines import read_line
from coldtap.stores.reading.manifest_files import file_entry
from coldtap.stores.reading.recipe_file import RECIPE
from coldtap.stores.reading.stored_numbers import ROOT, read_feature, read_norm, stored_numbers
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.faults import fault_point
from coldtap.stores.writing.block import ArrayBuffer, BlockBuffers
from coldtap.stores.writing.records import write_line, write_manifest, write_part, write_rows

# Only there do dead jobs of coldtap leave something; elsewhere others may use the same ending.
SWEPT = (
    RECIPE,
    SAMPLES,
    REJECTED,
    MANIFEST,
    manifest.MANIFEST_PARTS,
    FEATURES,
    DIGESTS,
    ESCAPES,
    JOURNAL,
    TARGETS,
    COMPENSATION,
)


class StoreWriter:
    """Writes the blocks and tables of one store that was begun; the job's first process holds its lock.

    Attributes:
        storage: where it lies.
        recipe: what was asked.
        specs: its arrays.
        plan: its rows.
        numbers: how the values of each array are kept, for good.
        norm: the backbone's final norm.
    """

    def __init__(
        self,
        storage: Storage,
        recipe: Recipe,
        specs: Sequence[ArraySpec],
        plan: RowPlan,
        numbers: Mapping[str, Numbers],
        norm: FinalNorm | None,
    ) -> None:
        """Hold what `begin` or `join` found."""
        self.storage, self.recipe, self.specs, self.plan = storage, recipe, tuple(specs), plan
        self.numbers, self.norm = numbers, norm

    @classmethod
    def begin(
        cls,
        place: Place,
        recipe: Recipe,
        specs: Sequence[ArraySpec],
        plan: RowPlan,
        *,
        recorded: Mapping[str, Any],
        numbers: Mapping[str, Numbers],
        norm: FinalNorm | None,
    ) -> Self:
        """Write the recipe and the arrays' metadata where they are not there yet; sweep what a dead job left.

        The caller holds the store's lock.

        Args:
            place: of the store.
            recipe: what was asked.
            specs: its arrays.
            plan: its rows.
            recorded: what goes beside the recipe.
            numbers: how the values of each array are kept, unless an earlier call has fixed it.
            norm: the backbone's final norm.

        Raises:
            MachineError: the disk is full, read-only or refuses.
        """
        storage = storage_at(place)
        for swept in SWEPT:
            storage.sweep(swept)
        if storage.stat(RECIPE) is None:
            storage.put(RECIPE, [readable_json({**recipe.to_dict(), "recorded": dict(recorded)})])
        fault_point("recipe-written")
        # What lies there from an earlier call is used for good; the root, written last, says that all of it lies there.
        begun = stored_numbers(storage, specs)
        writer = cls(storage, recipe, specs, plan, begun or numbers, norm)
        for name in sorted(writer._statics, key=ROOT.__eq__) if begun is None else ():
            storage.put(name, [writer._statics[name]])
            fault_point("array-created")
        fault_point("arrays-created")
        return writer

    @classmethod
    def join(cls, storage: Storage, recipe: Recipe, specs: Sequence[ArraySpec], plan: RowPlan) -> Self:
        """Write blocks of a store that another process has begun.

        Raises:
            IncompleteStoreError: it has not.
        """
        numbers = stored_numbers(storage, specs)
        if numbers is None:
            raise IncompleteStoreError(f"{storage}: the metadata of its arrays is gone; run the same command again")
        norm = read_norm(read_feature(storage), storage.describe(FEATURES))
        return cls(storage, recipe, specs, plan, numbers, norm)

    @cached_property
    def _statics(self) -> dict[str, bytes]:
        """The files that are there before the first block, by name."""
        return static_files(self.recipe, self.specs, self.plan.n_rows, self.numbers, self.norm)

    def new_buffers(self) -> BlockBuffers:
        """Return a buffer an array, for the rows of one block."""
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
        files: dict[str, WrittenFile] = {}
        for spec in self.specs:
            # Taken also where no row is present: the buffer goes on to another block.
            escapes = buffers[spec.name].take_escapes(block, present)
            if present.any():
                self._place_shard(spec, block, buffers[spec.name].shard.seal(present), files)
            if spec.kept_as.is_coded:
                self._place_escapes(spec, block, escapes, files)
        fault_point("block-renamed")
        line = JournalLine(
            block=block,
            files=files,
            rejected=tuple(rejected),
            source_sha256=dict(source_sha256),
            ranges=ranges,
            environment=dict(environment),
        )
        write_line(self.storage, line)
        fault_point("journal-written")
        return line

    def _place_shard(self, spec: ArraySpec, block: int, sealed: SealedShard, files: dict[str, WrittenFile]) -> None:
        def pieces() -> Iterable[memoryview]:
            yield from sealed.pieces
            fault_point("shard-temporary")

        name = f"{FEATURES}/{spec.shard_key(block)}"
        self.storage.put(name, pieces())
        fault_point("shard-renamed")
        files[name] = WrittenFile(n_bytes=sealed.whole.n_bytes, sha256=sealed.whole.sha256)
        self._place(digests_name(spec.name, block), sealed.digests, files)
        fault_point("digests-renamed")

    def _place_escapes(self, spec: ArraySpec, block: int, escapes: Escapes, files: dict[str, WrittenFile]) -> None:
        name, list_name = escapes_name(spec.name, block), digests_name(escapes_folder(spec.name), block)
        if not len(escapes.value):
            # Some may lie there from a block that died, made elsewhere (`allow_mixed`).
            for stale in (name, list_name):
                if self.storage.stat(stale) is not None:
                    self.storage.delete(stale)
            return
        data = escape_bytes(spec, block, escapes)
        self._place(name, data, files)
        fault_point("escapes-renamed")
        self._place(list_name, escape_digests(data, spec, where=name), files)

    def _place(self, name: str, data: bytes, files: dict[str, WrittenFile]) -> None:
        self.storage.put(name, [data])
        files[name] = WrittenFile(n_bytes=len(data), sha256=sha256(data))

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
        write_rows(self.storage, SAMPLES, SAMPLES_SCHEMA, self._samples(ids, where))
        write_rows(self.storage, REJECTED, REJECTED_SCHEMA, self._rejected(ids, where))
        beside = {**{targets_name(name): data for name, data in targets.items()}, **(others or {})}
        for name, data in beside.items():
            self.storage.put(name, [data])
        fault_point("index-written")
        parts = self._write_parts()
        small = (file_entry(self.storage, name) for name in (RECIPE, SAMPLES, REJECTED, *self._statics, *beside))
        return write_manifest(self.storage, [*parts, *small])

    def _write_parts(self) -> Sequence[Entry]:
        """Write the manifest's parts, and leave none of an earlier call."""
        parts = [
            write_part(self.storage, self._entries(blocks))
            for blocks in batched(range(self.plan.n_blocks), manifest.BLOCKS_A_PART)
        ]
        for name in {*self.storage.list(manifest.MANIFEST_PARTS)} - {part.name for part in parts}:
            self.storage.delete(name)
        return parts

    def _lines(self, blocks: Iterable[int] | None = None) -> Iterator[JournalLine]:
        """Lines of blocks, or of all, one at a time: together they would grow with the dataset."""
        for block in range(self.plan.n_blocks) if blocks is None else blocks:
            line = read_line(self.storage, block)
            if line is None:
                raise IncompleteStoreError(f"{self.storage}: block {block} of {self.plan.n_blocks} is not there yet")
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

    def _entries(self, blocks: Iterable[int]) -> Iterable[Entry]:
        """What blocks wrote."""
        for line in self._lines(blocks):
            for name, file in line.files.items():
                yield Entry(sha256=file.sha256, n_bytes=file.n_bytes, name=name)
            yield file_entry(self.storage, journal_name(line.block))
