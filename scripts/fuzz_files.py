"""Change the small files of runs, trials, artefacts and stores, and read them: an error in a line, never a traceback.

    python -m scripts.fuzz_files                          # 1,000 changed files, some 20 s
    python -m scripts.fuzz_files --files 20000 --seed 1   # the figure of docs/log.md

A store with a compensation, a finished run, a checkpoint, a failed trial and a quantised backbone are made in memory;
then, again and again, one file of theirs is changed (a value of its JSON by one of another type or size, or its bytes)
and read by all that reads it. Beside them lie canaries outside their folders; memory is bounded by a limit on the
address space. A read may end in an error of coldtap or in success; anything else is a fault.
"""

import argparse
import copy
import json
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from coldtap.adaptors import evaluate_adaptor, load_adaptor, read_run, train_adaptor
from coldtap.adaptors.runs.predictions import read_predictions
from coldtap.adaptors.runs.record import Failure
from coldtap.adaptors.runs.run_folder import read_epochs, read_failure, write_failure
from coldtap.adaptors.training.checkpoint import read_checkpoint
from coldtap.errors import ColdtapError, InterruptedRunError
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.quantisation.quantize import quantize
from coldtap.stores import open_store
from coldtap.stores.reading.describe import describe_store
from coldtap.stores.reading.journal_lines import finished_blocks
from coldtap.stores.storage.local import LocalStorage
from coldtap.stores.verify.verify import verify_store
from tests.helpers.jobs import cache, in_memory
from tests.helpers.pictures import write_pictures

WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), 1e308, "", "x", "../../canary", "/etc/passwd",
    "a" * 10_000, "module:NAME", "hf-hub:a/b", [], [1], [[]], ["x"] * 1000, {}, {"a": 1}, {"": {"": []}},
)  # fmt: skip
MEMORY_BYTES = 3 << 30  # beyond what the process has at the start
CANARY = b"precious"


def make(folder: Path) -> None:
    """Make everything that is changed later."""
    store = folder / "store"
    cache(in_memory(train=24, val=8, test=8), store, tier="int8", layout="compact", snr=30)
    options: dict[str, Any] = {"epochs": 2, "device": "cpu", "batch_size": 8}
    train_adaptor(store, "linear", out=folder / "run", **options)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with suppress(InterruptedRunError):
        train_adaptor(store, "mist", out=folder / "begun", progress=stop, checkpoint_every_s=0, **options)
    info = read_run(folder / "run")
    assert info is not None
    write_failure(folder / "failed", Failure(settings=info.settings, reason="the loss is nan", seconds=1.0))
    write_pictures(folder / "images/train/a", *(f"{n}.png" for n in range(20)))
    quantize("coldtap/vit-reference", folder / "images", folder / "backbone/backbone.safetensors", compensate="none")


def readers(folder: Path) -> dict[str, Callable[[], object]]:
    """Return all that reads a file, by the folder that it lies in."""
    store, run = folder / "store", folder / "run"

    def read_store() -> None:
        finished_blocks(LocalStorage(store), 4)
        describe_store(store)
        opened = open_store(store, threads=1)
        rows = opened.rows("train")
        opened.targets(rows)
        opened.sample_ids(rows)
        for array in opened.arrays.values():
            array.read_into(np.empty((len(rows), *array.row_shape), np.float32), rows)

    def verify() -> None:
        verify_store(store, n_threads=1)

    def read_a_run() -> None:
        read_run(run)
        read_epochs(run)
        read_predictions(run)
        load_adaptor(run)
        evaluate_adaptor(run, store, device="cpu")

    def go_on() -> None:
        read_checkpoint(folder / "begun")

    return {
        "store": read_store,
        "store, verified": verify,
        "run": read_a_run,
        "begun": go_on,
        "failed": lambda: read_failure(folder / "failed"),
        "backbone": lambda: load_backbone(quantised=folder / "backbone/backbone.safetensors", device="cpu"),
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def changed_json(value: Any, rng: np.random.Generator) -> Any:
    """Return a value in which one place holds something else, or nothing."""
    value = copy.deepcopy(value)
    path = [*places(value)]
    where = path[int(rng.integers(len(path)))]
    wrong = WRONG[int(rng.integers(len(WRONG)))]
    if not where:
        return wrong
    part = value
    for key in where[:-1]:
        part = part[key]
    if rng.random() < 0.2:
        del part[where[-1]]
    else:
        part[where[-1]] = wrong
    return value


def changed(data: bytes, name: str, rng: np.random.Generator) -> bytes:
    """Return a file's bytes with something else in them; JSON stays JSON most of the time."""
    if rng.random() < 0.6:
        if name.endswith(".json"):
            return json.dumps(changed_json(json.loads(data), rng)).encode()
        if name.endswith(".safetensors"):
            n_bytes = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + n_bytes])
            said = header.get("__metadata__", {}).get("coldtap")
            if said and rng.random() < 0.8:
                header["__metadata__"]["coldtap"] = json.dumps(changed_json(json.loads(said), rng))
            else:
                header = changed_json(header, rng)
            new = json.dumps(header).encode()
            return len(new).to_bytes(8, "little") + new + data[8 + n_bytes :]
    kind = int(rng.integers(5))
    new = bytearray(data)
    if kind == 0 and new:
        for _ in range(int(rng.integers(1, 9))):
            new[int(rng.integers(len(new)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del new[int(rng.integers(len(new) + 1)) :]
    elif kind == 2 and new:
        start = int(rng.integers(len(new)))
        new[start : start + 64] = rng.bytes(64)
    elif kind == 3:
        new = bytearray(b"[" * 200_000)
    else:
        new = bytearray(rng.bytes(int(rng.integers(200))))
    return bytes(new)


def fuzz(n_files: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Return how often each kind of folder ended how, and a line per fault."""
    counts: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "inside"
        make(folder)
        canary = Path(place) / "canary"
        canary.write_bytes(CANARY)
        read = readers(folder)
        for reader in read.values():
            reader()  # imports, and what is cached, before the limit
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        files = {
            kind: sorted(path for path in (folder / kind.split(",")[0]).rglob("*") if path.is_file()) for kind in read
        }
        before = {*folder.rglob("*")}
        for number in track(range(n_files), "changed files", console=Console(stderr=True)):
            rng = np.random.default_rng((seed, number))
            kind = [*read][number % len(read)]
            path = files[kind][int(rng.integers(len(files[kind])))]
            data = path.read_bytes()
            path.write_bytes(changed(data, path.name, rng))
            try:
                read[kind]()
                found = "success"
            except ColdtapError as error:
                found = "error" if "\n" not in str(error).strip() or len(str(error)) < 2000 else "LONG"
            except BaseException as error:
                found = f"CRASH {type(error).__name__}: {str(error)[:100]}"
            finally:
                path.write_bytes(data)
            if canary.read_bytes() != CANARY or {*folder.rglob("*")} != before:
                found = "SOMETHING ELSE WAS WRITTEN"
            counts[kind, found if found in ("success", "error") else "fault"] += 1
            if found not in ("success", "error"):
                faults.append(f"{kind}: {path.relative_to(folder)}, number {number}: {found}")
    return counts, faults


def main() -> None:
    """Change, read, print a table; exit code 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    counts, faults = fuzz(asked.files, asked.seed)
    table = Table("what", "files", "refused", "read", "faults")
    for kind in dict.fromkeys(kind for kind, _ in counts):
        ended = [counts[kind, end] for end in ("error", "success", "fault")]
        table.add_row(kind, str(sum(ended)), *map(str, ended))
    table.add_row("all", str(counts.total()), "", "", str(len(faults)))
    Console().print(table)
    print(*faults[:50], sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
