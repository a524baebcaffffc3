"""The report: what it says is what the runs say, it asks nothing of anybody, and a real browser shows it well."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright

from coldtap.adaptors import read_run, train_adaptor
from coldtap.adaptors.metrics.metrics import TrialRows
from coldtap.adaptors.report import Thumbnails, read_report, render_page, wanted_images
from coldtap.adaptors.report.costs import choose_split
from coldtap.adaptors.report.matrix import confused_pairs, draw_matrix
from coldtap.adaptors.report.numbers import show_bytes, show_count, show_percent, show_seconds
from coldtap.adaptors.report.outcome import many_labels, single_label, token_classes
from coldtap.adaptors.report.page import MAX_IMAGE_BYTES, MAX_SECTIONS
from coldtap.adaptors.report.refits import refit_of_best, refits_of
from coldtap.adaptors.report.svg import fit_axis
from coldtap.adaptors.report.tables import best_setting, differing_settings
from coldtap.adaptors.runs.predictions import read_predictions
from coldtap.adaptors.runs.record import Failure
from coldtap.adaptors.runs.run_folder import read_epochs, write_failure
from coldtap.adaptors.training.grid import expand_grid
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.adaptors.training.protocol import run_protocol
from coldtap.adaptors.training.trials import train_trials
from coldtap.errors import RunError
from coldtap.stores import open_store
from coldtap.stores.editing.add_targets import add_targets
from tests.helpers.jobs import cache, coldtap, error_line
from tests.helpers.pictures import encoded, picture, write_pictures
from tests.helpers.synthetic import three_directions

HOSTILE = "<script>alert(1)"
CLASSES = (HOSTILE, 'bee & "wasp"', "cat")
SIZES = {"train": 6, "val": 4, "test": 8}
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
NO_IMAGES = Thumbnails(images={}, note=None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of noise: nothing to learn, so mistakes are sure."""
    folder = tmp_path_factory.mktemp("pictures") / "images"
    write_pictures(
        folder, *(f"{split}/{name}/{i}.png" for split, n in SIZES.items() for name in CLASSES for i in range(n))
    )
    return folder


@pytest.fixture(scope="module")
def store(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "noise"
    cache(pictures, path)
    return path


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    """A grid with a trial that diverges, and a run of another adaptor."""
    folder = tmp_path_factory.mktemp("runs")
    training = TrainingOptions(epochs=3, batch_size=6)
    grid = expand_grid({"lr": [1e-3, 1e-2, 1e30]})
    train_trials(store, "linear", grid, out=folder / "linear", seeds=2, training=training, device="cpu")
    train_adaptor(store, "mist", out=folder / "mist", epochs=2, settings={"rank": 2}, device="cpu")
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A run folder of its own, to be damaged."""
    return Path(shutil.copytree(runs / "mist", tmp_path / "mist"))


def write(*runs, out, **options):
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = coldtap("report", *runs, "--out", out, *arguments)
    assert result.exit_code == 0, result.stderr
    return out.read_text(encoding="utf-8")


def page_of(*folders):
    report = read_report(folders)
    return render_page(report, [NO_IMAGES for _ in report.stores])


class _Tags(HTMLParser):
    """Every start tag with its attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


def test_the_page_asks_nothing_of_anybody_and_escapes_what_files_say(runs, tmp_path):
    page = write(runs, out=tmp_path / "report.html")
    tags = _Tags(page)
    assert tags.all("script") == []
    assert HOSTILE in tags.text
    assert 'bee & "wasp"' in tags.text
    links = [
        attributes[name] for _, attributes in tags.tags for name in ("src", "href", "srcset") if name in attributes
    ]
    assert links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert "url(" not in page
    assert "@import" not in page
    assert not [attributes for _, attributes in tags.tags if any(name.startswith("on") for name in attributes)]
    assert not [attributes for _, attributes in tags.tags if "style" in attributes]
    policy = next(meta["content"] for meta in tags.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    style = page.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")


def test_every_link_in_the_page_leads_somewhere_and_tables_have_headers(runs, tmp_path):
    tags = _Tags(write(runs, out=tmp_path / "report.html"))
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] for _, attributes in tags.tags if "href" in attributes]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert all(header.get("scope") in ("col", "row") for header in tags.all("th"))
    assert all(image.get("alt") for image in tags.all("img"))
    shown = [svg for svg in tags.all("svg") if "aria-hidden" not in svg]
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in shown)
    levels = [int(tag[1]) for tag, _ in tags.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_same_runs_give_the_same_page(runs, tmp_path):
    assert write(runs, out=tmp_path / "a.html") == write(runs, out=tmp_path / "b.html")


def test_classes_pairs_and_mistakes_are_those_of_the_predictions(runs):
    run = next(run for run in read_report([runs]).runs if run.adaptor == "mist")
    outcome, said = run.outcome, read_predictions(runs / "mist").split("test")
    targets, predicted = said.rows.targets, said.rows.predicted
    assert outcome.split == "test"
    assert outcome.n_wrong == (targets != predicted).sum() > 0
    for number, score in enumerate(outcome.classes):
        assert score.n == SIZES["test"] == (targets == number).sum()
        assert score.score == pytest.approx((predicted[targets == number] == number).mean())
    assert sum(score.score * score.n for score in outcome.classes) == pytest.approx(run.splits["test"].score * 24)
    assert sum(pair.n for pair in confused_pairs(outcome)) == outcome.n_wrong
    assert outcome.confusion.counts.sum() == 24
    worst = np.flatnonzero(targets != predicted)[np.argmax(said.rows.losses[targets != predicted])]
    first = outcome.mistakes[0]
    assert first.sample_id == said.ids[worst]
    assert first.truth == sorted(CLASSES)[targets[worst]]
    assert first.answer.startswith(f"taken for {sorted(CLASSES)[predicted[worst]]} (")
    assert [mistake.loss for mistake in outcome.mistakes] == sorted((m.loss for m in outcome.mistakes), reverse=True)


def test_runs_are_grouped_by_setting_and_the_best_on_val_comes_first(runs):
    report = read_report([runs])
    (store,) = report.stores
    assert len(store.runs) == 5
    means = {}
    for run in store.runs:
        means.setdefault((run.adaptor, run.settings["lr"]), []).append(run.val)
    order = [np.mean(scores) for scores in means.values()]
    assert order == sorted(order, reverse=True)
    text = _Tags(page_of(runs)).text
    best = next(iter(means))
    assert f"Best on val: {best[0]} (" in text
    differing = differing_settings(store.runs)
    assert {frozenset(found) for run, found in zip(store.runs, differing, strict=True) if run.adaptor == "linear"} == {
        frozenset({"epochs", "lr", "batch_size", "seed"})
    }


def test_trials_that_failed_or_are_not_finished_are_listed_with_their_reason(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    begun = tmp_path / "runs" / "begun"
    begun.mkdir()
    (begun / "checkpoint.safetensors").touch()
    broken = Path(shutil.copytree(runs / "mist", tmp_path / "runs" / "broken"))
    (broken / "run.json").write_text("{")
    report = read_report([tmp_path / "runs"])
    assert [one.folder for one in report.unfinished] == [
        "begun",
        "broken",
        "linear/lr=1e+30,seed=0",
        "linear/lr=1e+30,seed=1",
    ]
    reasons = [one.reason for one in report.unfinished]
    assert "run the same command again" in reasons[0]
    assert "run.json is damaged" in reasons[1]
    assert "loss is" in reasons[2]
    assert "lr=1e+30" in report.unfinished[2].settings
    assert all(reason in _Tags(page_of(tmp_path / "runs")).text for reason in reasons)


@pytest.fixture(scope="module")
def protocol(store, tmp_path_factory):
    """A search of two settings with one seed, and a refit of the chosen one with two; and what came of it."""
    out = tmp_path_factory.mktemp("protocol") / "vtab"
    grid = expand_grid({"rank": [1, 2]})
    training = TrainingOptions(epochs=2, batch_size=6)
    result = run_protocol(store, "mist", grid, protocol="vtab", out=out, seeds=2, training=training, device="cpu")
    return out, result


def test_of_a_protocol_the_search_is_drawn_on_val_and_the_refit_of_its_choice_is_named(protocol):
    out, result = protocol
    page = page_of(out)
    text = " ".join(_Tags(page).text.replace("\xa0", " ").split())
    chosen, mean, deviation = result.setting["rank"], np.mean(result.test), np.std(result.test, ddof=1)
    said = f"{100 * mean:.1f} ± {100 * deviation:.1f} %"
    assert f"Best on val: mist (rank={chosen}) with {100 * result.val[0]:.1f} %. " in text
    assert f"Refitted on train and val, it reaches {said} on test (mean and standard deviation of 2 seeds)." in text
    assert "2 runs: score on val against trainable parameters" in page
    assert "no split in common" not in text
    runs_table, refits_table = page.split('<table class="runs">')[1:]
    assert runs_table.split("</table>")[0].count('-row"') == 2
    (row,) = re.findall(r"<tr class=.*?</tr>", refits_table)
    assert said in row.replace("\xa0", " ")
    assert f"rank={chosen}" in row
    anchor = re.search(r'<a href="#(run-\d+)">[^<]*%</a>', row).group(1)
    assert f'id="{anchor}-row" class="best"' in runs_table
    assert f'id="{anchor}">' in page


def test_links_of_a_protocol_lead_somewhere(protocol):
    tags = _Tags(page_of(protocol[0]))
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {of["href"].removeprefix("#") for _, of in tags.tags if "href" in of} <= set(ids)


def test_refits_without_their_search_are_named_and_none_is_chosen_on_test(protocol):
    out, _ = protocol
    text = " ".join(_Tags(page_of(out / "refit")).text.split())
    assert "Best on val" not in text
    assert "Refitted on train and val, mist reaches" in text
    assert "not among these runs" in text
    (store,) = read_report([out / "refit"]).stores
    other = [
        dataclasses.replace(run, folder=f"{run.folder}x", settings={**run.settings, "lr": 1.0}) for run in store.runs
    ]
    assert refit_of_best([], refits_of([*store.runs, *other])) is None


def test_a_setting_of_which_a_seed_failed_is_not_the_best(protocol, tmp_path):
    copy = Path(shutil.copytree(protocol[0], tmp_path / "vtab"))
    first = read_report([copy]).runs[0]
    settings = read_run(Path(first.folder)).settings
    failed = dataclasses.replace(settings, seed=7)
    write_failure(copy / "search" / "seed=7", Failure(settings=failed, reason="the loss is nan", seconds=1.0))
    (store,) = read_report([copy]).stores
    assert [run.failed_seeds for run in store.runs if not run.is_refit] == [(), (7,)]
    assert first.name in [run.name for run in store.runs if run.failed_seeds]
    assert best_setting(store.runs)[0].name == store.runs[0].name != first.name
    text = _Tags(page_of(copy)).text
    assert f"Best on val: mist (rank={store.runs[0].options['rank']})" in text
    assert "not to be chosen: seed 7 failed" in text
    assert "it reaches" not in text  # the refit is of the other setting


def test_no_setting_is_best_where_each_has_a_failed_seed(runs):
    failed = [dataclasses.replace(run, failed_seeds=(3,)) for run in read_report([runs]).runs]
    assert best_setting(failed) == ()


def test_seconds_are_this_trials_share(runs):
    (found,) = read_report([runs / "linear" / "lr=0.01,seed=0"]).runs
    info = read_run(Path(found.folder))
    assert found.n_sharing == info.trials > 1
    assert found.seconds == info.seconds > 0


@pytest.mark.parametrize("line", ["1,0.1,,0.5,0.5,1.0", "1,0.1,0.5", "x,0.1,0.5,0.5,0.5,1.0"])
def test_a_damaged_table_of_epochs_is_refused(run, line):
    (run / "epochs.csv").write_text(f"epoch,lr,train_loss,val_loss,val_score,seconds\n{line}\n")
    with pytest.raises(RunError, match=r"epochs\.csv cannot be read"):
        read_epochs(run)


def test_trials_under_way_do_not_hide_those_that_are_finished(runs, tmp_path):
    shutil.copytree(runs / "linear", tmp_path / "linear")
    (tmp_path / "linear" / "checkpoint.safetensors").touch()
    report = read_report([tmp_path / "linear"])
    assert len(report.runs) == 4
    assert len(report.unfinished) == 3


def words_of(command):
    """The words that a shell makes of a command."""
    script = f'words() {{ printf "%s\\0" "$@"; }}; words {command}'
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def test_the_command_trains_the_same_again(runs):
    (report,) = read_report([runs / "mist"]).runs
    words = words_of(report.command)
    again = Path(words[words.index("--out") + 1])
    result = coldtap(*words)
    assert result.exit_code == 0, result.stderr
    assert read_run(again).adaptor_sha256 == read_run(runs / "mist").adaptor_sha256
    shutil.rmtree(again)


def test_the_command_of_a_run_that_learnt_from_val_trains_the_same_again(store, tmp_path):
    options = {"epochs": 2, "fit": "train+val", "keep": "last", "settings": {"rank": 2}, "device": "cpu"}
    first = train_adaptor(store, "mist", out=tmp_path / "it's a run", **options)
    (report,) = read_report([tmp_path / "it's a run"]).runs
    python, flag, code = words_of(report.command)
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert read_run(tmp_path / "it's a run-again").adaptor_sha256 == first.info.adaptor_sha256
    text = _Tags(page_of(tmp_path / "it's a run")).text
    assert "there is no score on it" in text


def images_of(page):
    return _Tags(page).all("img")


def test_images_of_the_worst_mistakes_are_small_jpegs_in_the_page(runs, tmp_path):
    images = images_of(write(runs / "mist", out=tmp_path / "report.html"))
    (store,) = read_report([runs / "mist"]).stores
    assert len(images) == len(wanted_images(store)) > 0
    for image in images:
        assert base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))[:3] == b"\xff\xd8\xff"


def test_no_images_where_they_are_not_wanted(runs, tmp_path):
    result = coldtap("report", runs / "mist", "--out", tmp_path / "a.html", "--no-images")
    page = (tmp_path / "a.html").read_text()
    assert result.exit_code == 0
    assert images_of(page) == []
    assert "Images were left out, as asked." in page


def test_a_source_that_moved_is_said_and_found_by_its_new_place(pictures, tmp_path):
    old = Path(shutil.copytree(pictures, tmp_path / "old"))
    cache(old, tmp_path / "store")
    train_adaptor(tmp_path / "store", "linear", out=tmp_path / "run", epochs=1, device="cpu")
    new = old.rename(tmp_path / "new")
    page = write(tmp_path / "run", out=tmp_path / "a.html")
    assert images_of(page) == []
    assert f"There are no images: {old}: no such file or folder (--source names another place)." in _Tags(page).text
    page = write(tmp_path / "run", out=tmp_path / "b.html", source=new)
    shown = images_of(page)
    assert shown
    changed, gone = [new / image["alt"].split("Sample ")[1].split(".png")[0] for image in shown[:2]]
    changed.with_suffix(".png").write_bytes(encoded(picture(999)))
    gone.with_suffix(".png").unlink()
    page = write(tmp_path / "run", out=tmp_path / "c.html", source=new)
    assert len(images_of(page)) == len(shown) - 2
    assert f"2 of {len(shown)} images are missing at {new}, broken, or no longer what was cached." in _Tags(page).text


def test_a_store_that_is_gone_costs_the_images_and_nothing_else(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["store"] = str(tmp_path / "nowhere")
    (run / "run.json").write_text(json.dumps(record))
    page = write(run, out=tmp_path / "report.html")
    assert images_of(page) == []
    text = _Tags(page).text
    assert f"there is no store at {tmp_path / 'nowhere'}" in text
    assert "What is taken for what" in text


def test_another_store_in_its_place_is_not_taken_for_it(run, tmp_path, store):
    record = json.loads((run / "run.json").read_text())
    record["settings"]["store_digest"] = "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    assert f"the store at {store} is another one now" in _Tags(write(run, out=tmp_path / "report.html")).text


def test_missing_tables_cost_what_they_say_and_nothing_else(run, tmp_path):
    (run / "predictions.parquet").unlink()
    (run / "epochs.csv").write_text("epoch\nnone\n")
    text = _Tags(write(run, out=tmp_path / "report.html")).text
    assert "The run folder has no predictions" in text
    assert "epochs.csv, is missing or damaged: there are no curves" in text
    assert "train-adaptor" in text


def test_damaged_predictions_are_said(run, tmp_path):
    (run / "predictions.parquet").write_bytes(b"PAR1")
    text = _Tags(write(run, out=tmp_path / "report.html")).text
    assert re.search(r"nothing to say of single classes and samples: .*predictions\.parquet", text)


def test_a_run_of_an_earlier_format_is_shown(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    for name in ("target_kind", "metric", "trials", "seconds", "bytes_per_sample"):
        record.pop(name, None)
    for name in ("order_seed", "target", "label_smoothing", "patience", "fit", "keep"):
        record["settings"].pop(name)
    record["format"] = 2
    record["metrics"] = {
        split: {"top1": of["score"], "loss": of["loss"], "n_samples": of["n_samples"]}
        for split, of in record["metrics"].items()
    }
    (run / "run.json").write_text(json.dumps(record))
    (run / "predictions.parquet").unlink()
    table = (run / "epochs.csv").read_text()
    (run / "epochs.csv").write_text(table.replace("val_score", "val_top1"))
    (found,) = read_report([run]).runs
    assert found.epochs[0].val_score is not None
    assert found.bytes_per_sample is None
    assert found.seconds == pytest.approx(sum(record.seconds for record in read_epochs(run)))
    assert "kept: epoch" in page_of(run)


def test_runs_on_other_stores_and_targets_are_apart(runs, tmp_path):
    path = three_directions(tmp_path / "toy", class_names=["ant", "bee", "cat"])
    opened = open_store(path)
    rows = np.concatenate([opened.rows(split) for split in ("train", "val", "test")])
    ids = opened.sample_ids(rows)
    classes = opened.targets(rows)
    maps = {i: np.full((2, 3), -1 if n % 5 == 0 else c) for n, (i, c) in enumerate(zip(ids, classes, strict=True))}
    labels = {
        i: [c] if n % 3 else [0, c][: 1 + (c > 0)] for n, (i, c) in enumerate(zip(ids, classes.tolist(), strict=True))
    }
    add_targets(path, "things", labels, kind="labels", class_names=["ant", "bee", "cat"])
    add_targets(path, "map", maps, kind="token-class", class_names=["ant", "bee", "cat"])
    for target, adaptor in (("things", "linear"), ("map", "mist")):
        train_adaptor(path, adaptor, out=tmp_path / "runs" / target, epochs=3, target=target, lr=1e-2, device="cpu")
    report = read_report([tmp_path / "runs", runs / "mist"])
    assert [store.target for store in report.stores] == ["map", "things", "label"]
    for store in report.stores[:2]:
        (run,) = store.runs
        scores = [score.score for score in run.outcome.classes if score.score is not None]
        assert np.mean(scores) == pytest.approx(run.splits["test"].score, abs=1e-6)  # mIoU, mAP
    text = _Tags(page_of(tmp_path / "runs", runs / "mist")).text
    assert "3 runs on 3 stores" in text
    for words in ("toy, map", "toy, things", "average precision", "IoU", "Mean IoU on val"):
        assert words in text


def rows_of(targets, predicted=None, probability=None):
    return TrialRows(
        losses=np.arange(len(targets), dtype=np.float32),
        targets=np.array(targets),
        predicted=None if predicted is None else np.array(predicted),
        probability=None if probability is None else np.array(probability, np.float32),
    )


def test_several_labels_a_sample_by_hand():
    rows = rows_of(
        [[True, False, False], [True, True, False], [False, False, False]],
        probability=[[0.9, 0.2, 0.1], [0.8, 0.4, 0.1], [0.85, 0.3, 0.1]],
    )
    outcome = many_labels("val", ("ant", "bee", "cat"), ["a", "b", "c"], rows)
    # ant: ranked a (true), c, b (true): (1 + 2/3) / 2; bee: b first.
    assert [score.score for score in outcome.classes] == [pytest.approx(5 / 6), 1.0, None]
    assert [score.n for score in outcome.classes] == [2, 1, 0]
    assert outcome.confusion is None
    assert outcome.n_wrong == 2
    first, second = outcome.mistakes
    assert (first.sample_id, first.truth, first.answer.replace("\xa0", " ")) == ("c", "none", "answered ant (85 %)")
    assert (second.sample_id, second.truth) == ("b", "ant, bee")


def test_a_class_a_patch_by_hand():
    rows = rows_of([[0, 0, 1, -1], [1, 1, 1, 1]], predicted=[[0, 1, 1, 0], [1, 1, 1, 1]])
    outcome = token_classes("test", ("sky", "sea", "sand"), ["a", "b"], rows)
    assert [score.score for score in outcome.classes] == [1 / 2, 5 / 6, None]
    assert outcome.n_wrong == 1
    assert outcome.mistakes[0].truth == "1 of 3 patches wrong"
    assert outcome.mistakes[0].answer == "sky taken for sea in 1"


def test_predictions_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="predictions are of another kind of target"):
        token_classes("test", ("a", "b"), ["x"], rows_of([[True, False]], probability=[[0.5, 0.5]]))


def many_classes(n, n_empty=0):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, n, 20 * n)
    predicted = np.where(rng.random(20 * n) < 0.7, targets, rng.integers(0, n, 20 * n))
    names = (*(f"class number {i}" for i in range(n)), *["empty"] * n_empty)
    return single_label("test", names, [str(i) for i in range(20 * n)], rows_of(targets, predicted, np.ones(20 * n)))


@pytest.mark.parametrize(
    ("n", "drawn", "wide"), [(3, True, False), (12, True, False), (50, True, True), (51, False, False)]
)
def test_a_matrix_is_drawn_while_it_is_legible(n, drawn, wide):
    outcome = many_classes(n)
    found = draw_matrix(outcome)
    assert (found is not None) is drawn
    if found is not None:
        assert found[1] is wide
        assert len(found[0]) < 60_000
    assert len(confused_pairs(outcome)) == min(8, len({*zip(*_wrong(outcome), strict=True)}))


def _wrong(outcome):
    confusion = outcome.confusion
    wrong = confusion.truth != confusion.predicted
    return confusion.truth[wrong].tolist(), confusion.predicted[wrong].tolist()


def test_of_many_classes_the_worst_are_shown_and_the_others_folded(runs):
    report = read_report([runs / "mist"])
    outcome = dataclasses.replace(many_classes(29, n_empty=1), mistakes=())
    page = _page_with(report, outcome)
    text = _Tags(page).text
    assert "The other 10 classes" in text
    assert "None among 580 samples." in text
    order = [text.index(f"{score.name}") for score in sorted(outcome.classes[:-1], key=lambda score: score.score)[:2]]
    assert order == sorted(order)
    assert page.index("empty") > page.index("The other 10 classes")


def _page_with(report, outcome):
    (store,) = report.stores
    run = dataclasses.replace(store.runs[0], outcome=outcome)
    changed = dataclasses.replace(report, stores=(dataclasses.replace(store, runs=(run,)),))
    return render_page(changed, [NO_IMAGES])


def test_images_stop_where_the_page_has_its_share(runs):
    report = read_report([runs / "mist"])
    wanted = wanted_images(report.stores[0])
    images = {sample: bytes(MAX_IMAGE_BYTES // 3) for sample in wanted}
    page = render_page(report, [Thumbnails(images=images, note=None)])
    assert len(images_of(page)) == 3
    assert f"{len(wanted) - 3} images are left out" in page


def test_of_very_many_runs_the_best_have_a_section_and_all_are_in_the_table(runs):
    report = read_report([runs / "mist"])
    (store,) = report.stores
    many = tuple(
        dataclasses.replace(store.runs[0], name=f"run {i}", settings={**store.runs[0].settings, "lr": float(i)})
        for i in range(MAX_SECTIONS + 5)
    )
    changed = dataclasses.replace(report, stores=(dataclasses.replace(store, runs=many),))
    tags = _Tags(render_page(changed, [NO_IMAGES]))
    assert len([of for of in tags.all("details") if of.get("class") == "run"]) == MAX_SECTIONS
    assert "The other 5 runs are in the table alone" in tags.text
    assert f"run {MAX_SECTIONS + 4}" in tags.text


def test_scores_are_compared_on_val_where_there_is_one(runs):
    (run,) = read_report([runs / "mist"]).runs
    only_test = dataclasses.replace(run, splits={"test": run.splits["test"]})
    only_val = dataclasses.replace(run, splits={"val": run.splits["val"]})
    assert choose_split([run, only_val]) == "val"
    assert choose_split([run, only_test]) == "val"
    assert choose_split([only_test, only_test]) == "test"
    assert choose_split([only_test, dataclasses.replace(run, splits={})]) is None


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (show_percent(0.7036), "70.4 %"),
        (show_percent(None), "–"),
        (show_bytes(7680), "7.68 kB"),
        (show_bytes(999.7), "1 kB"),
        (show_bytes(None), "–"),
        (show_count(126346), "126 k"),
        (show_count(12), "12"),
        (show_seconds(0.123), "0.12 s"),
        (show_seconds(75), "75 s"),
        (show_seconds(600), "10 min"),
        (show_seconds(12000), "3 h 20 min"),
        (show_seconds(None), "–"),
    ],
)
def test_numbers_are_short(shown, words):
    assert shown.replace("\xa0", " ") == words


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=5), st.booleans())
def test_axes_hold_their_values_and_a_few_ticks(values, may_log):
    axis = fit_axis(values, start=0.0, end=100.0, may_log=may_log)
    assert all(-1e-6 <= axis(value) <= 100 + 1e-6 for value in values)
    ticks = axis.ticks()
    assert len(ticks) <= 6
    assert ticks == sorted(ticks)
    assert all(axis.low * (1 - 1e-6) <= tick <= axis.high * (1 + 1e-6) for tick in ticks)


def test_a_folder_without_a_finished_run_is_refused(tmp_path, runs):
    result = coldtap("report", tmp_path, "--out", tmp_path / "a.html")
    assert result.exit_code == 9
    assert error_line(result).startswith(f"no finished run at or below {tmp_path}. Train one")
    failed = runs / "linear" / "lr=1e+30,seed=0"
    assert "1 are not: first" in error_line(coldtap("report", failed))
    assert not (tmp_path / "a.html").exists()


def test_paths_and_names_that_cannot_be_meant_are_refused(tmp_path, runs, run):
    result = coldtap("report", tmp_path / "nowhere")
    assert (result.exit_code, "is no folder" in error_line(result)) == (9, True)
    result = coldtap("report", runs, "--out", runs / "mist" / "run.json")
    assert (result.exit_code, "run.html" in error_line(result)) == (2, True)
    assert coldtap("report", runs, "--no-images", "--source", tmp_path).exit_code == 2
    (run / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        read_report([run])


def test_a_run_that_is_named_twice_is_shown_once(runs):
    assert len(read_report([runs / "mist", runs, runs / "mist"]).runs) == 5


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=SWITCHES.split())
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_a_real_browser_shows_the_page(browser, runs, tmp_path, width, height, scheme):
    out = tmp_path / "report.html"
    n_images = len(images_of(write(runs, out=out)))
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(out.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    assert page.evaluate("[...document.images].filter(image => image.naturalWidth > 0).length") == n_images > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().width > 0)")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [out.as_uri()]
    page.close()


def test_sections_open_by_a_click_and_by_a_link(browser, runs, tmp_path):
    out = tmp_path / "report.html"
    write(runs, out=out)
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(out.as_uri())
    sections = page.locator("details.run")
    assert sections.evaluate_all("all => all.map(each => each.open)") == [True, False, False, False, False]
    sections.nth(1).locator("summary").first.click()
    page.locator('table.runs a[href="#run-3"]').click()
    assert sections.evaluate_all("all => all.map(each => each.open)") == [True, True, True, False, False]
    page.close()
