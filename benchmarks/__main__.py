"""`python -m benchmarks [extraction] [training] [memory] [--quick] [--json FILE]`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, machine_line

WIDTH = 140
type Records = list[dict[str, Any]]


def extraction_table(records: Records) -> Table:
    table = _table(
        "Extraction against a bare loop of the same backbone",
        ("backbone", "decoding", "bare loop", "bare\nimages/s", "coldtap\nimages/s", "ratio", "least to\ngreatest"),
        ("ratio of\nCPU time", "goal", "MB/s\nwritten", "MB/s of a\nplain write"),
    )
    for record in records:
        loop = record["bare_loop"]
        table.add_row(
            record["case"],
            record["decoding"],
            f"batch {loop['batch_size']}, {loop['n_threads']} threads, {loop['waiting'].lower()}",
            f"{record['bare_images_per_s']:.1f}",
            f"{record['images_per_s']:.1f}",
            f"{record['ratio']:.2f}",
            f"{record['ratio_least']:.2f} – {record['ratio_greatest']:.2f}",
            f"{record['cpu_ratio']:.2f}",
            f"{record['goal']:.2f}",
            f"{record['written_mb_per_s']:.0f}",
            f"{record['plain_write_mb_per_s']:.0f}",
        )
    return table


def training_table(records: Records) -> Table:
    table = _table(
        "Training an adaptor on the reference backbone",
        ("adaptor", "features from", "seconds\nan epoch", "memory above\nthe imports, MB", "peak, MB"),
        ("times as fast as with\nthe backbone", "share of\nits memory"),
    )
    for record in records:
        table.add_row(
            record["adaptor"],
            record["way"],
            f"{record['epoch_s']:.3f}",
            f"{record['memory_bytes'] / 1e6:.0f}",
            f"{record['peak_bytes'] / 1e6:.0f}",
            f"{record['time_ratio']:.2f}",
            f"{1 / record['memory_ratio']:.2f}",
        )
    return table


def memory_table(records: Records) -> Table:
    table = _table("Peak memory of extraction", ("images", "peak, MB", "against the first"), ())
    for record in records:
        table.add_row(f"{record['n_images']:,}", f"{record['peak_bytes'] / 1e6:.0f}", f"{record['against_first']:.3f}")
    return table


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(left + right):
        table.add_column(column, justify="left" if position < 2 else "right")
    return table


def _benchmarks() -> dict[str, tuple[Callable[..., Records], Callable[[Records], Table]]]:
    # Imported late: what is measured runs in processes of its own, which import this module again.
    from benchmarks.extraction import measure_extraction
    from benchmarks.memory import measure_memory
    from benchmarks.training import measure_training

    return {
        "extraction": (measure_extraction, extraction_table),
        "training": (measure_training, training_table),
        "memory": (measure_memory, memory_table),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="extraction, training, memory (50,000 images); default: the first two")
    parser.add_argument("--quick", action="store_true", help="only see that they run: the numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records too")
    asked = parser.parse_args(arguments)
    known = _benchmarks()
    names = asked.names or ["extraction", "training"]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown benchmark {unknown[0]!r}; known are {', '.join(known)}")
    machine, console, results = describe_machine(), Console(width=WIDTH, highlight=False), {}
    print(machine_line(machine), flush=True)
    for name in names:
        measure, table = known[name]
        results[name] = measure(quick=asked.quick)
        console.print(table(results[name]))
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
