"""The tables of docs/ whose numbers stand in a JSON beside them, written from it once more.

python -m benchmarks.docs_tables     # all of them, to be pasted; a test compares them with what docs/ prints
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import precision, quantised_tables, results
from benchmarks.intervals import paired

DOCS = Path(__file__).parent.parent / "docs"
TIER_NAMES = {"float16": "coldtap float16"} | {way: f"coldtap int8 {way}, codes" for way in ("fast", "compact")}

type Record = Mapping[str, Any]


def load(name: str) -> Any:
    """Return one of the JSON files of docs/."""
    return json.loads((DOCS / name).read_bytes())


def docs_tables() -> Iterator[tuple[str, str, str]]:
    """Yield each table as (its page, its JSON, its lines)."""
    yield "results.md", "results.json", results.markdown(results.read_results(DOCS / "results.json"))
    yield "results.md", "precision.json", precision.pair_table(load("precision.json")["pairs"])
    yield "results.md", "comparison.json", comparison_table(load("comparison.json")["records"])
    yield "results.md", "reading.json", reading_table(load("reading.json")["reading"])
    yield "quantisation.md", "quantised.json", quantised_tables.markdown(load("quantised.json"))
    yield "log.md", "results-first.json", first_table(load("results-first.json"))
    yield "log.md", "versions.json", versions_table(load("versions.json")["records"])


def versions_table(records: list[Record]) -> str:
    """Return the speed of reading against another commit's, and the middle half of the rounds."""
    lines = ["| geometry, tier | later epochs | first epoch |", "| --- | --: | --: |"]
    by_kind = {(record["geometry"], record["tier"], record["measured"]): record for record in records}
    for geometry, tier in dict.fromkeys((record["geometry"], record["tier"]) for record in records):
        cells = []
        for kind in ("epoch", "first_epoch"):
            record = by_kind[geometry, tier, kind]
            low, high = record["quartiles"]
            cells.append(f"{record['ratio']:.2f} ({low:.2f} – {high:.2f})")
        name = tier if tier == "float16" else f"int8 {tier}"
        lines.append(f"| {geometry}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(records: list[Record]) -> str:
    """Return memory and time against LoRA."""
    goals = {("last", "disk"): ("0.25", "0.15"), ("mist", "disk"): ("0.05", "0.05")}
    goals |= {(adaptor, "memory"): goals[adaptor, "disk"] for adaptor in ("last", "mist")}
    lines = [
        "| | memory, MB | ratio | own, MB | ratio | goal | epoch, ratio (indication) | goal | to the end, ratio "
        "(indication) |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for record in sorted(records, key=_comparison_order):
        memory_goal, time_goal = goals.get((record["adaptor"], record["way"]), ("", ""))
        end = record["end_s"] / records[0]["end_s"]
        cells = [
            _contestant(record),
            *(f"{record['memory_bytes'] / 1e6:,.0f}", _ratio(record["memory_ratio"])),
            *(f"{record['own_bytes'] / 1e6:,.0f}", _ratio(record["own_ratio"]), memory_goal),
            *(_ratio(record["time_ratio"]), time_goal, _ratio(end)),
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


def _comparison_order(record: Record) -> tuple[int, int]:
    return (
        ("lora", "last", "mist", "linear").index(record["adaptor"]),
        ("disk", "memory", "backbone").index(record["way"]),
    )


def _contestant(record: Record) -> str:
    if record["adaptor"] == "lora":
        return "LoRA"
    if record["adaptor"] == "linear":
        return "linear from the store"
    ways = {
        "disk": " from the store, streamed",
        "memory": f" from the store, {record['images_measured']} images resident",
        "backbone": ", backbone in every step",
    }
    return f"{record['adaptor'].upper()}{ways[record['way']]}"


def _ratio(value: float) -> str:
    return "1" if value == 1 else f"{value:.3f}"


def reading_table(records: list[Record]) -> str:
    """Return the ratios to memmap and to each peer, a column per workload."""
    workloads = list(dict.fromkeys(r["workload"] for r in records if "workload" in r))
    columns = [list(_reading_column([r for r in records if r.get("workload") == name])) for name in workloads]
    names = ("reference backbone: 10 × 65 × 192, real features", "ViT-B geometry: 12 × 197 × 768")
    lines = [f"| against | goal | {' | '.join(names)} |", "| --- | --: | --: | --: |"]
    lines += [
        f"| {said} |{f' {goal} ' if goal else ' '}| {' | '.join(cells)} |"
        for (said, goal), cells in zip(
            [(said, goal) for said, goal, _ in columns[0]],
            zip(*([cell for _, _, cell in column] for column in columns), strict=True),
            strict=True,
        )
    ]
    return "\n".join(lines)


def _reading_column(records: list[Record]) -> Iterator[tuple[str, str, str]]:
    """Yield what was compared, the goal, and the cell: bold where the goal is missed."""
    goals = {(r["of"], r["contestant"], r["against"]): r for r in records if r["measured"] == "goal"}
    measured = {(r["measured"], r["contestant"]): r for r in records if r["measured"] != "goal"}
    memmap = "np.memmap, fancy-indexed"
    fast, compact, half = (TIER_NAMES[name] for name in ("fast", "compact", "float16"))

    def goal(said: str, *key: str) -> tuple[str, str, str]:
        record = goals[key]  # type: ignore[index]
        ratio = f"{record['ratio']:.2f}"
        cell = f"{f'**{ratio}**' if record['ratio'] < record['goal'] else ratio} ({_span(record)})"
        return said, f"{record['goal']}", cell

    def bare(tier: str) -> tuple[str, str, str]:
        record = measured["epoch", f"bare copy loop, {tier}"]
        return f"*bare copy loop of {tier} / memmap*", "", f"*{record['ratio']:.2f} ({_span(record)})*"

    def three(said: str, of: str, names: tuple[str, ...], key: str = "ratio", digits: int = 2) -> tuple[str, str, str]:
        return said, "", ", ".join(f"{measured[of, name][key]:.{digits}f}" for name in names)

    yield goal("int8 `fast`, codes / memmap", "epoch", fast, memmap)
    yield goal("float16 / memmap", "epoch", half, memmap)
    yield bare("int8")
    yield bare("float16")
    yield goal("`compact`, codes / bare two-thread decode loop", "epoch", compact, "bare loop, two threads, int8 zstd")
    for peer in ("litdata", "MosaicML streaming", "HF datasets"):
        yield goal(f"`compact` / {peer}", "epoch", compact, peer)
    yield goal("evicted cache: `compact` / memmap", "evicted", compact, memmap)
    evicted = measured["evicted", fast]
    yield "evicted cache: `fast` / memmap", "", f"{evicted['ratio']:.2f} ({_span(evicted)})"
    first = "first epoch, with checksums / memmap warm: float16, `fast`, `compact`"
    yield three(first, "first epoch", (half, fast, compact))
    floats = ("coldtap float16, as float32", "coldtap int8 fast, as float32", "coldtap int8 compact, as float32")
    yield three("floats delivered / memmap: float16, `fast`, `compact`", "epoch", floats)
    yield three("bytes of raw float16: `fast`, `compact`", "epoch", (fast, compact), "disk_ratio", 3)


def _span(record: Record) -> str:
    return f"{record['ratio_least']:.2f} – {record['ratio_greatest']:.2f}"


def first_table(cells: list[Record]) -> str:
    """Return the first table of results, of 2026-11-21, with what differs over its sets."""
    adaptors = ("linear", "mist", "last")
    tests = {name: {c["dataset"]: c["test"] for c in cells if c["adaptor"] == name} for name in adaptors}
    lines = ["| set | linear | mist | last |", "| --- | --: | --: | --: |"]
    for dataset in tests["linear"]:
        lines.append(f"| {dataset} | {' | '.join(_spread(tests[name][dataset]) for name in adaptors)} |")
    means = [[statistics.mean(seed) for seed in zip(*tests[name].values(), strict=True)] for name in adaptors]
    lines.append(f"| **mean** | {' | '.join(f'**{_spread(mean)}**' for mean in means)} |")
    against = [str(paired(tests[name], tests["linear"])) for name in ("mist", "last")]
    lines.append(f"| difference from linear, 95 % over sets | – | {' | '.join(against)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    for page, source, lines in docs_tables():
        print(f"<!-- {page}, from {source} -->\n\n{lines}\n")
