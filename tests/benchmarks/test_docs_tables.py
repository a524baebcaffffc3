"""The tables of docs/ hold what their JSON gives, and every interval follows the one rule."""

import itertools
import json
import statistics

import pytest
from scipy import stats

from benchmarks.docs_tables import DOCS, docs_tables, load
from benchmarks.intervals import T_95, over_sets, paired
from benchmarks.precision import PAIR, SEEDS, pair, pair_table, trial
from benchmarks.results import difference, read_results

TABLES = {f"{page} {source}": (page, lines) for page, source, lines in docs_tables()}


def blocks(text):
    """The tables of a text, each a list of its rows."""
    grouped = itertools.groupby(text.splitlines(), key=lambda line: line.startswith("|"))
    return [[*lines] for is_table, lines in grouped if is_table]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_docs_is_what_its_json_gives(name):
    page, lines = TABLES[name]
    printed = blocks((DOCS / page).read_text())
    assert blocks(lines)
    assert [block for block in blocks(lines) if block not in printed] == []


def test_every_json_of_docs_has_a_table_and_is_named_on_a_page():
    assert {path.name for path in DOCS.glob("*.json")} == {name.split()[1] for name in TABLES}
    pages = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert all(f"({path.name})" in pages for path in DOCS.glob("*.json"))


def test_the_interval_over_sets_is_students():
    values = [0.3, -1.2, 2.5, 0.4, 1.1]
    found = over_sets(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.interval == pytest.approx(expected, abs=1e-3)
    assert found.mean == pytest.approx(statistics.mean(values))
    exact = [stats.t.ppf(0.975, degrees) for degrees in range(1, len(T_95) + 1)]
    assert exact == pytest.approx(T_95, abs=5.1e-4)
    assert over_sets([1.0]).interval is None
    assert str(over_sets([1.0])) == "+1.00"


def test_a_pair_is_a_set_whatever_the_number_of_its_seeds():
    left = {"a": [1.0, 3.0], "b": [5.0, 5.0, 5.0]}
    right = {"a": [1.0], "b": [1.0]}
    found = paired(left, right)
    assert (found.mean, found.n) == (2.5, 2)
    assert found.interval == pytest.approx((2.5 - 12.706 * 1.5, 2.5 + 12.706 * 1.5))


def test_precision_pairs_sets_and_keeps_every_score(tmp_path):
    def score(name, kept, seed):
        return 50 + seed + (kept is PAIR[1]) * (1 if name == "a" else -2)

    names = ("a", "b")
    scores = {
        trial(tmp_path, name, kept, "mist", seed): {"test": score(name, kept, seed)}
        for name in names
        for kept in PAIR
        for seed in (0, 1)
    }
    found = pair(scores, tmp_path, names, "mist")
    assert (found["seeds"], found["difference"], found["pairs"]) == (2, -0.5, 2)
    assert found["interval"] == pytest.approx([-0.5 - 12.706 * 1.5, -0.5 + 12.706 * 1.5])
    assert found["by_set"] == {"a": 1, "b": -2}
    assert found["tests"] == {"float32": {"a": [50, 51], "b": [50, 51]}, "int8-30dB": {"a": [51, 52], "b": [48, 49]}}
    assert "| mist | 2 | 50.50 | 50.00 | -0.50 |" in pair_table([found])


@pytest.mark.parametrize("number", [0, 1])
def test_precisions_intervals_are_those_of_its_sets(number):
    kept = load("precision.json")["pairs"][number]
    found = over_sets([*kept["by_set"].values()])
    assert kept["seeds"] == len(SEEDS)
    assert kept["difference"] == pytest.approx(found.mean)
    assert kept["difference"] == pytest.approx(kept["int8"] - kept["float32"])
    assert kept["interval"] == pytest.approx(found.interval)


def test_the_intervals_of_quantised_adaptors_are_those_of_their_sets():
    kept = load("quantised.json")
    by_set = {(row["scheme"], row["method"]): row["by_set"] for row in kept["accuracy"]}
    n_compared = 0
    for row in kept["differences"]:
        left, right = (
            by_set[row["scheme"], row["left"]],
            by_set["" if row["right"] == "float" else row["scheme"], row["right"]],
        )
        for name, adaptors in {"linear": ["linear"], "mist": ["mist"], "both": ["linear", "mist"]}.items():
            differences = [statistics.mean(left[s][a] - right[s][a] for a in adaptors) for s in left]
            found = over_sets(differences)
            assert row[name]["difference"] == pytest.approx(found.mean, abs=1e-9)
            assert row[name]["interval"] == pytest.approx(found.interval, abs=1e-9)
            n_compared += 1
    assert n_compared == 54
    for row in kept["accuracy"]:
        for adaptor in ("linear", "mist"):
            means = [statistics.mean(of[adaptor] for of in row["by_set"].values()), statistics.mean(row[adaptor])]
            assert means[0] == pytest.approx(means[1])


def test_intervals_in_the_text_are_those_of_the_tables():
    table = read_results(DOCS / "results.json")
    against = {name: difference(table, name, "lora") for name in ("last", "mist", "linear")}
    cwac, none = (
        next(row["both"] for row in load("quantised.json")["differences"] if row_key(row) == key)
        for key in (("w4a4", "cwac", "none"), ("w8a8", "none", "float"))
    )
    int8 = load("precision.json")["pairs"][0]["interval"]
    readme, results, quantised = (plain(DOCS / page) for page in ("../README.md", "results.md", "quantisation.md"))
    assert f"| {against['last']} | – | {against['mist']} | {against['linear']} |" in readme
    assert f"{cwac['difference']:+.2f} points ({span(cwac['interval'])})" in readme
    assert f"({none['difference']:+.2f} points, {span(none['interval'])} over five sets)" in readme
    assert f"{against['last'].span}, and one set" in results
    assert f"five sets leave {span(int8)}" in results
    assert f"CWAC brings {cwac['difference']:+.2f} points ({span(cwac['interval'])})" in quantised


def test_no_interval_of_the_results_orders_two_columns():
    table = read_results(DOCS / "results.json")
    found = [difference(table, *pair).interval for pair in itertools.combinations(table.adaptors, 2)]
    assert len(found) == 28
    assert all(low < 0 < high for low, high in found)


def row_key(row):
    return row["scheme"], row["left"], row["right"]


def span(interval):
    return " … ".join(f"{end:+.2f}" for end in interval)


def plain(path):
    """Text with its lines joined and its minus signs as Python prints them."""
    return " ".join(path.read_text().split()).replace("−", "-")


def test_first_results_are_kept_by_set_and_seed():
    cells = json.loads((DOCS / "results-first.json").read_text())
    assert len(cells) == 15
    assert all(len(cell["test"]) == 3 for cell in cells)
