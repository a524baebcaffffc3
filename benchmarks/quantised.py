"""What quantised backbones keep: accuracy without compensation, with QwT and with CWAC, from one resumable command.

    python -m benchmarks.quantised ../shared/data --out quantised-out             # all of it, for docs/quantisation.md
    python -m benchmarks.quantised DATA --out DIR --sets grocery --seeds 1        # a part of it
    python -m benchmarks.quantised DATA --out DIR --table                         # of what is done so far

DATA holds `downstream/*.parquet` and `pretrain/cifar10-jpeg.parquet`. For each width, method and calibration seed the
reference backbone is quantised on images of its own training data, the same for every method; then

1. its own task: CIFAR-10's test split, the float head on the last tap;
2. linear and MIST on features of the downstream sets: learning rates, epochs and all else as in benchmarks.results, the
   same for every backbone; trained on train and val, the last epoch tested once;
3. the joint question: adaptors of float features on quantised ones and the other way round, with CWAC folded in the
   backbone, with stored features compensated, and without.

Larger geometries with random weights have the signal-to-noise ratio of each tap instead. A number is a small file in
OUT/cells: killed and started again, the command goes on where it was.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from benchmarks.quantised_accuracy import CellTask, StoreTask, float_store, run_cell
from benchmarks.quantised_budget import FLOAT, METHODS, Budget, Place
from benchmarks.quantised_cost import SCHEME, measure_latency
from benchmarks.quantised_geometries import GeometryTask, run_geometry
from benchmarks.quantised_tables import collect, draw, markdown
from coldtap.cli.main import guarded
from coldtap.pipeline.images.sources.collection import find_datasets
from coldtap.stores.storage.atomic import write_file
from coldtap.stores.writing.stopping import sigterm_interrupts
from coldtap.workflows.benchmark.processes import in_processes


def cells(place: Place, budget: Budget) -> list[CellTask]:
    """All quantised backbones, seed by seed, so that a run that is cut short has whole comparisons."""
    return [
        CellTask(place=place, budget=budget, scheme=scheme, method=method, seed=seed)
        for seed in budget.seeds
        for scheme in budget.schemes
        for method in METHODS
    ]


def run(place: Place, budget: Budget, *, jobs: int) -> None:
    """Fills every cell that is not there yet; where all are, it computes nothing."""
    floats = [CellTask(place=place, budget=budget, scheme="", method=FLOAT, seed=seed) for seed in budget.seeds]
    geometries = [
        GeometryTask(place=place, budget=budget, model=model, n_images=n_images, scheme=scheme)
        for model, n_images in budget.geometries
        for scheme in budget.schemes
    ]
    floats, quantised = _left(floats), _left(cells(place, budget))
    if floats or quantised:
        _all(float_store, [StoreTask(place=place, dataset=name) for name in budget.sets], jobs)
    _all(run_cell, floats, jobs)
    _all(run_cell, quantised, jobs)
    _all(run_geometry, _left(geometries), jobs)
    shutil.rmtree(place.work(""), ignore_errors=True)  # of a call that died between a cell and its tidying
    if SCHEME in budget.schemes and place.read("latency", budget) is None:
        place.write("latency", budget, measure_latency(place, seed=budget.seeds[0]))


def _left[TaskT: (CellTask, GeometryTask)](tasks: Sequence[TaskT]) -> list[TaskT]:
    return [task for task in tasks if task.place.read(task.cell, task.budget) is None]


def _all[TaskT](work: Callable[[TaskT], str], tasks: Sequence[TaskT], jobs: int) -> None:
    began = time.monotonic()
    with closing(in_processes(work, tasks, jobs=jobs)) as done:
        for number, name in enumerate(done, start=1):
            print(f"[{number}/{len(tasks)}, {(time.monotonic() - began) / 60:.1f} min] {name}", flush=True)


def report(place: Place, budget: Budget) -> str:
    """Writes what is done as data, table and picture; returns the table."""
    found = collect(place, budget)
    text = markdown(found)
    write_file(place.out / "quantised.json", [json.dumps(found, indent=1).encode()])
    write_file(place.out / "quantised.md", [text.encode()])
    draw(found, place.out / "quantised.png")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with downstream/ and pretrain/")
    parser.add_argument("--out", type=Path, default=Path("results-out/quantised"))
    parser.add_argument("--sets", default="", help="names with commas; all by default")
    parser.add_argument("--schemes", default=",".join(Budget.schemes))
    parser.add_argument("--seeds", type=int, default=len(Budget.seeds))
    parser.add_argument("--epochs", type=int, default=Budget.epochs)
    parser.add_argument("--images", type=int, default=Budget.images, help="of the calibration")
    parser.add_argument("--no-geometries", action="store_true", help="leave larger geometries out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", action="store_true", help="compute nothing: the tables of what is done so far")
    asked = parser.parse_args(arguments)
    place = Place(data=asked.data, out=asked.out)
    budget = Budget(
        sets=tuple(find_datasets(asked.data / "downstream", asked.sets.split(",") if asked.sets else ())),
        schemes=tuple(asked.schemes.split(",")),
        seeds=tuple(range(asked.seeds)),
        epochs=asked.epochs,
        images=asked.images,
        geometries=() if asked.no_geometries else Budget.geometries,
    )
    print(f"budget: {json.dumps(budget.to_dict())}", flush=True)
    if not asked.table:
        with sigterm_interrupts():
            run(place, budget, jobs=asked.jobs)
    print(f"\n{report(place, budget)}\nalso in {place.out}: quantised.md, quantised.json and quantised.png")


if __name__ == "__main__":
    guarded(main)()
