"""What int8 costs in accuracy, and how accuracy falls with the bits per value: one resumable command.

    python -m benchmarks.precision ../shared/data/downstream

1. MIST and LAST from int8 at 30 dB against float32, paired: every set × seed is trained on both with the same start,
   order and epochs; the mean difference of test accuracy with its 95 % interval over sets (`benchmarks.intervals`).
2. The curve: MIST (on the sum) and linear (on the last tap's tokens) on two sets, int8 compact from 4 to 40 dB,
   float16 and float32; bits per value are those of the files.

Nothing is chosen here: one learning rate per adaptor, the same for every tier.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.intervals import paired
from coldtap.stores.writing.stopping import sigterm_interrupts
from coldtap.workflows.benchmark.processes import in_processes

SETTINGS: dict[str, dict[str, str]] = {"linear": {"pool": "both"}, "mist": {}, "last": {}}
RATES = {"linear": 4e-3, "mist": 4e-3, "last": 1e-3}
EPOCHS = {"linear": 30, "mist": 10, "last": 8}
SEEDS = (0, 1, 2, 3, 4)
CURVE_SETS = ("grocery", "sign-digits")
CURVE_SEEDS = (0, 1, 2)
CURVE_SNR_DB = (4, 8, 12, 16, 20, 25, 30, 35, 40)
CURVE_ADAPTORS = ("linear", "mist")


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
class Kept:
    """A way to keep features; the name is its folder's."""

    name: str
    tier: str
    snr: float | None = None


PAIR = (Kept(name="float32", tier="float32"), Kept(name="int8-30dB", tier="int8", snr=30))
CURVE = (
    *(Kept(name=f"curve-int8-{snr}dB", tier="int8", snr=snr) for snr in CURVE_SNR_DB),
    Kept(name="curve-float16", tier="float16"),
    Kept(name="curve-float32", tier="float32"),
)


def cache(data: Path, work: Path, dataset: str, kept: Kept, **options: Any) -> Path:
    from coldtap import cache_features

    store = work / "stores" / f"{dataset}-{kept.name}"
    report = cache_features(data / f"{dataset}.parquet", store, tier=kept.tier, snr=kept.snr, **options)
    print(f"{store.name}: {report.n_rows} rows, {report.status}", flush=True)
    return store


def run_trial(trial: Trial) -> Trial:
    """Trains; a run that an earlier call has finished with the same settings is only read."""
    from coldtap import train_adaptor

    train_adaptor(
        trial.store,
        trial.adaptor,
        out=trial.out,
        lr=trial.lr,
        seed=trial.seed,
        epochs=trial.epochs,
        settings=SETTINGS[trial.adaptor],
    )
    return trial


def run_all(todo: Sequence[Trial], jobs: int) -> None:
    began = time.monotonic()
    with closing(in_processes(run_trial, todo, jobs=jobs)) as done:
        for number, trial in enumerate(done, start=1):
            minutes = (time.monotonic() - began) / 60
            print(f"[{number}/{len(todo)}, {minutes:.1f} min] {Path(trial.store).name} {trial.adaptor} {trial.seed}")


def trial(work: Path, dataset: str, kept: Kept, adaptor: str, seed: int) -> Trial:
    return Trial(
        dataset=dataset,
        adaptor=adaptor,
        lr=RATES[adaptor],
        seed=seed,
        epochs=EPOCHS[adaptor],
        store=str(work / "stores" / f"{dataset}-{kept.name}"),
        out=str(work / "runs" / f"{dataset}-{kept.name}" / f"{adaptor}-e{EPOCHS[adaptor]}-s{seed}"),
    )


def bits_a_value(store: Path) -> dict[str, float]:
    """Bits of the files of each gather over the numbers that they hold, escapes and indexes included."""
    from coldtap.stores import open_store

    opened, found = open_store(store), {}
    for name, array in opened.arrays.items():
        files = [*(store / "features.zarr" / name).rglob("*"), *(store / "features.zarr/escapes" / name).rglob("*")]
        n_bytes = sum(file.stat().st_size for file in files if file.is_file())
        found[array.gather] = 8 * n_bytes / (opened.n_rows * math.prod(array.row_shape))
    return found


def finished(todo: Sequence[Trial]) -> dict[Trial, dict[str, float]]:
    """What the trainings that are done have reached."""
    from coldtap.adaptors import read_run

    runs = {trial: read_run(Path(trial.out)) for trial in todo}
    return {trial: {"test": 100 * run.metrics["test"].score} for trial, run in runs.items() if run is not None}


def whole_seeds(results: dict[Trial, dict[str, float]], work: Path, names: Sequence[str], adaptor: str) -> list[int]:
    """Seeds of which every set is done, in both tiers."""
    return [s for s in SEEDS if all(trial(work, n, kept, adaptor, s) in results for n in names for kept in PAIR)]


def pair(results: dict[Trial, dict[str, float]], work: Path, names: Sequence[str], adaptor: str) -> dict[str, Any]:
    """Return int8 − float32 in points of test accuracy, a pair per set, and every score by set and seed."""
    seeds = whole_seeds(results, work, names, adaptor)

    def tests(kept: Kept) -> dict[str, list[float]]:
        return {name: [results[trial(work, name, kept, adaptor, seed)]["test"] for seed in seeds] for name in names}

    exact, int8 = (tests(kept) for kept in PAIR)
    return {
        "adaptor": adaptor,
        "seeds": len(seeds),
        "float32": statistics.mean(score for scores in exact.values() for score in scores),
        "int8": statistics.mean(score for scores in int8.values() for score in scores),
        **paired(int8, exact).to_dict(),
        "by_set": {name: statistics.mean(int8[name]) - statistics.mean(exact[name]) for name in names},
        "tests": {PAIR[0].name: exact, PAIR[1].name: int8},
    }


def curve(results: dict[Trial, dict[str, float]], work: Path) -> list[dict[str, Any]]:
    points = []
    for dataset in CURVE_SETS:
        for kept in CURVE:
            bits = bits_a_value(work / "stores" / f"{dataset}-{kept.name}")
            for adaptor in CURVE_ADAPTORS:
                tests = [results[trial(work, dataset, kept, adaptor, seed)]["test"] for seed in CURVE_SEEDS]
                points.append(
                    {
                        "set": dataset,
                        "adaptor": adaptor,
                        "kept": kept.name.removeprefix("curve-"),
                        "bits": bits["sum" if adaptor == "mist" else "layers"],
                        "test": statistics.mean(tests),
                        "deviation": statistics.stdev(tests),
                        "tests": tests,
                    }
                )
    return points


def pair_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Return int8 against float32, an adaptor per row, for docs/results.md."""
    lines = [
        "| adaptor | seeds | float32 | int8, 30 dB | difference | 95 % over sets |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for pair in pairs:
        low, high = pair["interval"]
        lines.append(
            f"| {pair['adaptor']} | {pair['seeds']} | {pair['float32']:.2f} | {pair['int8']:.2f} "
            f"| {pair['difference']:+.2f} | {low:+.2f} … {high:+.2f} |"
        )
    return "\n".join(lines)


def curve_table(points: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracy by bits per value; a ± is of starts."""
    lines = ["| set | adaptor | kept as | bits per value | test |", "| --- | --- | --- | --: | --: |"]
    for point in points:
        lines.append(
            f"| {point['set']} | {point['adaptor']} | {point['kept']} | {point['bits']:.2f} "
            f"| {point['test']:.1f} ± {point['deviation']:.1f} |"
        )
    return "\n".join(lines)


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy against bits a value, a panel a set."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(CURVE_SETS), figsize=(9, 3.6), layout="constrained")
    for panel, dataset in zip(panels, CURVE_SETS, strict=True):
        for adaptor, colour in zip(CURVE_ADAPTORS, ("#888888", "#2a7fb8"), strict=True):
            chosen = [p for p in points if (p["set"], p["adaptor"]) == (dataset, adaptor)]
            codes = [p for p in chosen if p["kept"].startswith("int8")]
            panel.errorbar(
                [p["bits"] for p in codes],
                [p["test"] for p in codes],
                [p["deviation"] for p in codes],
                marker="o",
                markersize=3,
                capsize=2,
                color=colour,
                label=f"{adaptor}, int8 compact",
            )
            half = next(p for p in chosen if p["kept"] == "float16")
            panel.plot(half["bits"], half["test"], "s", color=colour, label=f"{adaptor}, float16")
            exact = next(p for p in chosen if p["kept"] == "float32")
            panel.axhline(exact["test"], color=colour, linestyle=":", linewidth=1)
        panel.set_title(dataset)
        panel.set_xlabel("bits a value (files)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy (%); dotted: float32")
    panels[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data/downstream"))
    parser.add_argument("--work", type=Path, default=Path("results-out/precision"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="train nothing: the tables of what is done so far")
    arguments = parser.parse_args()
    data, work = arguments.data, arguments.work
    names = sorted(path.stem for path in data.glob("*.parquet"))
    # The cheap ones first; LAST seed by seed, so that a run that is cut short has whole pairs.
    todo = [trial(work, n, kept, "mist", s) for n in names for s in SEEDS for kept in PAIR]
    todo += [
        trial(work, n, kept, a, s) for a in CURVE_ADAPTORS for n in CURVE_SETS for s in CURVE_SEEDS for kept in CURVE
    ]
    todo += [trial(work, n, kept, "last", s) for s in SEEDS for n in names for kept in PAIR]
    print(f"budget: {len(todo)} trainings of {EPOCHS} epochs, learning rates {RATES}, in {arguments.jobs} processes")
    if not arguments.report:
        for name in names:
            for kept in PAIR:
                cache(data, work, name, kept)
        for name in CURVE_SETS:
            for kept in CURVE:
                cache(data, work, name, kept, taps="last:1", gather=["layers", "sum"])
        with sigterm_interrupts():
            run_all(todo, arguments.jobs)
    results = finished(todo)
    pairs, points = [pair(results, work, names, adaptor) for adaptor in ("mist", "last")], curve(results, work)
    (work / "precision.json").write_text(json.dumps({"pairs": pairs, "curve": points}, indent=1))
    text = f"{pair_table(pairs)}\n\n{curve_table(points)}\n"
    (work / "precision.md").write_text(text)
    draw(points, work / "precision.png")
    print(f"\n{text}\nalso in {work}/precision.md, precision.json and precision.png")


if __name__ == "__main__":
    main()
