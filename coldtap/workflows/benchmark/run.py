"""A benchmark from its images to its table: every dataset is cached once, then every adaptor trained on each.

    OUT/benchmark.json           the rules that all calls share
    OUT/stores/NAME              the features of a dataset, of the gathers that its adaptors read
    OUT/runs/NAME/ADAPTOR        its trials and run folders
    OUT/table.txt, .csv, .html   as far as cells are done

A cell that fails says why in the table and the others go on. Called again, all that is done is read.
"""

import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldtap.adaptors.results import DEVIATIONS, ResultTable, Score, table_csv, table_html, table_text
from coldtap.errors import ColdtapError, InterruptedRunError, ModelError, OptionError
from coldtap.stores.format.gathers import GATHERS
from coldtap.stores.reading.recipe_file import read_recipe
from coldtap.stores.storage.atomic import machine_errors, write_file
from coldtap.text import show_seconds
from coldtap.workflows.benchmark.cell import CellTask, Done, Rules, failed_cell, train_cell
from coldtap.workflows.benchmark.contenders import Contender
from coldtap.workflows.benchmark.display import Display, NoDisplay
from coldtap.workflows.benchmark.processes import in_processes
from coldtap.workflows.benchmark.rules import settled_rules, write_rules

if TYPE_CHECKING:
    from coldtap.pipeline.cache_report import CacheReport

RULES_OF = {
    "vtab": "Protocol vtab: every setting learns from train, val chooses after the last epoch, and the chosen setting "
    "learns anew from train and val with every seed; test is read once.",
    "val": "Protocol val: every setting with every seed learns from train, the best mean score on val chooses, and its "
    "trials are tested.",
}

type Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is compared, on what, and how.

    Attributes:
        datasets: Sources of images by name.
        contenders: The adaptors with their settings.
        rules: What holds for every cell.
        caching: Keyword arguments of `cache_features`; the gathers follow from the adaptors.
        out: Folder of stores, runs and tables.

    Raises:
        OptionError: Patience with protocol vtab.
    """

    datasets: Mapping[str, Path]
    contenders: Sequence[Contender]
    rules: Rules
    caching: Mapping[str, Any]
    out: Path

    def __post_init__(self) -> None:
        trials = [trial for contender in self.contenders for trial in contender.trials]
        patient = self.rules.training.patience is not None or any("patience" in trial for trial in trials)
        if self.rules.protocol == "vtab" and patient:
            raise OptionError(
                "`protocol='vtab'` keeps the last epoch, since its refit has no val to stop by: leave patience out, or "
                "use `protocol='val'`"
            )

    def store(self, dataset: str) -> Path:
        """Return where the features of a dataset are kept."""
        return self.out / "stores" / dataset

    def budget(self) -> list[str]:
        """Says how much is trained, a sentence each."""
        rules = self.rules
        n_trainings = len(self.datasets) * sum(map(rules.trainings, self.contenders))
        return [
            f"{len(self.datasets)} datasets × {len(self.contenders)} adaptors, protocol {rules.protocol}: "
            f"{n_trainings} trainings of {rules.training.epochs} epochs, {rules.seeds} seeds",
            *map(str, self.contenders),
        ]

    def table(self, done: Sequence[Done]) -> ResultTable:
        """Returns the table as far as it is done."""
        rules, training = self.rules, self.rules.training
        return ResultTable(
            title=f"{len(self.contenders)} adaptors on {len(self.datasets)} datasets",
            about=(
                RULES_OF[rules.protocol],
                f"Backbone {self.caching.get('checkpoint') or self.caching['model']}, features in "
                f"{self.caching.get('tier', 'float16')}; {rules.seeds} seeds, {training.epochs} epochs, batches of "
                f"{training.batch_size}, weight decay {training.weight_decay:g}.",
                DEVIATIONS,
                *(f"Settings of {contender}." for contender in self.contenders),
            ),
            datasets=tuple(self.datasets),
            adaptors=tuple(contender.adaptor for contender in self.contenders),
            cells=tuple(one.cell for one in done),
        )


def run_benchmark(
    benchmark: Benchmark, *, jobs: int = 1, tell: Tell | None = None, display: Display | None = None
) -> tuple[ResultTable, int]:
    """Does what is left of a benchmark; returns its table, and the exit code of the first error, else 0.

    Args:
        benchmark: What to do.
        jobs: Cells at a time, each in a process with its share of the cores; 1 trains in this process.
        tell: Told how far it is, a line each; stderr by default.
        display: Shows what takes long.

    Raises:
        RunError: The folder holds a benchmark of other rules; nothing has changed.
        OptionError: An option of caching has a value that cannot be used.
        ModelError: The backbone or its checkpoint cannot be used.
        MachineError: The folder cannot be written, or a process has died.
        InterruptedRunError: Ctrl-C or SIGTERM; what was done is kept.
    """
    tell, display = tell or _to_stderr, display or NoDisplay()
    rules = settled_rules(benchmark)
    done = list(_cache_all(benchmark, rules, tell, display))
    lacking = {one.cell.dataset for one in done}
    tasks = [
        CellTask(
            dataset=dataset,
            contender=contender,
            store=benchmark.store(dataset),
            out=benchmark.out / "runs" / dataset / contender.adaptor.replace(":", "."),
            rules=benchmark.rules,
        )
        for dataset in benchmark.datasets
        if dataset not in lacking
        for contender in benchmark.contenders
    ]
    clock = _Clock(tasks, n_failed=len(done), jobs=jobs)
    write_tables(benchmark.out, benchmark.table(done))
    with closing(_train_all(tasks, clock, jobs, display)) as cells:
        for one in cells:
            done.append(one)
            tell(clock.finish(one))
            write_tables(benchmark.out, benchmark.table(done))
    return benchmark.table(done), next((one.exit_code for one in done if one.exit_code), 0)


def write_tables(out: Path, table: ResultTable) -> None:
    """Writes a table as text, CSV and HTML.

    Raises:
        MachineError: The disk is full, read-only or refuses.
    """
    with machine_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, text in (("txt", table_text(table)), ("csv", table_csv(table)), ("html", table_html(table))):
        write_file(out / f"table.{name}", [text.encode()])


def cache_dataset(
    benchmark: Benchmark, dataset: str, *, dry_run: bool = False, display: Display | None = None
) -> "CacheReport":
    """Caches a dataset, or forecasts it: the gathers that its adaptors read, or those that its store has.

    Raises:
        ColdtapError: As `cache_features` does.
    """
    from coldtap.pipeline.job import cache_features

    def cache(gathers: Sequence[str]) -> "CacheReport":
        with (display or NoDisplay()).caching() as progress:
            return cache_features(
                benchmark.datasets[dataset],
                benchmark.store(dataset),
                **benchmark.caching,
                gather=gathers,
                dry_run=dry_run,
                reporter=progress,
            )

    found = read_recipe(benchmark.store(dataset))
    if found is not None:
        return cache(list(found[0].encoding.gathers))
    needed = {gather for contender in benchmark.contenders for gather in contender.gathers}
    try:
        return cache([gather for gather in GATHERS if gather in needed])
    except OptionError:
        # A stage network has no sum: the cells that need it say so. Whatever else is wrong is so without it too.
        if "sum" not in needed or needed == {"sum"}:
            raise
        return cache([gather for gather in GATHERS if gather in needed - {"sum"}])


def _cache_all(benchmark: Benchmark, rules: bytes, tell: Tell, display: Display) -> Iterator[Done]:
    """Caches every dataset; yields the cells of those that cannot be cached.

    The rules are written with the first store: a call that was wrong in all of them leaves nothing to go by.
    """
    for number, dataset in enumerate(benchmark.datasets, start=1):
        place = f"[store {number}/{len(benchmark.datasets)}] {dataset}"
        try:
            report = cache_dataset(benchmark, dataset, display=display)
        except (InterruptedRunError, OptionError, ModelError):  # what is asked is wrong for all of them
            raise
        except ColdtapError as error:
            tell(f"{place}: {error}")
            yield from (failed_cell(dataset, contender.adaptor, error) for contender in benchmark.contenders)
        else:
            write_rules(benchmark, rules)
            tell(f"{place}: {report.n_rows} rows, {report.status}")


def _train_all(tasks: Sequence[CellTask], clock: "_Clock", jobs: int, display: Display) -> Generator[Done]:
    if jobs > 1:
        # The longest first, so that no process idles at the end.
        yield from in_processes(train_cell, sorted(tasks, key=clock.size, reverse=True), jobs=jobs)
        return
    with display.training() as epochs:
        for task in tasks:
            epochs.title = f"{task.dataset} {task.adaptor}: "
            yield train_cell(task, epochs)


class _Clock:
    """Says how many cells are done, and how long the rest will take.

    The time of a cell is forecast from those of its adaptor that are done, in proportion to what they read, or from all
    where there is none of its own.
    """

    def __init__(self, tasks: Sequence[CellTask], *, n_failed: int, jobs: int) -> None:
        self._sizes = {(task.dataset, task.adaptor): task.numbers_read() for task in tasks}
        self._left = dict(self._sizes)
        self._seconds: dict[tuple[str, str], float] = {}
        self._n_before, self._jobs, self._began = n_failed, jobs, time.monotonic()

    def size(self, task: CellTask) -> int:
        """Return what a cell reads."""
        return self._sizes[task.dataset, task.adaptor]

    def finish(self, done: Done) -> str:
        """Counts a cell; returns a line on it."""
        cell = done.cell
        self._left.pop((cell.dataset, cell.adaptor))
        if cell.failure is None:
            self._seconds[cell.dataset, cell.adaptor] = cell.seconds
            outcome = f"{cell.chosen} chosen with val {cell.metric} {100 * Score.of(cell.val).mean:.1f}"
        else:
            outcome = cell.failure
        n_all = self._n_before + len(self._sizes)
        spent = show_seconds(time.monotonic() - self._began)
        left = f", about {show_seconds(self._forecast())} left" if self._left and self._seconds else ""
        return f"[cell {n_all - len(self._left)}/{n_all}, {spent}{left}] {cell.dataset} {cell.adaptor}: {outcome}"

    def _forecast(self) -> float:
        return sum(self._rate(adaptor) * size for (_, adaptor), size in self._left.items()) / self._jobs

    def _rate(self, adaptor: str) -> float:
        """Seconds a number read."""
        keys = [key for key in self._seconds if key[1] == adaptor] or list(self._seconds)
        return sum(self._seconds[key] for key in keys) / max(1, sum(self._sizes[key] for key in keys))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
