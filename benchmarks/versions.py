"""Another commit's coldtap against this checkout's, in turns: epochs of reading, and extraction.

    python -m benchmarks.versions 3c720fd                      # reading and extraction
    python -m benchmarks.versions 3c720fd --only reading --rounds 15 --json versions.json

The other commit is checked out beside a link to the data, and each version runs its own `benchmarks/reading.py` and
`benchmarks/extraction.py` in a process of its own, on files that it has made itself. They take turns within a round,
and who is first changes with every round; a ratio is taken within a round. A ratio below 1 means that this checkout is
slower.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, machine_line

ROOT = Path(__file__).parents[1]
SAMPLES = {"reference": 4096, "ViT-B": 512}

# Runs in each version: answers a line of JSON with a line of JSON.
CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path
from benchmarks import extraction, reading
from benchmarks.peers import COMPACT, FAST, FLOAT16

def make(folder, geometry, n_samples):
    Path(folder).mkdir()
    maker = {"reference": reading.make_reference, "ViT-B": reading.make_vit_b}[geometry]
    maker(Path(folder) / "float32", n_samples)
    reading.convert_all(Path(folder))

NAMES = {"float16": FLOAT16, "fast": FAST, "compact": COMPACT}

def epoch(tier, folder, n_samples, seed):
    return reading.epoch_seconds(NAMES[tier], Path(folder), n_samples, seed)

def first_epoch(tier, folder, n_samples, seed):
    return reading.first_epoch_seconds(NAMES[tier], Path(folder), n_samples, seed)

def extract(tier, n_images):
    return 1 / extraction.extraction_speed(replace(extraction.REFERENCE, n_images=n_images), False, tier).images_per_s

answers = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    verb, *arguments = json.loads(line)
    print(json.dumps(globals()[verb](*arguments)), file=answers, flush=True)
"""


class Version:
    """A process that runs one version's own benchmarks."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=root,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, verb: str, *arguments: Any) -> Any:
        """Return what a function of `CHILD` returns.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([verb, *arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{verb} {arguments}: the process of a version ended; run its benchmarks by hand")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def versions(rev: str) -> Iterator[dict[str, Version]]:
    """The processes of two versions, `before` and `after`."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        root = Path(place) / "main"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", root, rev], check=True)
        stack.callback(subprocess.run, ["git", "-C", ROOT, "worktree", "remove", "--force", root], check=True)
        (Path(place) / "shared").symlink_to(ROOT.parent / "shared")
        running = {"before": Version(root), "after": Version(ROOT)}
        for version in running.values():
            stack.callback(version.close)
        yield running


def measure_reading(running: dict[str, Version], folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a record per geometry, tier and kind of epoch."""
    for geometry, n_samples in SAMPLES.items():
        places = {name: str(folder / f"{geometry} {name}") for name in running}
        for name, version in running.items():
            version.ask("make", places[name], geometry, n_samples)
        for tier in ("float16", "fast", "compact"):
            for kind in ("epoch", "first_epoch"):

                def seconds(name: str, turn: int) -> float:
                    return float(running[name].ask(kind, tier, places[name], n_samples, turn))  # noqa: B023

                yield {"measured": kind, "geometry": geometry, "tier": tier, **in_turns(seconds, rounds)}


def measure_extraction(running: dict[str, Version], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a record per tier: pixels in memory, the reference backbone, a store on disk."""
    for tier in ("float16", "int8"):

        def seconds(name: str, turn: int) -> float:
            return float(running[name].ask("extract", tier, 1024))  # noqa: B023

        yield {"measured": "extraction", "geometry": "reference", "tier": tier, **in_turns(seconds, rounds)}


def in_turns(seconds: Any, rounds: int) -> dict[str, Any]:
    """Measure both versions a round, after an unmeasured one; ratios of before's seconds to after's."""
    names = ["before", "after"]
    measured: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        order: Sequence[str] = names if turn % 2 else names[::-1]
        measured.append({name: seconds(name, turn) for name in order})
    ratios = sorted(pair["before"] / pair["after"] for pair in measured[1:])
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "seconds": measured[1:],
    }


def main() -> None:
    """Measure, print a table, and keep the raw values where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev", help="the commit to compare with")
    parser.add_argument("--only", choices=["reading", "extraction"], help="measure this alone")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="raw seconds of every round")
    asked = parser.parse_args()
    machine = describe_machine()
    records = []
    with versions(asked.rev) as running, tempfile.TemporaryDirectory() as folder:
        if asked.only != "extraction":
            records += measure_reading(running, Path(folder), asked.rounds)
        if asked.only != "reading":
            records += measure_extraction(running, max(3, asked.rounds // 3))
    table = Table("measured", "geometry", "tier", "before ÷ after", "middle half of the rounds")
    for record in records:
        low, high = record["quartiles"]
        names = (record["measured"].replace("_", " "), record["geometry"], record["tier"])
        table.add_row(*names, f"{record['ratio']:.3f}", f"{low:.3f} … {high:.3f}")
    Console().print(table, machine_line(machine))
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine, "before": asked.rev, "records": records}, indent=1))


if __name__ == "__main__":
    main()
