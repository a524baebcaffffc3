"""Trainings where matplotlib or scikit-learn is not installed: what is learnt is kept, what cannot be is said first."""

import json
import subprocess
import sys

import pytest

from coldtap.adaptors import read_run
from coldtap.stores import open_store
from coldtap.stores.editing.add_targets import add_targets
from tests.helpers.synthetic import three_directions

CHILD = """
import json, sys
for library in ("matplotlib", "sklearn"):
    sys.modules[library] = None
from coldtap.adaptors import TrainingOptions, train_adaptor, train_trials
from coldtap.errors import MachineError
store, out, trials, target = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
notes = []
common = {"device": "cpu", "note": notes.append}
try:
    if trials:
        training = TrainingOptions(epochs=2, batch_size=8)
        train_trials(store, "linear", trials, out=out, training=training, **common)
    else:
        train_adaptor(store, "linear", out=out, epochs=2, batch_size=8, target=target, **common)
except MachineError as error:
    notes.append(str(error))
print(json.dumps(notes))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return three_directions(tmp_path_factory.mktemp("store") / "store", class_names=["ant", "bee", "cat"])


def notes_of_a_child(store, out, trials=(), target="label"):
    command = [sys.executable, "-c", CHILD, str(store), str(out), json.dumps(list(trials)), target]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_a_run_without_matplotlib_and_scikit_learn_is_whole_but_for_its_picture(store, tmp_path):
    notes = notes_of_a_child(store, tmp_path / "run")
    assert [note for note in notes if "not drawn" in note] == [notes[-1]]
    assert notes[-1].startswith("curves.png was not drawn (")
    assert notes[-1].endswith(": pip install 'coldtap[report]'")
    assert set(read_run(tmp_path / "run").metrics) == {"val", "test"}
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"adaptor.safetensors", "run.json", "epochs.csv", "predictions.parquet"}


def test_trials_without_matplotlib_are_whole_but_for_their_picture(store, tmp_path):
    notes = notes_of_a_child(store, tmp_path / "out", [{"lr": 1e-3}, {"lr": 1e-2}])
    assert [note.partition(" ")[0] for note in notes if "not drawn" in note] == ["trials.png"]
    assert (tmp_path / "out" / "trials.csv").exists()
    assert len(list((tmp_path / "out").glob("*/run.json"))) == 2


def test_labels_without_scikit_learn_are_refused_before_anything_is_made(tmp_path):
    path = three_directions(tmp_path / "store")
    opened = open_store(path)
    ids = [sample for split in opened.splits for sample in opened.sample_ids(opened.rows(split))]
    add_targets(path, "tags", (ids, [[number % 3] for number in range(len(ids))]), kind="labels")
    notes = notes_of_a_child(path, tmp_path / "run", target="tags")
    assert notes == ["targets of kind labels are scored with scikit-learn: pip install 'coldtap[train]'"]
    assert not (tmp_path / "run").exists()
