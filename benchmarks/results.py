"""The table of results: every downstream set × linear, MIST and LAST, from one resumable command.

    python -m benchmarks.results ../shared/data/downstream            # the table of docs/results.md
    python -m benchmarks.results DATA --sets grocery --epochs 10      # a part of it

Each set is cached once by the reference backbone; each adaptor is then trained from the store at every learning
rate with every seed. The learning rate with the best mean val accuracy over the seeds is chosen, and its test
accuracy reported. Killed and started again, it goes on where it was; finished runs are read, not repeated.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

ADAPTORS = ("linear", "mist", "last")
# Settings other than an adaptor's defaults, chosen on the val splits of grocery, omniglot-alphabets and sign-digits.
SETTINGS: dict[str, dict[str, str]] = {"linear": {"pool": "both"}, "mist": {}, "last": {}}
LEARNING_RATES = (1e-3, 4e-3, 1.6e-2)
SEEDS = (0, 1, 2)
EPOCHS = 15


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training: where it reads and writes, and its setting."""

    dataset: str
    adaptor: str
    lr: float
    seed: int
    epochs: int
    store: str
    out: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One set × adaptor: accuracies in percent at the learning rate chosen on val."""

    dataset: str
    adaptor: str
    lr: float
    val: tuple[float, ...]
    test: tuple[float, ...]
    parameters: int
    bytes_per_sample: int
    seconds: float


def cache_sets(data: Path, work: Path, names: list[str]) -> None:
    from coldtap import cache_features

    for name in names:
        report = cache_features(data / f"{name}.parquet", work / "stores" / name)
        print(f"{name}: {report.n_rows} rows, {report.status}", flush=True)


def trials(work: Path, names: list[str], adaptors: list[str], epochs: int) -> Iterator[Trial]:
    """The longest first, so that no process idles at the end."""
    for adaptor in sorted(adaptors, key=ADAPTORS.index, reverse=True):
        for dataset in names:
            for lr in LEARNING_RATES:
                for seed in SEEDS:
                    out = work / "runs" / dataset / f"{adaptor}-e{epochs}" / f"lr{lr:g}-s{seed}"
                    store = work / "stores" / dataset
                    yield Trial(
                        dataset=dataset,
                        adaptor=adaptor,
                        lr=lr,
                        seed=seed,
                        epochs=epochs,
                        store=str(store),
                        out=str(out),
                    )


def run_trial(trial: Trial) -> tuple[Trial, dict[str, float]]:
    """Train; a run that an earlier call has finished with the same settings is only read."""
    import torch

    from coldtap import train_adaptor

    torch.set_num_threads(1)  # two processes of one thread finish more trials than one of two
    info = train_adaptor(
        trial.store,
        trial.adaptor,
        out=trial.out,
        lr=trial.lr,
        seed=trial.seed,
        epochs=trial.epochs,
        settings=SETTINGS[trial.adaptor],
    ).info
    itemsize = 2  # the stores of the table are float16
    n_values = 1
    for n in info.features.row_shape:
        n_values *= n
    return trial, {
        "val": 100 * info.metrics["val"].top1,
        "test": 100 * info.metrics["test"].top1,
        "parameters": info.parameters,
        "bytes_per_sample": n_values * itemsize,
        "seconds": info.epoch_seconds * trial.epochs,
    }


def run_all(todo: list[Trial], jobs: int) -> dict[Trial, dict[str, float]]:
    results: dict[Trial, dict[str, float]] = {}
    began = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_trial, trial) for trial in todo]
        for future in as_completed(futures):
            trial, result = future.result()
            results[trial] = result
            minutes = (time.monotonic() - began) / 60
            print(
                f"[{len(results)}/{len(todo)}, {minutes:.1f} min] {trial.dataset} {trial.adaptor} lr {trial.lr:g} "
                f"seed {trial.seed}: val {result['val']:.1f}, {result['seconds']:.0f} s",
                flush=True,
            )
    return results


def choose(results: dict[Trial, dict[str, float]]) -> list[Cell]:
    """A cell for each set × adaptor; val alone decides the learning rate, the smaller one among equals."""
    cells = []
    for dataset, adaptor in sorted({(t.dataset, t.adaptor) for t in results}):
        by_lr: dict[float, list[dict[str, float]]] = {}
        for trial, result in sorted(results.items(), key=lambda item: item[0].seed):
            if (trial.dataset, trial.adaptor) == (dataset, adaptor):
                by_lr.setdefault(trial.lr, []).append(result)
        best = max(sorted(by_lr), key=lambda lr: statistics.mean(r["val"] for r in by_lr[lr]))
        runs = by_lr[best]
        cells.append(
            Cell(
                dataset=dataset,
                adaptor=adaptor,
                lr=best,
                val=tuple(r["val"] for r in runs),
                test=tuple(r["test"] for r in runs),
                parameters=int(runs[0]["parameters"]),
                bytes_per_sample=int(runs[0]["bytes_per_sample"]),
                seconds=statistics.mean(r["seconds"] for r in runs),
            )
        )
    return cells


def spread(values: tuple[float, ...]) -> str:
    """Mean ± standard deviation (n − 1)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def mean_over_sets(cells: list[Cell], adaptor: str) -> tuple[float, ...]:
    """Mean over the sets, a seed each."""
    rows = [cell.test for cell in cells if cell.adaptor == adaptor]
    return tuple(statistics.mean(seed) for seed in zip(*rows, strict=True))


def table(cells: list[Cell]) -> str:
    adaptors = [a for a in ADAPTORS if any(c.adaptor == a for c in cells)]
    by = {(c.dataset, c.adaptor): c for c in cells}
    lines = [f"| set | {' | '.join(adaptors)} |", "| --- |" + " --: |" * len(adaptors)]
    for dataset in sorted({c.dataset for c in cells}):
        lines.append(f"| {dataset} | " + " | ".join(spread(by[dataset, a].test) for a in adaptors) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{spread(mean_over_sets(cells, a))}**" for a in adaptors) + " |")
    of = {a: next(c for c in cells if c.adaptor == a) for a in adaptors}
    lines.append("| bytes used a sample | " + " | ".join(f"{of[a].bytes_per_sample:,}" for a in adaptors) + " |")
    spans = {a: [c.parameters for c in cells if c.adaptor == a] for a in adaptors}
    lines.append("| parameters | " + " | ".join(f"{min(spans[a]):,} – {max(spans[a]):,}" for a in adaptors) + " |")
    seconds = {a: statistics.mean(c.seconds for c in cells if c.adaptor == a) for a in adaptors}
    lines.append("| seconds a run | " + " | ".join(f"{seconds[a]:.0f}" for a in adaptors) + " |")
    return "\n".join(lines)


def rates(cells: list[Cell]) -> str:
    chosen = [f"{c.dataset} {c.adaptor} {c.lr:g} (val {spread(c.val)})" for c in cells]
    return "Chosen on val: " + "; ".join(chosen) + "."


def draw(cells: list[Cell], path: Path) -> None:
    """Points with their spread, a colour an adaptor."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    datasets = [*sorted({c.dataset for c in cells}), "mean"]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for shift, (adaptor, colour) in enumerate(zip(ADAPTORS, ("#888888", "#2a7fb8", "#d1495b"), strict=True)):
        values = [c.test for name in datasets for c in cells if (c.dataset, c.adaptor) == (name, adaptor)]
        if not values:
            continue
        values.append(mean_over_sets(cells, adaptor))
        places = [i + (shift - 1) * 0.22 for i in range(len(values))]
        bars = axes.bar(places, [statistics.mean(v) for v in values], 0.2, color=colour, label=adaptor)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=7)
        deviations = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
        axes.errorbar(places, [statistics.mean(v) for v in values], deviations, fmt="none", ecolor="black", capsize=2)
    axes.set_xticks(range(len(datasets)), [name.replace("-", "-\n") for name in datasets])
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 115)
    axes.set_title("Adaptors trained from stored features of coldtap/vit-reference")
    axes.legend(ncols=3, loc="upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data/downstream"))
    parser.add_argument("--work", type=Path, default=Path("results-out"))
    parser.add_argument("--sets", default="", help="names with commas; all Parquet files by default")
    parser.add_argument("--adaptors", default=",".join(ADAPTORS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    there = sorted(path.stem for path in arguments.data.glob("*.parquet"))
    names = arguments.sets.split(",") if arguments.sets else there
    if not there or set(names) - set(there):
        sys.exit(
            f"{arguments.data} holds {there or 'no Parquet files'}; {sorted(set(names) - set(there))} was asked for"
        )
    adaptors = arguments.adaptors.split(",")
    print(
        f"budget: {len(names)} sets × {len(adaptors)} adaptors × {len(LEARNING_RATES)} learning rates "
        f"{LEARNING_RATES} × {len(SEEDS)} seeds × {arguments.epochs} epochs, in {arguments.jobs} processes",
        flush=True,
    )
    cache_sets(arguments.data, arguments.work, names)
    cells = choose(run_all(list(trials(arguments.work, names, adaptors, arguments.epochs)), arguments.jobs))
    (arguments.work / "table.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    (arguments.work / "table.md").write_text(f"{table(cells)}\n\n{rates(cells)}\n")
    draw(cells, arguments.work / "results.png")
    print(f"\n{table(cells)}\n\n{rates(cells)}\n\nalso in {arguments.work}/table.md, table.json and results.png")


if __name__ == "__main__":
    main()
