"""Reading the journal, and from it which blocks are there."""

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.journal import JournalLine, journal_name, parse_line
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage


def read_line(place: Place, block: int) -> JournalLine | None:
    """Return a block's line, or None where the block is not finished.

    Raises:
        CorruptStoreError: the file is not a journal line of this block.
    """
    storage, name = storage_at(place), journal_name(block)
    try:
        data = storage.get(name, limit=None)
    except FileNotFoundError:
        return None
    return parse_line(data, block, where=storage.describe(name))


def finished_blocks(storage: Storage, n_blocks: int) -> list[int]:
    """Return the blocks that have a journal line and every file of it, of the size that the line says."""
    return [block for block in range(n_blocks) if _is_finished(storage, block)]


def _is_finished(storage: Storage, block: int) -> bool:
    line = read_line(storage, block)
    if line is None:
        return False
    found = ((storage.stat(name), file) for name, file in line.files.items())
    try:
        return all(there is not None and there.n_bytes == file.n_bytes for there, file in found)
    except CorruptStoreError:  # a link, a pipe, or no name of a file at all
        return False
