"""`python -m benchmarks [NAME …] [--quick] [--json FILE]`: extraction, comparison, memory, reading, opening, trials,
integers or codecs."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from benchmarks.machine import describe_machine, machine_line

WIDTH = 140
type Records = list[dict[str, Any]]


def extraction_table(records: Records) -> Table:
    table = _table(
        "Extraction against a bare loop of the same backbone",
        (
            "backbone",
            "tier",
            "decoding",
            "bare loop",
            "bare\nimages/s",
            "coldtap\nimages/s",
            "ratio",
            "least to\ngreatest",
        ),
        ("ratio of\nCPU time", "goal", "MB/s\nwritten", "MB/s of a\nplain write"),
    )
    for record in records:
        loop = record["bare_loop"]
        table.add_row(
            record["case"],
            record["tier"],
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


def memory_table(records: Records) -> Table:
    table = _table("Peak memory of extraction", ("images", "peak, MB", "against the first"), ())
    for record in records:
        table.add_row(f"{record['n_images']:,}", f"{record['peak_bytes'] / 1e6:.0f}", f"{record['against_first']:.3f}")
    return table


def reading_tables(records: Records) -> Group:
    return Group(_speed_table(records), _reading_goals_table(records), _mist_table(records))


def _speed_table(records: Records) -> Table:
    table = _table(
        "Shuffled epochs in batches of 64 (np.memmap on float16 = 1)",
        ("workload", "contestant", "epoch", "samples/s", "ratio", "least to\ngreatest"),
        ("bytes a\nsample", "of raw\nfloat16"),
    )
    for record in records:
        if record["measured"] not in ("epoch", "first epoch", "evicted"):
            continue
        if not record["installed"]:
            table.add_row(record["workload"], record["contestant"], "not installed", *["–"] * 5)
            continue
        table.add_row(
            record["workload"],
            record["contestant"],
            _epoch_kind(record),
            f"{record['samples_per_s']:,.0f}",
            f"{record['ratio']:.2f}",
            f"{record['ratio_least']:.2f} – {record['ratio_greatest']:.2f}",
            f"{record['bytes_per_sample']:,.0f}",
            f"{record['disk_ratio']:.3f}",
        )
    return table


def _epoch_kind(record: dict[str, Any]) -> str:
    if record["measured"] == "evicted":
        return f"evicted ({record['left_in_cache']:.0%} left)"
    return {"epoch": "warm"}.get(record["measured"], record["measured"])


def _reading_goals_table(records: Records) -> Table:
    table = _table(
        "Goals of reading",
        ("workload", "contestant", "against", "epoch", "ratio"),
        ("least to\ngreatest", "goal", ""),
    )
    for record in records:
        if record["measured"] == "goal":
            table.add_row(
                record["workload"],
                record["contestant"],
                record["against"],
                {"epoch": "warm"}.get(record["of"], record["of"]),
                f"{record['ratio']:.2f}",
                f"{record['ratio_least']:.2f} – {record['ratio_greatest']:.2f}",
                f"≥ {record['goal']}",
                "reached" if record["ratio"] >= record["goal"] else "missed",
            )
    return table


def _mist_table(records: Records) -> Table:
    table = _table(
        "A MIST epoch from disk against the same epoch from memory",
        ("tier", "layout", "from disk, s", "from memory, s"),
        ("ratio", "least to\ngreatest", "goal", ""),
    )
    for record in records:
        if record["measured"] == "MIST":
            table.add_row(
                record["tier"],
                record["layout"],
                f"{record['epoch_s']:.3f}",
                f"{record['resident_epoch_s']:.3f}",
                f"{record['ratio']:.3f}",
                f"{record['ratio_least']:.3f} – {record['ratio_greatest']:.3f}",
                f"≤ {record['goal']}",
                "reached" if record["ratio"] <= record["goal"] else "missed",
            )
    return table


def opening_tables(records: Records) -> Group:
    return Group(_opening_table(records), _limit_table(records))


def _opening_table(records: Records) -> Table:
    table = _table(
        "Opening a store and drawing a first shuffled batch",
        ("by", "rows", "seconds", "goal"),
        ("memory above\nthe imports, MB", "goal", "of which seconds"),
    )
    for record in records:
        if record["measured"] == "opening":
            parts = {name.removesuffix("_s"): value for name, value in record.items() if name.endswith("_s")}
            laps = [f"{name} {value:.2f}" for name, value in parts.items() if name not in ("goal", "total")]
            table.add_row(
                record["way"],
                f"{record['n_rows']:,}",
                f"{record['total_s']:.2f}",
                f"≤ {record['goal_s']:.0f}",
                f"{record['memory_bytes'] / 1e6:.0f}",
                f"≤ {record['goal_bytes'] / 1e6:.0f}",
                ", ".join(laps),
            )
    return table


def _limit_table(records: Records) -> Table:
    table = _table(
        "An epoch under a limit of memory",
        ("rows read", "store, MB", "limit, MB", "memory taken, MB"),
        ("seconds",),
    )
    for record in records:
        if record["measured"] == "limit":
            sizes = (record[name] / 1e6 for name in ("store_bytes", "limit_bytes", "memory_bytes"))
            table.add_row(f"{record['n_read']:,}", *(f"{size:,.0f}" for size in sizes), f"{record['epoch_s']:.1f}")
    return table


def trials_table(records: Records) -> Table:
    table = _table(
        "16 trials that share batches against 16 solo runs: times as fast, median (least to greatest)",
        ("adaptor", "epochs"),
        ("whole calls", "their epochs", "(read once + 16 × compute) / epochs"),
    )
    for record in records:
        columns = (record[name] for name in ("calls", "of_epochs", "of_goal"))
        cells = (f"{median:.2f} ({least:.2f} – {most:.2f})" for median, least, most in columns)
        table.add_row(record["adaptor"], str(record["epochs"]), *cells)
    return table


def codecs_table(records: Records) -> Table:
    table = _table(
        "zstd by numcodecs against python-zstandard, two threads (above 1 numcodecs is faster)",
        ("bytes a chunk", "decoding", "least to\ngreatest"),
        ("numcodecs\nMB/s", "zstandard\nMB/s", "encoding", "least to\ngreatest", "numcodecs\nMB/s", "zstandard\nMB/s"),
    )
    for record in records:
        cells = [f"{record['bytes_of_a_chunk']:,}"]
        for way in ("decode", "encode"):
            one = record[way]
            cells += [
                f"{one['ratio']:.2f}",
                f"{one['ratio_least']:.2f} – {one['ratio_greatest']:.2f}",
                f"{one['numcodecs_mb_per_s']:,.0f}",
                f"{one['zstandard_mb_per_s']:,.0f}",
            ]
        table.add_row(*cells)
    return table


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(left + right):
        table.add_column(column, justify="left" if position < 2 else "right")
    return table


def _benchmarks() -> dict[str, tuple[Callable[..., Records], Callable[[Records], Table | Group]]]:
    # Imported late: what is measured runs in processes of its own, which import this module again.
    from benchmarks.codecs import measure_codecs
    from benchmarks.comparison import comparison_table, measure_comparison
    from benchmarks.extraction import measure_extraction
    from benchmarks.integers import integers_tables, measure_integers
    from benchmarks.memory import measure_memory
    from benchmarks.opening import measure_opening
    from benchmarks.reading import measure_reading
    from benchmarks.trials import measure_trials

    return {
        "extraction": (measure_extraction, extraction_table),
        "comparison": (measure_comparison, comparison_table),
        "memory": (measure_memory, memory_table),
        "reading": (measure_reading, reading_tables),
        "opening": (measure_opening, opening_tables),
        "trials": (measure_trials, trials_table),
        "integers": (measure_integers, integers_tables),
        "codecs": (measure_codecs, codecs_table),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help="extraction (the default), comparison (with LoRA), memory (50,000 images), reading, opening, trials, "
        "integers (quantised backbones), codecs (zstd by two libraries)",
    )
    parser.add_argument("--quick", action="store_true", help="only see that they run: the numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records too")
    asked = parser.parse_args(arguments)
    known = _benchmarks()
    names = asked.names or ["extraction"]
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
