"""The table of results: every downstream set × seven adaptors and LoRA, from one resumable command.

    python -m benchmarks.results ../shared/data/downstream              # the table of docs/results.md
    python -m benchmarks.results DATA --sets grocery --epochs 4 --no-lora   # a part of it

A ± is of starts alone: no adaptor here has dropout, and all seeds share one order of samples. How a difference varies
over sets is what `benchmarks.intervals` gives.

The adaptors go the way of `coldtap benchmark`, LoRA that of `benchmarks.lora`: the same images, protocol, learning
rates, seeds, epochs, batches and schedule. Killed and started again, it goes on where it was.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.intervals import Difference, paired
from coldtap.adaptors.results import Cell, ResultTable, Row, table_text
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.cli.main import guarded
from coldtap.pipeline.images.sources.collection import find_datasets
from coldtap.stores.storage.atomic import write_file
from coldtap.stores.writing.stopping import sigterm_interrupts
from coldtap.workflows.benchmark.cell import Rules
from coldtap.workflows.benchmark.contenders import make_contenders
from coldtap.workflows.benchmark.processes import in_processes
from coldtap.workflows.benchmark.run import Benchmark, run_benchmark

MODEL = "coldtap/vit-reference"
# Options other than an adaptor's defaults, chosen on the val splits of grocery, omniglot-alphabets and sign-digits.
SETTINGS: dict[str, dict[str, str]] = {
    "linear": {"pool": "both"},
    "attentive": {},
    "head2toe": {},
    "mist": {},
    "ladder": {},
    "combo": {},
    "last": {},
}
PROTOCOL = "vtab"
LEARNING_RATES = (1e-3, 4e-3, 1.6e-2)
N_SEEDS = 3
EPOCHS = 8
LORA = "lora"
REFERENCES = ("linear", LORA)  # every mean is held against these, pair by pair
CLOSEST = ("last", LORA, "mist", "combo")  # the highest means, held against each other
# Okabe and Ito's colours, which the colour-blind tell apart, in the order of the columns.
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


@dataclass(frozen=True, kw_only=True)
class LoraTask:
    """LoRA on one set."""

    dataset: Path
    out: Path
    epochs: int


def lora_cell(task: LoraTask) -> Cell:
    """LoRA's cell of a set; fits that are done are only read."""
    from benchmarks.lora import Clock, lora_protocol

    seeds = range(N_SEEDS)
    found = lora_protocol(
        task.dataset,
        rates=LEARNING_RATES,
        seeds=seeds,
        epochs=task.epochs,
        out=task.out,
        clock=Clock(total=len(LEARNING_RATES) + N_SEEDS),
    )
    return Cell(
        dataset=task.dataset.stem,
        adaptor=LORA,
        metric="top1",
        test=tuple(found["test"]),
        val=(found["val"][f"{found['lr']:g}"],),
        setting={"lr": found["lr"]},
        parameters=found["parameters"],
        seconds=_seconds(task, found["lr"]),
    )


def _seconds(task: LoraTask, chosen: float) -> float:
    """Of all fits: every rate with the first seed, and the chosen one with every seed."""
    from benchmarks.lora import POOL

    fits = [json.loads(path.read_bytes()) for path in sorted(task.out.glob("*.json"))]
    return sum(
        fit["seconds"]
        for fit in fits
        if fit["settings"]["epochs"] == task.epochs
        and fit["settings"]["pool"] == POOL
        and (fit["settings"]["lr"] == chosen or fit["settings"]["fit"] == "train")
    )


def with_lora(table: ResultTable, tasks: Sequence[LoraTask], jobs: int) -> ResultTable:
    """The table with LoRA as its last column."""
    cells = []
    with closing(in_processes(lora_cell, tasks, jobs=jobs)) as done:
        for cell in done:
            cells.append(cell)
            print(f"[{len(cells)}/{len(tasks)}] {cell.dataset} {LORA}", flush=True)
    return replace(
        table,
        title=f"{len(table.adaptors)} adaptors and LoRA on {len(table.datasets)} datasets",
        adaptors=(*table.adaptors, LORA),
        cells=(*table.cells, *cells),
    )


def markdown(table: ResultTable) -> str:
    """Return the table, its costs, what was chosen and the differences of pairs, for docs/results.md."""
    lines = [_line(["set", *table.adaptors]), _line(["---", *["--:"] * len(table.adaptors)])]
    lines += [_line([row.name, *_scores(row, table)]) for row in table.rows()]
    lines += [_line([f"**{row.name}**", *(f"**{score}**" for score in _scores(row, table))]) for row in table.means()]
    references = [name for name in REFERENCES if name in table.adaptors]
    lines += [_line([f"difference from {name}, 95 % over sets", *_against(name, table)]) for name in references]
    by_adaptor = {name: [c for c in table.in_order() if c.adaptor == name and not c.failure] for name in table.adaptors}
    spans = [sorted(cell.parameters for cell in cells) for cells in by_adaptor.values()]
    lines.append(_line(["parameters", *(f"{span[0]:,} – {span[-1]:,}" if span else "–" for span in spans)]))
    sizes = [max((cell.bytes_per_sample for cell in cells), default=0) for cells in by_adaptor.values()]
    lines.append(_line(["bytes per sample", *(f"{size:,.0f}" if size else "–" for size in sizes)]))
    means = [statistics.mean(cell.seconds for cell in cells) if cells else 0 for cells in by_adaptor.values()]
    lines.append(_line(["seconds per set, all trainings", *(f"{mean:.0f}" for mean in means)]))
    lines += ["", _line(["chosen on val", *table.adaptors]), _line(["---", *["--:"] * len(table.adaptors)])]
    for row in table.rows():
        cells = [table.cell(row.name, adaptor) for adaptor in table.adaptors]
        lines.append(_line([row.name, *(cell.chosen if cell and not cell.failure else "–" for cell in cells)]))
    lines += ["", *_pair_lines(table)]
    lines += [f"- {reason}" for reason in table.failures()]
    return "\n".join(lines) + "\n"


def difference(table: ResultTable, left: str, right: str) -> Difference | None:
    """Return left − right in points over the sets that have both; None where there is none."""
    found = {name: (table.cell(name, left), table.cell(name, right)) for name in table.rows_in_order()}
    both = {name: (a.test, b.test) for name, (a, b) in found.items() if a and b and a.test and b.test}
    if not both:
        return None
    sides = [{name: [100 * score for score in tests[side]] for name, tests in both.items()} for side in (0, 1)]
    return paired(sides[0], sides[1])


def _against(reference: str, table: ResultTable) -> list[str]:
    differences = [None if name == reference else difference(table, name, reference) for name in table.adaptors]
    return ["–" if found is None else str(found) for found in differences]


def _pair_lines(table: ResultTable) -> list[str]:
    """The highest means against each other, with each set's own difference."""
    names = table.rows_in_order()
    pairs = itertools.combinations([name for name in CLOSEST if name in table.adaptors], 2)
    lines = [_line(["points", "mean", "95 % over sets", *names]), _line(["---", *["--:"] * (2 + len(names))])]
    for left, right in pairs:
        found = difference(table, left, right)
        if found is None:
            continue
        of_sets = [difference(replace(table, datasets=(name,)), left, right) for name in names]
        each = ["–" if of_set is None else f"{of_set.mean:+.2f}" for of_set in of_sets]
        lines.append(_line([f"{left} − {right}", f"{found.mean:+.2f}", found.span or "–", *each]))
    return lines


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _scores(row: Row, table: ResultTable) -> list[str]:
    return [str(row.scores[name] or "–") for name in table.adaptors]


def draw(table: ResultTable, path: Path) -> None:
    """Bars with their deviations, a colour an adaptor; the mean over sets stands apart."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [*table.rows(), *table.means()]
    starts = [number + 0.25 * (number >= len(table.datasets)) for number in range(len(rows))]
    width = 0.86 / len(table.adaptors)
    figure, axes = plt.subplots(figsize=(12, 4.6), layout="constrained")
    for number, (adaptor, colour) in enumerate(zip(table.adaptors, COLOURS, strict=False)):
        scored = [(start, row.scores[adaptor]) for start, row in zip(starts, rows, strict=True)]
        bars = [(start + (number - (len(table.adaptors) - 1) / 2) * width, score) for start, score in scored if score]
        places, means = [place for place, _ in bars], [100 * score.mean for _, score in bars]
        deviations = [100 * score.deviation for _, score in bars]
        axes.bar(places, means, 0.92 * width, color=colour, edgecolor="#333333", linewidth=0.4, label=adaptor)
        axes.errorbar(places, means, deviations, fmt="none", ecolor="#777777", elinewidth=1, capsize=1.5)
        for place, mean, deviation in zip(places, means, deviations, strict=True):
            axes.text(place, mean + deviation + 1, f"{mean:.1f}", fontsize=7, rotation=90, ha="center", va="bottom")
    axes.axvline((starts[len(table.datasets) - 1] + starts[len(table.datasets)]) / 2, color="#bbbbbb", linewidth=1)
    axes.set_xticks(starts, [row.name.replace("-", "-\n") for row in rows])
    axes.set_xlim(starts[0] - 0.6, starts[-1] + 0.6)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("test accuracy (%), mean and deviation of seeds")
    axes.legend(ncols=len(table.adaptors), loc="upper center", bbox_to_anchor=(0.5, 1.1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def read_results(path: Path) -> ResultTable:
    """Return the table that `write_results` has kept."""
    kept = json.loads(path.read_bytes())
    cells = [Cell(**{**cell, "test": tuple(cell["test"]), "val": tuple(cell["val"])}) for cell in kept["cells"]]
    datasets, adaptors = tuple(kept["budget"]["sets"]), tuple(kept["budget"]["adaptors"])
    return ResultTable(title=path.stem, about=(), datasets=datasets, adaptors=adaptors, cells=tuple(cells))


def write_results(table: ResultTable, budget: Mapping[str, object], work: Path) -> None:
    cells = [asdict(cell) for cell in table.in_order()]
    write_file(work / "results.json", [json.dumps({"budget": budget, "cells": cells}, indent=1).encode()])
    write_file(work / "table.md", [markdown(table).encode()])
    draw(table, work / "results.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data/downstream"))
    parser.add_argument("--work", type=Path, default=Path("results-out"))
    parser.add_argument("--sets", default="", help="names with commas; all by default")
    parser.add_argument("--adaptors", default=",".join(SETTINGS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--lora", type=Path, help="folder of LoRA's results; WORK/lora by default")
    parser.add_argument("--no-lora", action="store_true", help="leave LoRA out")
    asked = parser.parse_args()
    training = TrainingOptions(epochs=asked.epochs)
    adaptors = asked.adaptors.split(",")
    benchmark = Benchmark(
        datasets=find_datasets(asked.data, asked.sets.split(",") if asked.sets else ()),
        contenders=make_contenders(
            adaptors,
            {f"{name}.{key}": value for name in adaptors for key, value in SETTINGS[name].items()},
            {"lr": LEARNING_RATES},
            training,
        ),
        rules=Rules(protocol=PROTOCOL, seeds=N_SEEDS, training=training),
        caching={"model": MODEL},
        out=asked.work,
    )
    budget = {
        "sets": list(benchmark.datasets),
        "adaptors": adaptors if asked.no_lora else [*adaptors, LORA],
        "protocol": PROTOCOL,
        "learning_rates": LEARNING_RATES,
        "seeds": N_SEEDS,
        "epochs": asked.epochs,
        "processes": asked.jobs,
    }
    print("\n".join([f"budget: {json.dumps(budget)}", *benchmark.budget()]), flush=True)
    with sigterm_interrupts():
        table, _ = run_benchmark(benchmark, jobs=asked.jobs)
        if not asked.no_lora:
            lora = asked.lora or asked.work / "lora"
            tasks = [
                LoraTask(dataset=path, out=lora / name, epochs=asked.epochs)
                for name, path in benchmark.datasets.items()
            ]
            table = with_lora(table, tasks, asked.jobs)
    write_results(table, budget, asked.work)
    print(f"\n{table_text(table)}\nalso in {asked.work}: table.md, results.json and results.png")


if __name__ == "__main__":
    guarded(main)()
