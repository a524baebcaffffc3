"""Targets of three kinds: from sources and from Python into a store, and out of it in batches that can be learnt."""

import json
import os
import signal
import subprocess
import sys
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from coldtap import add_targets, cache_features, open_store
from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.networks.contract import spec_of
from coldtap.adaptors.networks.linear import LinearOptions, build_linear, plan_linear
from coldtap.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    MissingFeaturesError,
    OptionError,
    SourceError,
    StoreError,
    StoreLockedError,
)
from coldtap.pipeline.images.sources import open_source
from coldtap.stores.convert.convert import convert_store
from coldtap.stores.format.targets import TARGETS_SCHEMA, targets_bytes
from coldtap.stores.reading.describe import describe_store
from coldtap.stores.storage.lock import StoreLock
from coldtap.stores.verify.verify import verify_store
from coldtap.stores.writing.updates import update_targets
from tests.helpers.jobs import cache, coldtap, files, in_memory
from tests.helpers.pictures import encoded, picture, write_pictures
from tests.helpers.places import ROOT
from tests.helpers.synthetic import GEOMETRY, synthetic_store

SPLITS = ["train"] * 5 + ["val"] * 2 + ["test"]
IDS = [f"sample-{i:03d}" for i in range(len(SPLITS))]
KINDS = ("class", "labels", "token-class")
NAMES = ["ant", "bee", "cow"]
CLASSES = dict(zip(IDS, [0, 1, 0, 1, 0, 1, 2, 0], strict=True))
LABELS = dict(zip(IDS, [[0], [], [1, 0], [2], [0, 1, 2], [1], [], [2]], strict=True))
MAPS = {sample: np.arange(6).reshape(2, 3) % 4 - 1 if i else np.full((2, 3), 2) for i, sample in enumerate(IDS)}
TARGETS = {"class": CLASSES, "labels": LABELS, "token-class": MAPS}


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "s")


def small_store(path, **arguments):
    """A store of eight samples, and grids of 2 × 3 tokens."""
    features = np.random.default_rng(0).standard_normal((len(SPLITS), 3, GEOMETRY.tokens, GEOMETRY.channels))
    synthetic_store(path, features.astype(np.float32), list(CLASSES.values()), SPLITS, block_rows=2, **arguments)
    return path


def all_rows(store):
    return np.concatenate([store.rows(split) for split in store.splits])


def expected(kind, ids):
    """Targets of samples as a store gives them."""
    found = [TARGETS[kind][sample] for sample in ids]
    if kind == "labels":
        return np.array([[label in labels for label in range(3)] for labels in found])
    return np.array(found).reshape(len(ids), -1) if kind == "token-class" else np.array(found)


def put(store, data, name="label"):
    """A targets table as someone else may have written it."""
    update_targets(store, name, data)
    return open_store(store)


# The format


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rejected", [(), (2, 6)])
def test_targets_of_each_kind_read_back_by_row(tmp_path, kind, rejected):
    path = small_store(tmp_path / "s", rejected=rejected)
    features = {name: data for name, data in files(path).items() if name != "manifest"}
    digest = add_targets(path, "more", TARGETS[kind], kind=kind, class_names=NAMES)
    assert {name: data for name, data in files(path).items() if name in features} == features
    store = open_store(path)
    assert store.digest == digest
    assert (store.target_kind("more"), store.n_classes("more"), store.class_names("more")) == (kind, 3, (*NAMES,))
    assert store.target_grid("more") == ((2, 3) if kind == "token-class" else None)
    assert (store.target_kind(), store.target_names) == ("class", ("label", "more"))
    rows = all_rows(store)[::-1]
    found = store.targets(rows, "more")
    assert found.dtype == (bool if kind == "labels" else np.int64)
    np.testing.assert_array_equal(found, expected(kind, store.sample_ids(rows)))
    assert len(store.targets([], "more")) == 0
    assert verify_store(path).problems == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_in_the_order_of_the_rows_is_read_without_ids(tmp_path, monkeypatch, kind):
    cache(in_memory(train=6, val=3), tmp_path / "s")
    store = open_store(tmp_path / "s")
    rows = all_rows(store)
    ids = store.sample_ids(rows)
    of = {"class": lambda i: i % 3, "labels": lambda i: [i % 3], "token-class": lambda i: np.full((2, 2), i % 3)}[kind]
    given = {sample: of(i) for i, sample in enumerate(ids)}
    add_targets(store.path, "more", dict(reversed(given.items())), kind=kind)
    again = open_store(store.path)
    monkeypatch.setattr("coldtap.stores.reading.labels.parse_target_ids", lambda *_: pytest.fail("ids were read"))
    found = again.targets(rows, "more")
    classes = {"class": found, "labels": found.argmax(-1), "token-class": found[..., 0]}[kind]
    assert classes.tolist() == [i % 3 for i in range(len(rows))]
    metadata = pq.read_schema(store.path / "targets/more.parquet").metadata
    assert metadata[b"order"].decode() == store.recipe.rows.order


def test_a_table_of_single_classes_is_what_it_was_before_there_were_kinds():
    data = targets_bytes(["a", "b"], [1, 0], ["ant", "bee"], order="f" * 64)
    table = pq.read_table(BytesIO(data))
    assert table.schema.equals(TARGETS_SCHEMA)
    assert table.schema.metadata == {b"class_names": b'["ant", "bee"]', b"order": b"f" * 64}
    assert not pq.read_schema(BytesIO(targets_bytes(["a"], [1], None))).metadata


def test_a_table_says_its_kind_and_grid_to_any_reader(store):
    add_targets(store, "map", MAPS, kind="token-class", class_names=NAMES)
    table = pq.read_table(store / "targets/map.parquet")
    assert table.schema.field("target").type == pa.list_(pa.int32())
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata == {"kind": "token-class", "n_classes": "3", "grid": "[2, 3]", "class_names": json.dumps(NAMES)}
    assert dict(zip(table["sample_id"].to_pylist(), table["target"].to_pylist(), strict=True)) == {
        sample: of.ravel().tolist() for sample, of in MAPS.items()
    }


def test_a_table_that_another_writer_made_is_read(store):
    schema = pa.schema([("sample_id", pa.string()), ("target", pa.list_(pa.field("element", pa.int64())))])
    sink = BytesIO()
    with pq.ParquetWriter(sink, schema, store_schema=False) as writer:  # nothing of Arrow's own in the file
        writer.write_table(pa.table([IDS, [sorted(of) for of in LABELS.values()]], schema=schema), row_group_size=3)
        writer.add_key_value_metadata({"kind": "labels", "n_classes": "3"})
    found = put(store, sink.getvalue())
    rows = all_rows(found)
    np.testing.assert_array_equal(found.targets(rows), expected("labels", found.sample_ids(rows)))


def other_table(of, values, **metadata):
    types = {"class": pa.int64(), "labels": pa.list_(pa.int64()), "token-class": pa.list_(pa.int32())}
    schema = pa.schema([("sample_id", pa.string()), ("target", types[of])])
    about = {"kind": of, "n_classes": "3", **({"grid": "[2, 3]"} if of == "token-class" else {}), **metadata}
    table = pa.table([IDS[: len(values)], values], schema=schema.with_metadata(about))
    sink = BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("kind", "values", "metadata", "message"),
    [
        ("labels", [[0, 3]], {}, r"targets from 0 to 3; its classes are 0 to 2"),
        ("labels", [[-1]], {}, r"targets from -1 to -1; its classes are 0 to 2"),
        ("labels", [[1, 0]], {}, r"the labels of a line are not ascending"),
        ("labels", [[], [0], [1, 1]], {}, r"the labels of a line are not ascending"),
        ("labels", [[0], None], {}, r"a line has no target"),
        ("labels", [[0, None]], {}, r"a target has a value that is null"),
        ("labels", [[0]], {"n_classes": "many"}, r"its number of classes is 'many'"),
        ("labels", [[0]], {"n_classes": "1000000"}, r"its number of classes is '1000000'; expected 1 to 65536"),
        ("labels", [[0]], {"class_names": '["ant"]'}, r"its number of classes is '3'; .* a name for each or none"),
        ("labels", [[0]], {"class_names": "ant"}, r"its class names are not JSON"),
        ("labels", [[0]], {"kind": "boxes"}, r"of kind 'boxes'; this coldtap knows class, labels, token-class"),
        ("labels", [[0]], {"kind": "class"}, r"has columns .*; expected .* of their types"),
        ("labels", [[*range(25)]], {}, r"claims 25 values; expected 24 at most"),
        ("class", [0], {"kind": "labels"}, r"has columns .*; expected .* of their types"),
        ("token-class", [[0] * 6, [0] * 5], {}, r"a line has not the 2 × 3 targets of its grid"),
        ("token-class", [[0, 1, 2, 3, 0, 0]], {}, r"targets from 0 to 3; its classes are 0 to 2"),
        ("token-class", [[0, 1, -2, 0, 0, 0]], {}, r"targets from -2 to 1"),
        ("token-class", [[0] * 6], {"grid": "[3, 2]"}, r"a grid of 3 × 2; the taps have 2 × 3"),
        ("token-class", [[0] * 6], {"grid": "[6]"}, r"its token classes have no grid"),
        ("token-class", [[0] * 6], {"grid": "[0, 6]"}, r"its token classes have no grid"),
        ("token-class", [[0] * 6] * 7 + [[0] * 7], {}, r"claims 49 values; expected 48 at most"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused(store, kind, values, metadata, message):
    damaged = put(store, other_table(kind, values, **metadata))
    with pytest.raises(CorruptStoreError, match=message):
        damaged.targets(damaged.rows("train"))
    with pytest.raises(CorruptStoreError, match=message):
        damaged.target_kind()


def test_a_table_that_lacks_a_sample_says_which(store):
    short = put(store, other_table("labels", [[0]] * 4))
    with pytest.raises(MissingFeaturesError, match=r"has no target for sample 'sample-00[4-7]'"):
        short.targets(all_rows(short))


def test_an_unknown_name_is_told_with_those_that_are_there(store):
    with pytest.raises(MissingFeaturesError, match=r"has no targets 'species'; it has 'label'"):
        open_store(store).targets([0], "species")


def test_a_converted_store_keeps_targets_of_every_kind(tmp_path, store):
    for kind in KINDS:
        add_targets(store, kind, TARGETS[kind], kind=kind)
    convert_store(store, tmp_path / "small", tier="float16")
    old, new = open_store(store), open_store(tmp_path / "small")
    for kind in KINDS:
        np.testing.assert_array_equal(new.targets(all_rows(new), kind), old.targets(all_rows(old), kind))


# Adding targets


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_replaced_and_the_same_call_changes_nothing(store, kind):
    first = add_targets(store, "label", TARGETS[kind], kind=kind)
    before = files(store)
    ids, values = [*reversed(IDS)], [TARGETS[kind][sample] for sample in reversed(IDS)]
    assert add_targets(store, "label", (ids, values), kind=kind) == first
    assert files(store) == before
    assert add_targets(store, "label", CLASSES, kind="class", class_names=NAMES) != first
    assert open_store(store).class_names() == (*NAMES,)


def test_rejected_samples_need_no_target(tmp_path):
    path = small_store(tmp_path / "s", rejected=[0])
    add_targets(path, "label", {sample: of for sample, of in LABELS.items() if sample != IDS[0]}, kind="labels")
    store = open_store(path)
    np.testing.assert_array_equal(
        store.targets(store.rows("train")), expected("labels", store.sample_ids(store.rows("train")))
    )


def without(targets, *samples):
    return {sample: of for sample, of in targets.items() if sample not in samples}


@pytest.mark.parametrize(
    ("kind", "targets", "names", "message"),
    [
        ("class", without(CLASSES, IDS[1], IDS[2]), None, r"2 ids \('sample-00[12]', .*\) of 8 samples have no target"),
        ("class", {**CLASSES, "x": 1}, None, r"1 ids \('x'\) of 9 are no samples of this store"),
        ("class", (IDS, [0]), None, r"8 ids and 1 targets"),
        ("class", ([*IDS, IDS[0]], [0] * 9), None, r"1 ids \('sample-000'\) stand there twice"),
        ("class", {**CLASSES, IDS[3]: 3}, NAMES, r"targets 'more' of .*: 'sample-003' has class 3; .* are 0 to 2$"),
        ("class", {**CLASSES, IDS[3]: -1}, None, r"'sample-003' has class -1"),
        ("class", {**CLASSES, IDS[3]: "bee"}, NAMES, r"that of 'sample-003' is 'bee'; wanted an integer"),
        ("class", {**CLASSES, IDS[3]: 1.0}, None, r"is 1.0; wanted an integer"),
        ("labels", {**LABELS, IDS[3]: 1}, None, r"that of 'sample-003' is 1; wanted the numbers of its classes"),
        ("labels", {**LABELS, IDS[3]: [1, 1]}, None, r"is \[1, 1\]; wanted the numbers of its classes, each once"),
        ("labels", {**LABELS, IDS[3]: np.array([True, False])}, None, r"wanted the numbers of its classes"),
        ("labels", {**LABELS, IDS[3]: [0, 7]}, NAMES, r"'sample-003' has class 7; the classes are 0 to 2"),
        ("labels", {**LABELS, IDS[3]: [1 << 16]}, None, r"65537 classes; there may be 1 to 65536"),
        ("token-class", {**MAPS, IDS[3]: np.zeros((3, 2), int)}, None, r"'sample-003' is 3 × 2; expected 2 × 3, the"),
        ("token-class", {one: np.zeros((4, 4), int) for one in IDS}, None, r"is 4 × 4; expected 2 × 3, the patch grid"),
        ("token-class", {**MAPS, IDS[3]: np.zeros(6, int)}, None, r"wanted integers \(h, w\), one a patch"),
        ("token-class", {**MAPS, IDS[3]: [[1, 2, 3], [1, 2]]}, None, r"wanted integers \(h, w\), one a patch"),
        ("token-class", {**MAPS, IDS[3]: np.full((2, 3), 255, np.uint8)}, NAMES, r"0 to 2, and -1 where a token is to"),
    ],
)
def test_targets_that_cannot_be_are_refused_and_leave_the_store_alone(store, kind, targets, names, message):
    before = files(store)
    with pytest.raises(SourceError, match=message):
        add_targets(store, "more", targets, kind=kind, class_names=names)
    assert files(store) == before


@pytest.mark.parametrize("name", ["", "../label", "a/b", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(store, name):
    with pytest.raises(OptionError, match=r"targets are named by letters"):
        add_targets(store, name, CLASSES, kind="class")


def test_an_unknown_kind_is_refused(store):
    with pytest.raises(OptionError, match=r"kind='boxes': targets are of kind class, labels, token-class"):
        add_targets(store, "boxes", CLASSES, kind="boxes")


def test_a_store_must_be_there_complete_and_free(tmp_path, store):
    with pytest.raises(StoreError, match=r"there is no store at"):
        add_targets(tmp_path / "none", "label", CLASSES, kind="class")
    assert not (tmp_path / "none").exists()
    small_store(tmp_path / "half", blocks=[0], finish=False)
    with pytest.raises(IncompleteStoreError, match=r"is incomplete"):
        add_targets(tmp_path / "half", "label", CLASSES, kind="class")
    with StoreLock(store), pytest.raises(StoreLockedError, match=r"is being written by process"):
        add_targets(store, "label", CLASSES, kind="class")


DYING = """
import json, sys
from coldtap.stores.editing.add_targets import add_targets
add_targets(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), kind="labels")
"""


@pytest.mark.parametrize("name", ["label", "more"])
def test_a_call_that_died_is_mended_by_the_same_call(store, name):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLDTAP_FAULT": "manifest-temporary"}
    command = [sys.executable, "-c", DYING, str(store), name, json.dumps(LABELS)]
    died = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with pytest.raises(CorruptStoreError, match=r"run `coldtap verify`"):
        open_store(store).targets([0], name)
    add_targets(store, name, LABELS, kind="labels")
    assert open_store(store).target_kind(name) == "labels"
    assert verify_store(store).problems == ()


# Sources of many labels


def write_images(file, **columns):
    n = len(next(iter(columns.values())))
    images = pa.array([encoded(picture(number)) for number in range(n)])
    pq.write_table(pa.table({"image": images, **columns}), file)
    return file


@pytest.mark.parametrize(
    ("labels", "sets", "names"),
    [
        ([[0], [], [2, 1], [0, 2]], ((0,), (), (1, 2), (0, 2)), None),
        ([["dog"], [], ["emu", "cat"], ["dog"]], ((1,), (), (0, 2), (1,)), ("cat", "dog", "emu")),
        (pa.array([[0], [], [2, 1], [0]], pa.large_list(pa.int8())), ((0,), (), (1, 2), (0,)), None),
    ],
)
def test_parquet_with_lists_of_labels(tmp_path, labels, sets, names):
    listing = open_source(write_images(tmp_path / "set.parquet", label=labels, split=["train", "val"] * 2)).listing
    assert (listing.label_sets, listing.class_names, listing.targets) == (sets, names, None)


def test_hugging_face_names_of_a_sequence_may_name_classes_that_no_image_has(tmp_path):
    file = write_images(tmp_path / "set.parquet", label=[[0], [2], [0, 2]], split=["train", "train", "val"])
    for label in ({"feature": {"names": ["a", "b", "c"]}, "_type": "Sequence"}, [{"names": ["a", "b", "c"]}]):
        metadata = {"huggingface": json.dumps({"info": {"features": {"label": label}}})}
        pq.write_table(pq.read_table(file).replace_schema_metadata(metadata), file)
        listing = open_source(file).listing
        assert (listing.class_names, listing.label_sets) == (("a", "b", "c"), ((0,), (2,), (0, 2)))


@pytest.mark.parametrize(
    ("cells", "sets", "names"),
    [
        (["1", "", "0|1", " 0 "], ((1,), (), (0, 1), (0,)), None),
        (["dog", "", "cat | dog", "cat"], ((1,), (), (0, 1), (0,)), ("cat", "dog")),
    ],
)
def test_csv_with_labels_between_bars(tmp_path, cells, sets, names):
    write_pictures(tmp_path, *(f"{number}.png" for number in range(4)))
    lines = [f"{number}.png,{cell},{'val' if number == 3 else 'train'}" for number, cell in enumerate(cells)]
    (tmp_path / "list.csv").write_text("\n".join(["path,labels,split", *lines, ""]))
    listing = open_source(tmp_path / "list.csv").listing
    assert (listing.label_sets, listing.class_names) == (sets, names)


class Declared:
    """Images of which only the targets are known before they are read."""

    def __init__(self, targets):
        self.targets, self.read = targets, 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        self.read += 1
        return picture(index), self.targets[index]


@pytest.mark.parametrize("as_kept", [list, tuple, set, np.array, torch.tensor])
def test_python_targets_that_are_sequences(as_kept):
    sets = [[1, 0], [2], [0], [1]]
    items = {"train": [(picture(i), as_kept(of)) for i, of in enumerate(sets)], "val": [(picture(9), [])]}
    assert open_source(items).listing.label_sets == ((0, 1), (2,), (0,), (1,), ())


def test_declared_sequences_are_listed_without_reading_every_item():
    data = Declared([[number % 3, 3] for number in range(500)])
    listing = open_source(data).listing
    assert data.read < 100
    assert listing.label_sets[4] == (1, 3)
    assert listing.notes == ("no val split: 50 of the 500 train images, a tenth by seed 0, became it",)


def test_a_label_that_train_lacks_is_told():
    items = {"train": [(picture(0), [0]), (picture(1), [1])], "val": [(picture(2), [0, 2])]}
    assert open_source(items).listing.notes == ("1 image of val and test have labels that no train image has: 2",)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [[0], None]}, r"1 of 2 lists of labels are null, first at .* row 1; an image without labels has"),
        ({"label": [[0], [-1]]}, r"label -1 at .* row 1; the classes are 0 to 0"),
        ({"label": [[0], [1, 1]]}, r"a label stands twice at .* row 1: \[1, 1\]"),
        ({"label": [[0], [3]]}, r"labels have gaps: of the classes 0 … 3 no image has 1, 2; renumber them 0 … 1"),
        ({"label": pa.array([[], []], pa.list_(pa.int64()))}, r"no image has a label"),
        ({"label": [[0.5], [1.0]]}, r"column label has lists of double; wanted integers 0 … C-1, or names"),
        ({"label": [[0, None], [1]]}, r"column label has a list with a null in row 0"),
        ({"label": [[0], [1]], "label_name": ["a", "b"]}, r"column label_name beside lists of labels"),
    ],
)
def test_lists_of_labels_that_cannot_be_learnt(tmp_path, columns, message):
    file = write_images(tmp_path / "set.parquet", split=["train", "val"], **columns)
    with pytest.raises(SourceError, match=message):
        open_source(file)


def test_python_targets_of_two_kinds_are_refused():
    with pytest.raises(SourceError, match=r"target of item 1 is an integer, that of item 0 a sequence"):
        open_source([(picture(0), [0]), (picture(1), 1)])
    with pytest.raises(SourceError, match=r"target of item 0 is a str; wanted an integer, or a sequence of integers"):
        open_source([(picture(0), "cat"), (picture(1), 1)])
    with pytest.raises(SourceError, match=r"a label stands twice at item 0: \[0, 1, 1\]; wanted the numbers"):
        open_source([(picture(0), torch.tensor([True, False, True])), (picture(1), [1])])


# Batches


def batches_of(path, kind, split="train", **arguments):
    add_targets(path, "more", TARGETS[kind], kind=kind, class_names=NAMES)
    store = open_store(path)
    array = store.arrays["layers/g2x3-p1-c8"]
    return FeatureBatches(store, spec_of(store, array, (2,)), split, batch_size=3, target="more", **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "val", "train+val"])
def test_batches_have_the_targets_of_their_kind(store, kind, split):
    batches = batches_of(store, kind, split)
    assert (batches.task.kind, batches.n_classes) == (kind, 3)
    ids = batches.sample_ids()
    assert sorted(ids) == [sample for sample, of in zip(IDS, SPLITS, strict=True) if of in split.split("+")]
    found = torch.cat([batch.targets for batch in batches.ordered()])
    assert found.dtype == (torch.float32 if kind == "labels" else torch.int64)
    np.testing.assert_array_equal(found.numpy(), expected(kind, ids))
    drawn = [batch.targets for batch in batches.shuffled(seed=0, epoch=1)]
    assert sorted(torch.cat(drawn).tolist()) == sorted(found.tolist())


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("shuffle", ["uniform", "block"])
def test_train_and_val_together_draw_views_of_train_samples_alone(tmp_path, resident, shuffle):
    sample, view = np.ogrid[: len(SPLITS), :3]
    codes = np.broadcast_to((10 * sample + view).T[..., None, None, None], (3, len(SPLITS), 3, 7, 8))
    synthetic_store(tmp_path / "s", codes, list(CLASSES.values()), SPLITS, views=2, block_rows=2)
    store = open_store(tmp_path / "s")
    spec = spec_of(store, store.arrays["layers/g2x3-p1-c8"], (0,))
    both = FeatureBatches(store, spec, "train+val", batch_size=3, resident=resident, shuffle=shuffle)
    drawn = [
        (int(code) // 10, int(code) % 10, target)
        for epoch in range(12)
        for batch in both.shuffled(seed=0, epoch=epoch)
        for code, target in zip(batch.features[:, 0, 0, 0], batch.targets.tolist(), strict=True)
    ]
    assert len(drawn) == 12 * 7
    assert {sample for sample, *_ in drawn} == set(range(7))
    assert all(target == CLASSES[IDS[sample]] for sample, _, target in drawn)
    assert {view for sample, view, _ in drawn if sample < 5} == {0, 1, 2}
    assert {view for sample, view, _ in drawn if sample >= 5} == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_only_other_samples_have_are_named(tmp_path, kind):
    path = small_store(tmp_path / "s")
    # Class 2 stands in val alone, or with tokens and labels nowhere else but in one train sample.
    targets = {
        "class": CLASSES,
        "labels": {sample: [2] if sample == IDS[6] else [0, 1] for sample in IDS},
        "token-class": {sample: np.full((2, 3), 2 if sample == IDS[6] else i % 2 - 1) for i, sample in enumerate(IDS)},
    }[kind]
    for names, called in ((NAMES, "cow"), (None, "2")):
        add_targets(path, "more", targets, kind=kind, class_names=names)
        store = open_store(path)
        spec = spec_of(store, store.arrays["layers/g2x3-p1-c8"], (2,))
        train, both = (
            FeatureBatches(store, spec, split, batch_size=4, target="more") for split in ("train", "train+val")
        )
        assert (train.absent_classes, both.absent_classes) == ((called,), ())


def test_a_split_that_is_not_there_is_refused(tmp_path):
    path = small_store(tmp_path / "s")
    store = open_store(path)
    spec = spec_of(store, store.arrays["layers/g2x3-p1-c8"], (2,))
    with pytest.raises(SourceError, match=r"has no trian samples"):
        FeatureBatches(store, spec, "trian", batch_size=4)


# What is shown


def test_inspect_shows_kinds_and_counts(store):
    for kind in KINDS:
        add_targets(store, kind, TARGETS[kind], kind=kind, class_names=NAMES)
    about = describe_store(store)["targets"]
    assert {name: of["kind"] for name, of in about.items()} == {"label": "class", **{kind: kind for kind in KINDS}}
    assert about["labels"]["counts"] == {"train": {"ant": 3, "bee": 2, "cow": 2}, "val": {"bee": 1}, "test": {"cow": 1}}
    # Four train maps of −1 0 1 2 −1 0, and one of six times 2.
    assert about["token-class"]["counts"]["train"] == {"ant": 8, "bee": 4, "cow": 10}
    assert (about["token-class"]["grid"], about["class"]["class_names"]) == ([2, 3], NAMES)


def test_the_command_shows_kinds_and_counts(tmp_path):
    cache(in_memory(train=4, val=2), tmp_path / "s")
    labels = {f"train/{i}": [0, i % 2] if i % 2 else [] for i in range(4)} | {"val/0": [1], "val/1": [2]}
    maps = {sample: np.full((2, 2), len(of) - 1) for sample, of in labels.items()}
    add_targets(tmp_path / "s", "parts", labels, kind="labels", class_names=NAMES)
    add_targets(tmp_path / "s", "map", maps, kind="token-class")
    lines = coldtap("inspect", tmp_path / "s").stdout.splitlines()
    place = lines.index("targets    label: class, 2 classes")
    assert lines[place + 1 : place + 7] == [
        "targets    map: token-class, 2 classes on 2 × 2 tokens, which are counted",
        "    train    1 classes: 1 8",
        "    val      1 classes: 0 8",
        "targets    parts: labels, 3 classes",
        "    train    2 classes: ant 2, bee 2",
        "    val      2 classes: bee 1, cow 1",
    ]


# From images to scores

COLOURS = ((230, 40, 40), (40, 200, 60), (60, 80, 240))


def scene(rng, colours):
    """An image of 32 pixels with noise and squares of some colours, and which patch of 4 pixels each square covers."""
    pixels = rng.integers(60, 140, (32, 32, 3))
    grid = np.zeros((8, 8), np.int64)
    for colour in colours:
        y, x = rng.integers(0, 6, 2)
        grid[y : y + 3, x : x + 3] = colour + 1
        noise = rng.integers(-20, 20, (12, 12, 3))
        pixels[4 * y : 4 * y + 12, 4 * x : 4 * x + 12] = COLOURS[colour] + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), grid


def fitted(store, target, options, *, epochs=40):
    """The scores on test of a linear probe after a few epochs of the plainest loop."""
    spec, options = plan_linear(store, options)
    train, test = (
        FeatureBatches(store, spec, split, batch_size=64, target=target, resident=True) for split in ("train", "test")
    )
    torch.manual_seed(0)
    probe = build_linear(spec, options, n_classes=train.n_classes)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-2)
    for epoch in range(epochs):
        for batch in train.shuffled(seed=0, epoch=epoch):
            losses = train.task.losses(probe(batch.features), batch.targets, label_smoothing=0.0)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    metrics = test.task.metrics(n_trials=1, n_classes=test.n_classes, device=torch.device("cpu"))
    for batch in test.ordered():
        metrics.add(probe(batch.features)[None], batch.targets)
    return metrics.scores()[0]


def test_a_linear_probe_of_tokens_finds_a_coloured_square(tmp_path):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    scenes = {split: [scene(rng, [i % 2]) for i in range(n)] for split, n in (("train", 96), ("val", 8), ("test", 48))}
    images = {split: [(image, i % 2) for i, (image, _) in enumerate(of)] for split, of in scenes.items()}
    cache_features(images, tmp_path / "s", model="coldtap/vit-reference", gather=["layers"], device="cpu")
    maps = {f"{split}/{i}": grid for split, of in scenes.items() for i, (_, grid) in enumerate(of)}
    add_targets(tmp_path / "s", "map", maps, kind="token-class", class_names=["ground", "red", "green"])
    store = open_store(tmp_path / "s")
    scores = fitted(store, "map", LinearOptions(tap=4, pool="tokens"))
    # Saying `ground` everywhere would be right in 86 % of the tokens: a mean intersection over union of 0.29.
    assert scores["mIoU"] > 0.9
    assert scores["accuracy"] > 0.97


def test_a_linear_probe_finds_any_number_of_labels(tmp_path):
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    labels = [[colour for colour in range(3) if rng.random() < 0.5] for _ in range(180)]
    images = pa.array([encoded(scene(rng, of)[0]) for of in labels])
    splits = ["train"] * 120 + ["val"] * 10 + ["test"] * 50
    names = [[("red", "green", "blue")[colour] for colour in of] for of in labels]
    pq.write_table(pa.table({"image": images, "label": names, "split": splits}), tmp_path / "squares.parquet")
    cache_features(
        tmp_path / "squares.parquet", tmp_path / "s", model="coldtap/vit-reference", gather=["pooled"], device="cpu"
    )
    store = open_store(tmp_path / "s")
    assert (store.target_kind(), store.class_names()) == ("labels", ("blue", "green", "red"))
    scores = fitted(store, "label", LinearOptions())
    # Half of the images have each label: ranked at random, an average precision of about 0.5.
    assert scores["mAP"] > 0.9
