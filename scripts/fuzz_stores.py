"""Damage stores in every way that a disk, a copy or a stranger can, and read them: never a wrong number, unsaid.

    python -m scripts.fuzz_stores                          # 2,000 damaged reads, half a minute
    python -m scripts.fuzz_stores --reads 50000 --seed 1   # the figure of docs/log.md

Small stores of every tier and layout are made in memory, and twins of equal recipe with other numbers. Then, again
and again, one is damaged, opened, and rows of it are read, from memory and for every tenth from a disk. A read may end
in an error of coldtap or in the numbers that were there before; anything else is a fault, and its number is printed.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.features import write_store
from coldtap.errors import ColdtapError
from coldtap.stores import open_store
from coldtap.stores.convert.convert import convert_store
from coldtap.stores.format import arrays
from coldtap.stores.format.arrays import plan_arrays
from coldtap.stores.format.chunks import CRC_BYTES, checksum
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.shards import ENTRY_BYTES
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.local import LocalStorage
from coldtap.stores.storage.memory import MemoryStorage

GEOMETRY = Geometry(grid=(3, 3), prefix_tokens=1, channels=16)
TAPS, N_SAMPLES, BLOCK_ROWS = range(3), 44, 16
KINDS = {
    "float32": {"tier": "float32"},
    "float16": {"tier": "float16"},
    "bfloat16": {"tier": "bfloat16"},
    "int8 fast": {"tier": "int8", "layout": "fast", "snr": 40},
    "int8 compact": {"tier": "int8", "layout": "compact", "snr": 40},
}
READS_A_DAMAGE = 4
SLOW_S = 10

type Files = dict[str, bytes]
type Damage = Callable[[Files, Files, np.random.Generator], Files]


def make_stores(seed: int) -> dict[str, Files]:
    """Return the files of a store of each kind, all from the same features."""
    arrays.MAX_BLOCK_ROWS = BLOCK_ROWS  # converted stores then have several blocks too
    made: dict[str, Files] = {}
    (spec,) = plan_arrays(dict.fromkeys(TAPS, GEOMETRY), {"layers": TAPS}, "float32")
    with tempfile.TemporaryDirectory() as folder:

        def values(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            noise = np.stack(
                [
                    np.random.default_rng((seed, int(sample))).standard_normal((len(TAPS), *spec.row_shape[-2:]))
                    for sample in samples
                ]
            )
            return (noise**3).astype(np.float32)  # long tails, so that codes have escapes

        write_store(Path(folder) / "float32", replace(spec, block_rows=BLOCK_ROWS), N_SAMPLES, values)
        made["float32"] = contents(LocalStorage(Path(folder) / "float32"))
        for kind, options in KINDS.items():
            if kind != "float32":
                target = MemoryStorage()
                convert_store(Path(folder) / "float32", target, **options)  # type: ignore[arg-type]
                made[kind] = contents(target)
    return made


def contents(storage: Storage) -> Files:
    """Return every file with its bytes."""
    return {key: storage.get(key, limit=None) for key in storage.list()}


def read(storage: Storage, rows: np.ndarray[Any, Any], taps: list[int]) -> list[bytes]:
    """Return floats and, of codes, stored numbers of rows of the one array."""
    store = open_store(storage, threads=1)
    (array,) = store.arrays.values()
    floats = np.empty((len(rows), len(taps), *array.row_shape[-2:]), np.float32)
    array.read_into(floats, rows, taps)
    return [floats.tobytes()]


# Damages. Each returns the files that it changes; `twin` is a store of equal recipe with other numbers.


def flip(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Flip a bit."""
    name, data = _file(files, rng)
    at = int(rng.integers(len(data)))
    data[at] ^= 1 << int(rng.integers(8))
    return {name: bytes(data)}


def cut(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Cut a file short."""
    name, data = _file(files, rng)
    return {name: bytes(data[: int(rng.integers(len(data)))])}


def zero(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Zero a run of bytes, as a lost page is."""
    name, data = _file(files, rng)
    start = int(rng.integers(len(data)))
    end = min(len(data), start + int(rng.integers(1, 4096)))
    data[start:end] = bytes(end - start)
    return {name: bytes(data)}


def append(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Append bytes."""
    name, data = _file(files, rng)
    return {name: bytes(data) + rng.bytes(int(rng.integers(1, 100)))}


def swap_files(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Swap two files, of equal kind where there are."""
    one, _ = _file(files, rng)
    alike = [name for name in files if name != one and name.split("/")[0] == one.split("/")[0]] or [*files]
    other = alike[int(rng.integers(len(alike)))]
    return {one: files[other], other: files[one]}


def swap_shards(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Swap the shards of two blocks."""
    one, other = rng.choice(_shards(files), 2, replace=False)
    return {str(one): files[str(other)], str(other): files[str(one)]}


def foreign_shard(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Put the shard of a store of equal recipe in the place of one."""
    name = str(rng.choice(_shards(files)))
    return {name: twin[name]}


def foreign_block(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Put everything that a store of equal recipe has of a block in the place of what is there."""
    block = int(rng.integers(len(_shards(files))))
    names = [name for name in files if f"/c/{block}/" in name or name.endswith((f"/{block}", f"{block:08d}.json"))]
    return {name: twin[name] for name in names if name in twin}


def swap_entries(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Swap two entries of a shard's index, its checksum made right."""
    name = str(rng.choice(_shards(files)))
    data = bytearray(files[name])
    entries, start = _entries(data)
    one, other = rng.choice(np.flatnonzero(entries[:, 0] != np.uint64(2**64 - 1)), 2, replace=False)
    entries[[one, other]] = entries[[other, one]]
    return {name: _with_entries(data, entries, start)}


def copy_entry(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Point an entry of a shard's index at the chunk of another, or at nothing, its checksum made right."""
    name = str(rng.choice(_shards(files)))
    data = bytearray(files[name])
    entries, start = _entries(data)
    one, other = rng.choice(len(entries), 2, replace=False)
    entries[one] = entries[other] if rng.random() < 0.8 else np.uint64(2**64 - 1)
    return {name: _with_entries(data, entries, start)}


def swap_chunks(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Swap the bytes of two chunks of equal length, the index left as it is."""
    name = str(rng.choice(_shards(files)))
    data = bytearray(files[name])
    entries, _ = _entries(data)
    there = entries[entries[:, 0] != np.uint64(2**64 - 1)].astype(np.int64)
    one = there[int(rng.integers(len(there)))]
    alike = there[there[:, 1] == one[1]]
    other = alike[int(rng.integers(len(alike)))]
    a, b = (slice(int(start), int(start + length)) for start, length in (one, other))
    data[a], data[b] = data[b], data[a]
    return {name: bytes(data)}


def foreign_chunk(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Put a whole chunk of the twin's shard, checksum and all, where one of equal length lies."""
    name = str(rng.choice(_shards(files)))
    data, theirs = bytearray(files[name]), bytearray(twin[name])
    (ours, _), (others, _) = _entries(data), _entries(theirs)
    row = int(rng.integers(len(ours)))
    (start, length), (start_2, length_2) = ours[row].astype(np.int64), others[row].astype(np.int64)
    if start < 0 or start_2 < 0 or length != length_2:
        return flip(files, twin, rng)
    data[start : start + length] = theirs[start_2 : start_2 + length]
    return {name: bytes(data)}


def remove(files: Files, twin: Files, rng: np.random.Generator) -> Files:
    """Remove a file (told by None's stand-in, an empty name's absence)."""
    name, _ = _file(files, rng)
    return {name: b"\0removed"}


DAMAGES: tuple[Damage, ...] = (
    flip,
    cut,
    zero,
    append,
    swap_files,
    swap_shards,
    foreign_shard,
    foreign_block,
    swap_entries,
    copy_entry,
    swap_chunks,
    foreign_chunk,
    remove,
)


def _file(files: Files, rng: np.random.Generator) -> tuple[str, bytearray]:
    """A file that is not empty; half of the time a shard."""
    names = _shards(files) if rng.random() < 0.5 else [name for name, data in files.items() if data]
    name = str(rng.choice(names))
    return name, bytearray(files[name])


def _shards(files: Mapping[str, bytes]) -> list[str]:
    return [name for name in files if "/layers/" in name and "/c/" in name and name.startswith("features.zarr/layers")]


def _entries(data: bytearray) -> tuple[np.ndarray[Any, Any], int]:
    """The index of a shard, (chunk, offset and length), and where it begins."""
    n_bytes = BLOCK_ROWS * len(TAPS) * ENTRY_BYTES
    start = len(data) - n_bytes - CRC_BYTES
    return np.frombuffer(bytes(data[start:-CRC_BYTES]), "<u8").reshape(-1, 2).copy(), start


def _with_entries(data: bytearray, entries: np.ndarray[Any, Any], start: int) -> bytes:
    index = entries.tobytes()
    return bytes(data[:start]) + index + checksum(index)


def outcome(storage: Storage, rows: np.ndarray[Any, Any], taps: list[int], truth: list[bytes]) -> str:
    """Return how a read of a damaged store has ended."""
    began = time.monotonic()
    try:
        found = "right" if read(storage, rows, taps) == truth else "SILENTLY WRONG"
    except ColdtapError:
        found = "error"
    except Exception as error:
        found = f"CRASH {type(error).__name__}"
    return "SLOW" if time.monotonic() - began > SLOW_S else found


def fuzz(n_reads: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Return how often each damage ended how, and a line for each fault."""
    stores, twins = make_stores(seed), make_stores(seed + 1)
    counts: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    damages = -(-n_reads // READS_A_DAMAGE)
    with tempfile.TemporaryDirectory() as place:
        for number in track(range(damages), "damaged stores", console=Console(stderr=True)):
            rng = np.random.default_rng((seed, number))
            kind = [*KINDS][number % len(KINDS)]
            damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
            changed = damage(stores[kind], twins[kind], rng)
            if all(stores[kind].get(name) == data for name, data in changed.items()):
                continue
            sound = MemoryStorage()
            hurt: Storage = LocalStorage(Path(place) / str(number)) if number % 10 == 0 else MemoryStorage()
            for name, data in stores[kind].items():
                sound.put(name, [data])
                if changed.get(name) != b"\0removed":
                    hurt.put(name, [changed.get(name, data)])
            for _ in range(READS_A_DAMAGE):
                rows = rng.choice(N_SAMPLES, int(rng.integers(1, 20)), replace=False)
                taps = sorted(rng.choice(len(TAPS), int(rng.integers(1, len(TAPS) + 1)), replace=False).tolist())
                found = outcome(hurt, rows, taps, read(sound, rows, taps))
                counts[damage.__name__, found] += 1
                if found not in ("right", "error"):
                    faults.append(f"{kind}: {damage.__name__} of {', '.join(changed)}, number {number}: {found}")
    return counts, faults


def main() -> None:
    """Damage, read, print a table; exit code 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reads", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    counts, faults = fuzz(asked.reads, asked.seed)
    table = Table("damage", "reads", "refused", "right", "faults")
    for damage in DAMAGES:
        ended = {end: n for (name, end), n in counts.items() if name == damage.__name__}
        total, refused, right = sum(ended.values()), ended.get("error", 0), ended.get("right", 0)
        table.add_row(damage.__name__.replace("_", " "), *map(str, (total, refused, right, total - refused - right)))
    table.add_row("all", str(counts.total()), *[""] * 2, str(len(faults)))
    Console().print(table)
    print(*faults[:50], sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
