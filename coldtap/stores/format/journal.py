"""The journal: one small file a finished block, written after the block's shards.

A block without its line is not there, whatever files it left; resume does it again. Lines hold nothing that
differs between two runs of the same recipe in the same environment, so that a resumed run ends in the same bytes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.canonical import parse_json, readable_json
from coldtap.stores.format.fields import require_types
from coldtap.stores.format.manifest import FEATURES

JOURNAL = "journal"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file of a block."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A row that is not there, and why; `tap` names the first tap with a non-finite value."""

    row: int
    reason: str
    tap: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalLine:
    """What one finished block holds.

    `files` (shards, lists of digests, escapes) are by path under the store; `source_sha256` is by row number; `ranges`
    are the smallest and largest value of each tap of each array in this block; `environment` is where it ran.
    """

    block: int
    files: Mapping[str, WrittenFile]
    rejected: tuple[Rejection, ...]
    source_sha256: Mapping[int, str]
    ranges: Mapping[str, list[list[float]]]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the line as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "JournalLine":
        """Parse what `to_dict` gave; anything else is a TypeError, KeyError or ValueError."""
        fields = {**record}
        files = fields.pop("files") if "shards" not in fields else _files_of_format_1(fields.pop("shards"))
        line = cls(
            **{
                **fields,
                "files": {name: WrittenFile(**file) for name, file in files.items()},
                "rejected": tuple(Rejection(**rejection) for rejection in record["rejected"]),
                "source_sha256": {int(row): digest for row, digest in record["source_sha256"].items()},
            }
        )
        return require_types(line)


def _files_of_format_1(shards: Mapping[str, Any]) -> dict[str, Any]:
    """By path under `features.zarr`; of a shard, also bytes and SHA-256 of each tap's chunks."""
    return {
        f"{FEATURES}/{name}": {key: shard[key] for key in shard if key not in ("tap_bytes", "tap_sha256")}
        for name, shard in shards.items()
    }


def journal_name(block: int) -> str:
    """Path of a block's line under the store."""
    return f"{JOURNAL}/{block:08d}.json"


def line_bytes(line: JournalLine) -> bytes:
    """Return the bytes of a line's file."""
    return readable_json(line.to_dict())


def parse_line(data: bytes, block: int, *, where: str) -> JournalLine:
    """Return the line of a block from the bytes of its file.

    Raises:
        CorruptStoreError: they are not a journal line of this block; the message names the file as `where`.
    """
    try:
        line = JournalLine.from_dict(parse_json(data))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptStoreError(f"{where} is damaged ({error}): remove it, and the block is done again") from error
    if line.block != block:
        raise CorruptStoreError(f"{where} speaks of block {line.block}: remove it, and the block is done again")
    return line
