"""From the cells of `benchmarks.quantised` to its data, tables and picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine_line
from benchmarks.quantised_budget import ADAPTORS, CROSSED, FLOAT, METHODS, Budget, Place
from benchmarks.quantised_pairs import Series, pair_images, pair_series

LABELS = {FLOAT: "float32", "none": "base", "qwt": "QwT", "cwac": "CWAC", "stored": "base, stored features compensated"}
# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {"none": "#999999", "qwt": "#e69f00", "cwac": "#0072b2"}
COMPARED = (("cwac", "qwt"), ("cwac", "none"), ("qwt", "none"), ("none", FLOAT), ("qwt", FLOAT), ("cwac", FLOAT))
# What is quantised is narrower than in the literature, whose W4A4 has integers inside attention too.
WIDTH = "width (attention products in float32)"
OWN, TO_QUANTISED, TO_FLOAT = "quantised to quantised", "float to quantised", "quantised to float"

type Record = dict[str, Any]
type Cells = Mapping[tuple[str, str], Mapping[int, Record]]


def collect(place: Place, budget: Budget) -> Record:
    """All numbers of the cells that are done."""
    cells = _cells(place, budget)
    return {
        "budget": budget.to_dict(),
        "missing_cells": (1 + len(budget.schemes) * len(METHODS)) * len(budget.seeds) - sum(map(len, cells.values())),
        "accuracy": [_accuracy(cells, *key) for key in cells],
        "differences": [
            found
            for scheme in budget.schemes
            for left, right in COMPARED
            if (found := _compared(cells, scheme, left, right)) is not None
        ],
        "crossed": _crossed(cells, [scheme for scheme in CROSSED if scheme in budget.schemes]),
        "cost": [_cost(cells, *key) for key in cells if key[1] != FLOAT],
        "latency": place.read("latency", budget),
        "geometries": [
            {"model": model, "scheme": scheme, **found}
            for model, _ in budget.geometries
            for scheme in budget.schemes
            if (found := place.read(f"snr-{model}-{scheme}", budget)) is not None
        ],
    }


def _cells(place: Place, budget: Budget) -> Cells:
    """Cells that are done, by (scheme, method) and seed; the float backbone's scheme is empty."""
    keys = [("", FLOAT), *((scheme, method) for scheme in budget.schemes for method in METHODS)]
    found = {}
    for scheme, method in keys:
        names = {seed: f"{scheme}-{method}-s{seed}".removeprefix("-") for seed in budget.seeds}
        of = {seed: record for seed, name in names.items() if (record := place.read(name, budget)) is not None}
        if of:
            found[scheme, method] = of
    return found


def _accuracy(cells: Cells, scheme: str, method: str) -> Record:
    """Percent: the own task's, and each adaptor's mean over sets, a number a seed."""
    of = cells[scheme, method]
    series: Series = {seed: record["adaptors"] for seed, record in of.items()}
    tests = _by_set_and_seed(series)
    return {
        "scheme": scheme,
        "method": method,
        "seeds": list(of),
        "own": [100 * record["own"]["top1"] for record in of.values()],
        **{adaptor: _by_seed(series, [adaptor]) for adaptor in ADAPTORS},
        "both": _by_seed(series, list(ADAPTORS)),
        "by_set": {name: {a: statistics.mean(of_set[a]) for a in ADAPTORS} for name, of_set in tests.items()},
        "tests": tests,
        "seconds": [record["seconds"] for record in of.values()],
    }


def _by_seed(series: Series, adaptors: Sequence[str]) -> list[float]:
    return [100 * statistics.mean(of_set[a] for of_set in sets.values() for a in adaptors) for sets in series.values()]


def _by_set_and_seed(series: Series) -> dict[str, dict[str, list[float]]]:
    """Every score in percent: by set and adaptor, a number per seed."""
    names = next(iter(series.values()))
    return {n: {a: [100 * sets[n][a] for sets in series.values()] for a in ADAPTORS} for n in names}


def _compared(cells: Cells, scheme: str, left: str, right: str) -> Record | None:
    one = cells.get((scheme, left))
    other = cells.get(("", FLOAT) if right == FLOAT else (scheme, right))
    if one is None or other is None or not {*one} & {*other}:
        return None
    n_images = next(iter(one.values()))["own"]["n_images"]
    bits = [{seed: record["own"]["right"] for seed, record in of.items()} for of in (one, other)]
    series: list[Series] = [{seed: record["adaptors"] for seed, record in of.items()} for of in (one, other)]
    return {
        "scheme": scheme,
        "left": left,
        "right": right,
        "own": pair_images(bits[0], bits[1], n_images),
        **{adaptor: pair_series(series[0], series[1], [adaptor]) for adaptor in ADAPTORS},
        "both": pair_series(series[0], series[1], list(ADAPTORS)),
    }


def _crossed(cells: Cells, schemes: Sequence[str]) -> Record:
    """The joint question: accuracy by where an adaptor was trained and used, and what a compensation gains there."""
    rows, gains = [], []
    for scheme in schemes:
        ways = {way: found for way in (*METHODS, "stored") if (found := _ways(cells, scheme, way))}
        for way, directions in ways.items():
            for direction, series in directions.items():
                scores = {adaptor: _by_seed(series, [adaptor]) for adaptor in ADAPTORS}
                kept = {**scores, "tests": _by_set_and_seed(series)}
                rows.append({"scheme": scheme, "compensation": way, "direction": direction, **kept})
                if way != "none":
                    gain = {a: pair_series(series, ways["none"][direction], [a]) for a in ADAPTORS}
                    gains.append({"scheme": scheme, "compensation": way, "direction": direction, **gain})
    return {"rows": rows, "gains": gains}


def _ways(cells: Cells, scheme: str, way: str) -> dict[str, Series]:
    """Accuracy by direction; `stored` is the base quantiser's features, compensated in the store."""
    of = cells.get((scheme, "none" if way == "stored" else way), {})
    if not of or (scheme, "none") not in cells:
        return {}
    if way == "stored":
        places = {OWN: "stored: own", TO_QUANTISED: f"stored: {TO_QUANTISED}", TO_FLOAT: f"stored: {TO_FLOAT}"}
    else:
        places = {TO_QUANTISED: TO_QUANTISED, TO_FLOAT: TO_FLOAT}
    found: dict[str, Series] = {
        direction: {
            seed: {name: of_set[place] for name, of_set in record["crossed"].items()} for seed, record in of.items()
        }
        for direction, place in places.items()
    }
    own: dict[str, Series] = {} if way == "stored" else {OWN: {seed: record["adaptors"] for seed, record in of.items()}}
    return {**own, **found}


def _cost(cells: Cells, scheme: str, method: str) -> Record:
    first = next(iter(cells[scheme, method].values()))
    kept = ("n_parameters", "n_folded_parameters", "n_bytes", "float_bytes")
    return {"scheme": scheme, "method": method, **{key: first[key] for key in kept}}


def markdown(found: Record) -> str:
    """All tables."""
    parts = [
        f"Budget: `{found['budget']}`; cells that are not done: {found['missing_cells']}.",
        _accuracy_table(found),
        _difference_table(found),
        _crossed_tables(found),
        _cost_table(found),
        _geometry_table(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], n_left: int) -> str:
    aligned = [*["---"] * n_left, *["--:"] * (len(header) - n_left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, aligned, *rows))


def _spread(values: Sequence[float]) -> str:
    """Mean ± deviation of seeds."""
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def _difference(pair: Record | None) -> str:
    if pair is None:
        return "–"
    if pair["interval"] is None:
        return f"{pair['difference']:+.2f}"
    low, high = pair["interval"]
    return f"{pair['difference']:+.2f} ({low:+.2f} … {high:+.2f})"


def _accuracy_table(found: Record) -> str:
    keys = ("own", *ADAPTORS, "both")
    rows = [
        [row["scheme"].upper() or "–", LABELS[row["method"]], *(_spread(row[key]) for key in keys)]
        for row in found["accuracy"]
    ]
    header = [WIDTH, "compensation", "own task, top-1", *ADAPTORS, "mean of adaptors"]
    said = (
        "Accuracy in percent, mean ± deviation of seeds (of calibration and start; the next table has how sets vary):"
    )
    return f"{said}\n\n{_table(header, rows, 2)}"


def _difference_table(found: Record) -> str:
    keys = ("own", *ADAPTORS, "both")
    rows = [
        [
            row["scheme"].upper(),
            f"{LABELS[row['left']]} − {LABELS[row['right']]}",
            *(_difference(row[key]) for key in keys),
        ]
        for row in found["differences"]
    ]
    header = [WIDTH, "difference", "own task", *ADAPTORS, "mean of adaptors"]
    said = (
        "Differences in points with 95 % intervals: of adaptors over sets (a pair per set, its mean over seeds, "
        "Student's t); the own task is one set: its intervals are over test images and leave out how seeds vary:"
    )
    return f"{said}\n\n{_table(header, rows, 2)}" if rows else ""


def _crossed_tables(found: Record) -> str:
    rows = found["crossed"]["rows"]
    if not rows:
        return ""
    directions = (OWN, TO_QUANTISED, TO_FLOAT)
    lines, gained = [], []
    for scheme, way in dict.fromkeys((row["scheme"], row["compensation"]) for row in rows):
        of = {r["direction"]: r for r in rows if (r["scheme"], r["compensation"]) == (scheme, way)}
        lines.append(
            [scheme.upper(), LABELS[way], *(_spread(of[direction][a]) for a in ADAPTORS for direction in directions)]
        )
        gains = {
            r["direction"]: r for r in found["crossed"]["gains"] if (r["scheme"], r["compensation"]) == (scheme, way)
        }
        if gains:
            cells = [_difference(gains[direction][a]) for a in ADAPTORS for direction in directions]
            gained.append([scheme.upper(), LABELS[way], *cells])
    header = [WIDTH, "compensation", *(f"{a}, {direction}" for a in ADAPTORS for direction in directions)]
    return (
        f"Trained on … to used on …, test accuracy in percent:\n\n{_table(header, lines, 2)}\n\n"
        f"Against the base quantiser in the same direction, in points:\n\n{_table(header, gained, 2)}"
    )


def _cost_table(found: Record) -> str:
    """Parameters, bytes and speed; speed is that of one width, since all run in the same kernel."""
    latency = found["latency"]
    rows = []
    for row in found["cost"]:
        speed = ["–", "–"]
        if latency is not None and row["scheme"] == latency["scheme"]:
            ratios = latency["ratios"][row["method"]]
            speed = [
                f"{latency['images_per_s'][row['method']]:.0f}",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})",
            ]
        rows.append(
            [
                row["scheme"].upper(),
                LABELS[row["method"]],
                f"{row['n_parameters']:,}",
                f"{row['n_folded_parameters']:,}",
                f"{row['n_bytes'] / 1e6:.2f}",
                f"{row['n_bytes'] / row['float_bytes']:.3f}",
                *speed,
            ]
        )
    header = [WIDTH, "compensation", "parameters", "after folding", "MB", "of float32's", "images/s", "of float32's"]
    said = ["Cost of the compensation and of the backbone:"]
    if latency is not None:
        said.append(
            f"(float32: {latency['images_per_s'][FLOAT]:.0f} images/s; batches of {latency['batch_size']}, "
            f"{latency['threads']} threads, kernel {latency['kernel']}; {machine_line(latency['machine'])})"
        )
    return f"{' '.join(said)}\n\n{_table(header, rows, 2)}" if rows else ""


def _geometry_table(found: Record) -> str:
    rows = []
    for row in found["geometries"]:
        taps = row["taps_db"]
        last = [f"{taps[method][-1]:.1f}" for method in METHODS]
        means = [f"{statistics.mean(taps[method]):.1f}" for method in METHODS]
        rows.append([row["model"], row["scheme"].upper(), str(row["n_images"]), *last, *means])
    header = ["random weights", WIDTH, "images", *(f"last tap, {LABELS[m]}" for m in METHODS)]
    header += [f"mean of taps, {LABELS[m]}" for m in METHODS]
    said = "Signal-to-noise ratio in dB, on images that nothing was fitted on:"
    return f"{said}\n\n{_table(header, rows, 2)}" if rows else ""


def draw(found: Record, path: Path) -> None:
    """Points against the float backbone by width and compensation, a panel a task, with deviations of seeds.

    Hollow: adaptors that were trained on float features and are used on quantised ones.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"own": "its own task", **{adaptor: f"{adaptor}, mean of sets" for adaptor in ADAPTORS}}
    schemes = found["budget"]["schemes"]
    floats = [row for row in found["accuracy"] if row["method"] == FLOAT]  # none in a run that has just begun
    level = {key: statistics.mean(row[key]) for row in floats for key in panels}
    moved = [
        {**row, "method": row["compensation"]}
        for row in found["crossed"]["rows"]
        if row["direction"] == TO_QUANTISED and row["compensation"] in METHODS
    ]
    quantised = [row for row in found["accuracy"] if row["method"] != FLOAT]
    shown = ((quantised, True), (moved, False)) if level else ()
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.8), layout="constrained", sharey=True)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for rows, filled in shown:
            for row in (row for row in rows if key in row):
                place = schemes.index(row["scheme"]) + 0.22 * (METHODS.index(row["method"]) - 1)
                points = [value - level[key] for value in row[key]]
                axis.errorbar(
                    place if filled else place + 0.07,
                    statistics.mean(points),
                    statistics.stdev(points) if len(points) > 1 else 0,
                    fmt="o",
                    color=COLOURS[row["method"]],
                    markerfacecolor=COLOURS[row["method"]] if filled else "white",
                    markersize=7,
                    capsize=2,
                    label=LABELS[row["method"]] if filled and row["scheme"] == schemes[0] else None,
                )
        axis.axhline(0, color="#333333", linestyle=":", linewidth=1)
        axis.set_xticks(range(len(schemes)), [scheme.upper() for scheme in schemes])
        axis.set_xlim(-0.5, len(schemes) - 0.5)
        axis.set_title(f"{title} (float32: {level[key]:.1f} %)" if level else title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].errorbar([], [], fmt="o", color="#333333", markerfacecolor="white", label="trained on float features")
    axes[0].set_ylabel("test accuracy, points against float32")
    axes[-1].legend(fontsize=8, frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
