"""Losses and scores of each kind of target: against scikit-learn, by hand, and many trials against one."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from coldtap.adaptors.metrics.tasks import task_of
from coldtap.adaptors.runs.predictions import (
    PREDICTIONS,
    SplitPredictions,
    read_predictions,
    write_predictions,
)
from coldtap.errors import RunError

KINDS = ("class", "labels", "token-class")
METRICS = {"class": "top1", "labels": "mAP", "token-class": "mIoU"}
CPU = torch.device("cpu")
N_TRIALS, N_SAMPLES, N_PATCHES, N_CLASSES = 3, 23, 6, 5


def drawn(kind, *, seed=0, n_trials=N_TRIALS):
    """Logits of some trials, and targets; the last class occurs in no target."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N_SAMPLES, N_PATCHES) if kind == "token-class" else (N_SAMPLES,)
    logits = torch.randn(n_trials, *shape, N_CLASSES, generator=generator)
    if kind == "labels":
        targets = (torch.rand(N_SAMPLES, N_CLASSES, generator=generator) < 0.3).float()
        targets[:, -1] = 0
        return logits, targets
    lowest = -1 if kind == "token-class" else 0
    return logits, torch.randint(lowest, N_CLASSES - 1, shape, generator=generator)


def tallied(kind, logits, targets, *, batch=7, device=CPU):
    """The metrics of all samples, in batches."""
    counted = task_of(kind).metrics(n_trials=len(logits), n_classes=logits.shape[-1], device=device, keep_rows=True)
    for start in range(0, len(targets), batch):
        counted.add(logits[:, start : start + batch], targets[start : start + batch])
    return counted


# Losses


def test_the_loss_of_classes_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2
    losses = task_of("class").losses(logits, torch.tensor([0, 1]), label_smoothing=0.0)
    torch.testing.assert_close(losses, torch.tensor([math.log(4 / 3), math.log(2)]))
    smooth = task_of("class").losses(logits, torch.tensor([0, 1]), label_smoothing=0.2)
    torch.testing.assert_close(smooth[0], torch.tensor(0.9 * math.log(4 / 3) + 0.1 * math.log(4)))


def test_the_loss_of_labels_is_the_mean_over_the_labels_by_hand():
    logits = torch.tensor([[math.log(3), 0.0]])  # probabilities 3/4 and 1/2
    task = task_of("labels")
    losses = task.losses(logits, torch.tensor([[1.0, 0.0]]), label_smoothing=0.0)
    torch.testing.assert_close(losses, torch.tensor([(math.log(4 / 3) + math.log(2)) / 2]))
    # A label's target of 1 becomes 0.9: a tenth of the weight goes to "not there".
    smooth = task.losses(logits, torch.tensor([[1.0, 0.0]]), label_smoothing=0.2)
    expected = (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)) / 2
    torch.testing.assert_close(smooth, torch.tensor([expected]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_of_tokens_is_the_mean_over_those_not_ignored(label_smoothing):
    (logits, *_), targets = drawn("token-class")
    losses = task_of("token-class").losses(logits, targets, label_smoothing=label_smoothing)
    of_classes = task_of("class")
    for sample in range(N_SAMPLES):
        known = targets[sample] >= 0
        alone = of_classes.losses(logits[sample, known], targets[sample, known], label_smoothing=label_smoothing)
        torch.testing.assert_close(losses[sample], alone.mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_and_gradients_under_vmap_are_those_of_each_trial(kind, label_smoothing):
    logits, targets = drawn(kind)
    task = task_of(kind)

    def loss(of_one):
        return task.losses(of_one, targets, label_smoothing=label_smoothing).mean()

    together, values = torch.func.vmap(torch.func.grad_and_value(loss))(logits)
    for trial, alone in enumerate(logits):
        gradient, value = torch.func.grad_and_value(loss)(alone)
        torch.testing.assert_close(together[trial], gradient)
        torch.testing.assert_close(values[trial], value)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_gradient_is_finite_where_every_token_of_a_sample_is_ignored(label_smoothing):
    logits = torch.randn(2, 4, 3, requires_grad=True)
    targets = torch.tensor([[0, 1, -1, 2], [-1] * 4])
    losses = task_of("token-class").losses(logits, targets, label_smoothing=label_smoothing)
    assert losses[1] == 0
    losses.mean().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[0, 2] == 0).all()
    assert (logits.grad[0, 0] != 0).all()


# Scores


@pytest.mark.parametrize("kind", KINDS)
def test_the_deciding_score_comes_first(kind):
    task = task_of(kind)
    assert (task.kind, task.metric) == (kind, METRICS[kind])
    assert all(next(iter(scores)) == task.metric for scores in tallied(kind, *drawn(kind)).scores())


def test_accuracies_are_those_of_scikit_learn():
    logits, targets = drawn("class")
    for said, scores in zip(logits.argmax(-1), tallied("class", logits, targets).scores(), strict=True):
        assert scores["top1"] == pytest.approx(metrics.accuracy_score(targets, said))
        # Its balanced accuracy warns of, and leaves out, classes that are only predicted: as ours does.
        recalls = metrics.recall_score(targets, said, labels=targets.unique(), average=None)
        assert scores["mean_class"] == pytest.approx(recalls.mean())


def test_scores_of_labels_are_those_of_scikit_learn():
    logits, targets = drawn("labels")
    targets, occurs = targets.numpy(), slice(0, N_CLASSES - 1)
    for said, scores in zip(logits.numpy(), tallied("labels", *drawn("labels")).scores(), strict=True):
        each = [metrics.average_precision_score(targets[:, c], said[:, c]) for c in range(N_CLASSES - 1)]
        assert scores["mAP"] == pytest.approx(np.mean(each))
        assert scores["micro_F1"] == pytest.approx(metrics.f1_score(targets, said >= 0, average="micro"))
        macro = metrics.f1_score(targets[:, occurs], said[:, occurs] >= 0, average="macro")
        assert scores["macro_F1"] == pytest.approx(macro)


def test_average_precision_by_hand():
    # Ranked 0.9 right, 0.8 wrong, 0.7 right: precision 1 at the first hit, 2/3 at the second.
    logits = torch.tensor([[[0.9], [0.8], [0.7]]])
    scores = tallied("labels", logits, torch.tensor([[1.0], [0.0], [1.0]])).scores()[0]
    assert scores["mAP"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["micro_F1"] == scores["macro_F1"] == pytest.approx(0.8)  # all three said, two right


def test_scores_of_tokens_are_those_of_scikit_learn():
    logits, targets = drawn("token-class")
    known = targets >= 0
    for said, scores in zip(logits.argmax(-1), tallied("token-class", logits, targets).scores(), strict=True):
        jaccard = metrics.jaccard_score(targets[known], said[known], average="macro", labels=range(N_CLASSES))
        assert scores["mIoU"] == pytest.approx(jaccard)
        assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(targets[known], said[known]))


def test_mean_intersection_over_union_by_hand():
    said = torch.tensor([[0, 0, 1, 1, 3]])
    targets = torch.tensor([[0, 1, 1, -1, 0]])
    logits = torch.nn.functional.one_hot(said, 5)[None].float()
    # Class 0: 1 of 3; class 1: 1 of 2; class 3, only said: 0 of 1; 2 and 4 neither occur nor are said.
    scores = tallied("token-class", logits, targets).scores()[0]
    assert scores == {"mIoU": pytest.approx((1 / 3 + 1 / 2 + 0) / 3), "accuracy": 0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tally_of_many_trials_equals_one_of_each(kind):
    logits, targets = drawn(kind)
    together = tallied(kind, logits, targets, batch=5)
    for trial, rows in enumerate(together.rows()):
        alone = tallied(kind, logits[trial : trial + 1], targets, batch=N_SAMPLES)
        assert together.scores()[trial] == pytest.approx(alone.scores()[0], rel=1e-12)
        assert together.losses()[trial] == pytest.approx(alone.losses()[0], rel=1e-6)
        for name in ("losses", "targets", "predicted", "probability"):
            mine, other = getattr(rows, name), getattr(alone.rows()[0], name)
            assert (mine is None) == (other is None)
            if mine is not None:
                np.testing.assert_allclose(mine, other, rtol=1e-6)


@pytest.mark.parametrize("kind", ["class", "labels"])
def test_the_loss_of_a_split_is_the_mean_over_its_samples(kind):
    logits, targets = drawn(kind)
    for of_one, loss in zip(logits, tallied(kind, logits, targets).losses(), strict=True):
        expected = task_of(kind).losses(of_one, targets, label_smoothing=0.0).double().mean()
        assert loss == pytest.approx(float(expected), rel=1e-6)


def test_the_loss_of_a_split_of_token_maps_is_the_mean_over_its_tokens():
    logits, targets = drawn("token-class")
    known = targets >= 0
    expected = task_of("class").losses(logits[1][known], targets[known], label_smoothing=0.0).double().mean()
    assert tallied("token-class", logits, targets).losses()[1] == pytest.approx(float(expected), rel=1e-6)


def test_rows_say_what_was_predicted_and_how_sure():
    logits, targets = drawn("class")
    rows = tallied("class", logits, targets).rows()[2]
    np.testing.assert_array_equal(rows.predicted, logits[2].argmax(-1))
    np.testing.assert_allclose(rows.probability, logits[2].softmax(-1).amax(-1), rtol=1e-6)
    logits, targets = drawn("labels")
    rows = tallied("labels", logits, targets).rows()[2]
    np.testing.assert_allclose(rows.probability, logits[2].sigmoid(), rtol=1e-6)
    np.testing.assert_array_equal(rows.targets, targets == 1)


# What cannot be scored as usual


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_whose_logits_are_not_finite_leaves_the_others_alone(kind):
    logits, targets = drawn(kind)
    sound = tallied(kind, logits, targets).scores()
    logits[1] = float("nan")
    counted = tallied(kind, logits, targets)
    assert [counted.scores()[trial] for trial in (0, 2)] == [sound[0], sound[2]]
    assert [math.isfinite(loss) for loss in counted.losses()] == [True, False, True]


def test_a_split_without_any_label_scores_nothing():
    logits, targets = drawn("labels")
    assert {*tallied("labels", logits, targets * 0).scores()[0].values()} == {0.0}


def test_a_split_of_one_sample_has_scores():
    for kind in KINDS:
        logits, targets = drawn(kind)
        scores = tallied(kind, logits[:, :1], targets[:1]).scores()[0]
        assert all(0 <= score <= 1 for score in scores.values())


def test_a_split_of_ignored_tokens_scores_nothing():
    logits, targets = drawn("token-class")
    counted = tallied("token-class", logits, torch.full_like(targets, -1))
    assert (counted.scores()[0], counted.losses()[0]) == ({"mIoU": 0.0, "accuracy": 0.0}, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_scores_of_the_cpu_and_waits_for_nothing_between_batches(kind):
    logits, targets = drawn(kind)
    device = torch.device("cuda")
    on_cpu, moved = tallied(kind, logits, targets), (logits.to(device), targets.to(device))
    tallied(kind, *moved, device=device)  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        counted = tallied(kind, *moved, device=device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counted.losses() == pytest.approx(on_cpu.losses(), rel=1e-5)
    for found, expected in zip(counted.scores(), on_cpu.scores(), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    losses = task_of(kind).losses(moved[0][0], moved[1], label_smoothing=0.1)
    expected = task_of(kind).losses(logits[0], targets, label_smoothing=0.1)
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-5, atol=1e-6)


# predictions.parquet


def said(kind, trial=0):
    logits, targets = drawn(kind)
    ids = [f"sample-{number}" for number in range(N_SAMPLES)]
    of_test = tallied(kind, logits[:, :4], targets[:4]).rows()[trial]
    return {
        "val": SplitPredictions(ids=ids, rows=tallied(kind, logits, targets).rows()[trial]),
        "test": SplitPredictions(ids=ids[:4], rows=of_test),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_read_back_as_they_were_written(tmp_path, kind):
    written = said(kind)
    write_predictions(tmp_path, kind, written)
    first = (tmp_path / PREDICTIONS).read_bytes()
    write_predictions(tmp_path, kind, said(kind))
    assert (tmp_path / PREDICTIONS).read_bytes() == first
    found = read_predictions(tmp_path)
    assert found.kind == kind
    assert list(found.splits) == ["val", "test"]
    for split, expected in written.items():
        of_split = found.split(split)
        assert list(of_split.ids) == expected.ids
        for name in ("losses", "targets", "predicted", "probability"):
            mine, other = getattr(of_split.rows, name), getattr(expected.rows, name)
            assert (mine is None) == (other is None)
            if mine is not None:
                assert mine.dtype == other.dtype
                np.testing.assert_array_equal(mine, other)


def test_a_run_folder_without_predictions_has_none(tmp_path):
    assert read_predictions(tmp_path) is None


def test_predictions_of_a_split_that_is_not_there_are_refused(tmp_path):
    write_predictions(tmp_path, "class", said("class"))
    with pytest.raises(RunError, match=r"no predictions of train, only of val, test"):
        read_predictions(tmp_path).split("train")


def test_damaged_predictions_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_predictions(tmp_path, "labels", said("labels"))
    path = tmp_path / PREDICTIONS
    data, table = path.read_bytes(), pq.read_table(path)
    path.write_bytes(data[:-20])
    with pytest.raises(RunError, match=r"predictions.parquet cannot be read: .*: train again"):
        read_predictions(tmp_path)
    pq.write_table(table.drop_columns(["loss"]), path)
    with pytest.raises(RunError, match=r"has columns .* of no kind of target"):
        read_predictions(tmp_path)
    pq.write_table(table.replace_schema_metadata({"kind": "boxes"}), path)
    with pytest.raises(RunError, match=r"has columns .* of no kind of target"):
        read_predictions(tmp_path)
    for column, values, message in (
        ("target", [[7]] * len(table), r"a label is none of the classes"),
        ("target", [None] * len(table), r"a line has no target"),
        ("target", [[None]] * len(table), r"a value is null"),
        ("probability", [[0.5] * (1 + (row == 0)) for row in range(len(table))], r"lists of \[1, 2\] values"),
    ):
        place = table.schema.get_field_index(column)
        field = table.schema.field(column)
        pq.write_table(table.set_column(place, field, pa.array(values, field.type)), path)
        with pytest.raises(RunError, match=message):
            read_predictions(tmp_path)
