"""What an earlier call left of a store, looked at before it is gone on with: no block is finished by its size."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunk_digests import digests_name
from coldtap.stores.format.escape_segments import escapes_folder, escapes_name
from coldtap.stores.format.journal import JournalLine
from coldtap.stores.format.manifest import FEATURES, Entry
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.reading.journal_lines import finished_blocks, read_line
from coldtap.stores.reading.manifest_files import file_entry
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.threads import usable_cores
from coldtap.stores.writing.reporting import Reporter
from coldtap.text import a_few

MAX_THREADS = 4  # that hash; beyond, they wait for the disk


def intact_blocks(storage: Storage, specs: Sequence[ArraySpec], plan: RowPlan, reporter: Reporter) -> list[int]:
    """Return the finished blocks of a store, every file of theirs held against its digest at the disk's speed.

    Args:
        storage: where the store lies.
        specs: its arrays.
        plan: its rows.
        reporter: told of blocks that have to be made again, and why.

    Raises:
        CorruptStoreError: a journal line cannot be read.
    """
    finished = finished_blocks(storage, plan.n_blocks)
    if not finished:
        return []
    reporter.note(f"checking {len(finished)} finished blocks of {storage}")
    with ThreadPoolExecutor(min(usable_cores(), MAX_THREADS)) as pool:
        problems = dict(zip(finished, pool.map(partial(_problem, storage, specs, plan), finished), strict=True))
    broken = [f"block {block}: {what}" for block, what in problems.items() if what is not None]
    if broken:
        reporter.note(f"{len(broken)} blocks are made again, for they are not what their journal says: {a_few(broken)}")
    return [block for block, what in problems.items() if what is None]


def _problem(storage: Storage, specs: Sequence[ArraySpec], plan: RowPlan, block: int) -> str | None:
    """Why a block does not count as finished, or None."""
    line = read_line(storage, block)
    if line is None:
        return "its line is gone"
    said = [*line.source_sha256, *(rejection.row for rejection in line.rejected)]
    if sorted(said) != [row.number for row in plan.block(block)]:
        return "its line is of other rows than the plan's"
    if what := _file_problem(line, specs):
        return what
    for name, file in line.files.items():
        if file_entry(storage, name) != Entry(sha256=file.sha256, n_bytes=file.n_bytes, name=name):
            return f"{name} has another digest"
    return None


def _file_problem(line: JournalLine, specs: Sequence[ArraySpec]) -> str | None:
    """What a line lists that no such block has, or lacks."""
    needed = {name for spec in specs for name in _shard_names(spec, line.block)} if line.source_sha256 else set()
    pairs = [{*_escape_names(spec, line.block)} for spec in specs if spec.kept_as.is_coded]
    listed = set(line.files)
    if lacking := needed - listed:
        return f"its line lacks {min(lacking)}"
    if unknown := listed - needed - set().union(*pairs):
        return f"its line lists {min(unknown)}"
    if any(len(pair & listed) == 1 for pair in pairs):
        return "its line lists escapes or their digests alone"
    return None


def _shard_names(spec: ArraySpec, block: int) -> Iterator[str]:
    yield f"{FEATURES}/{spec.shard_key(block)}"
    yield digests_name(spec.name, block)


def _escape_names(spec: ArraySpec, block: int) -> Iterator[str]:
    yield escapes_name(spec.name, block)
    yield digests_name(escapes_folder(spec.name), block)
