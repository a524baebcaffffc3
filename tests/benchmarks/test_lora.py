"""LoRA beside training from a store: the same samples in the same order, the same features, the protocol of `vtab`."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.__main__ import main
from benchmarks.comparison import draw_comparison
from benchmarks.lora import (
    BATCH_SIZE,
    MODEL,
    RANK,
    Dataset,
    build_lora,
    fit_lora,
    lora_protocol,
    read_dataset,
    require_same_taps,
    table,
)
from coldtap import cache_features, open_store
from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.errors import RunError
from coldtap.pipeline.backbones.backbone import load_backbone
from tests.helpers.pictures import encoded, picture

SIZES = {"train": 40, "val": 8, "test": 8}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Light and dark noise, in two classes."""
    path = tmp_path_factory.mktemp("data") / "noise.parquet"
    splits = [split for split, n in SIZES.items() for _ in range(n)]
    images = [picture(i, 32, 32).point(lambda value, dark=i % 2: value // (1 + dark)) for i in range(len(splits))]
    columns = {
        "image": [encoded(image) for image in images],
        "label": [i % 2 for i in range(len(splits))],
        "split": splits,
    }
    pq.write_table(pa.table(columns), path)
    return path


def images_of(dataset) -> Dataset:
    return read_dataset(dataset, load_backbone(MODEL, device="cpu").preprocess)


def test_a_fresh_lora_sees_what_the_store_holds_in_the_order_of_its_batches(dataset, tmp_path):
    cache_features(dataset, tmp_path / "store", gather=["layers"], tier="float32", device="cpu")
    store, kind = open_store(tmp_path / "store"), adaptor_kind("last")
    spec, _ = kind.plan(store, kind.options())
    network = build_lora(load_backbone(MODEL, device="cpu"), n_classes=2, seed=0)
    stored = FeatureBatches(store, spec, "train", batch_size=BATCH_SIZE).shuffled(seed=0, epoch=1)
    fresh = images_of(dataset).splits["train"].shuffled(1)
    n_batches = 0
    for batch, (pixels, targets) in zip(stored, fresh, strict=True):
        with torch.inference_mode():
            tokens = network.tokens(pixels)
        torch.testing.assert_close(tokens, batch.features[:, -1], rtol=0, atol=1e-4)
        assert targets.tolist() == batch.targets.tolist()
        n_batches += 1
    assert n_batches == 2


def test_only_the_low_rank_terms_and_the_classifier_are_trained():
    network = build_lora(load_backbone(MODEL, device="cpu"), n_classes=2, seed=0)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("head.classifier") for name in trained)
    assert not network.training
    blocks, channels = 9, 192
    pooled = 2 * channels  # class token beside patch mean
    assert network.n_trainable() == blocks * RANK * 4 * channels + 2 * (pooled + 1)
    assert 12 * RANK * 4 * 768 == 294_912  # ViT-B/16


def test_another_path_to_the_last_tap_is_refused(dataset):
    backbone = load_backbone(MODEL, device="cpu")
    pixels = images_of(dataset).splits["train"].pixels[:4]
    expected = backbone(pixels)[-1].clone()
    network = build_lora(backbone, n_classes=2, seed=0)
    require_same_taps(network, pixels, expected)
    with pytest.raises(RunError, match="pooled features differ by"):
        require_same_taps(network, pixels.flip(0), expected)


def test_the_protocol_chooses_on_val_refits_on_both_and_reads_finished_fits(dataset, tmp_path, capsys):
    asked = {"rates": (1e-2, 1e30), "seeds": (0, 1), "epochs": 2, "out": tmp_path, "device": "cpu"}
    cell = lora_protocol(dataset, **asked)
    assert cell["lr"] == 1e-2
    assert cell["val"]["1e+30"] == 0 < cell["val"]["0.01"]
    assert len(cell["test"]) == 2
    results = {path: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(result["scored"] for result in results.values()) == ["test", "test", "val", "val"]
    assert all(result["settings"]["order_seed"] == 0 for result in results.values())
    written = {path: path.stat().st_mtime_ns for path in results}
    assert lora_protocol(dataset, **asked) == cell
    assert written == {path: path.stat().st_mtime_ns for path in results}
    assert f"{100 * np.mean(cell['test']):.1f} ±" in table([cell])


def test_a_diverging_fit_scores_nothing_and_says_why(dataset, tmp_path):
    result = fit_lora(dataset, lr=float("nan"), seed=0, epochs=1, fit="train", out=tmp_path / "fit.json", device="cpu")
    assert result["top1"] == 0
    assert result["reason"] == "loss nan in epoch 1"


def test_a_result_of_other_settings_is_refused(dataset, tmp_path):
    asked = {"seed": 0, "epochs": 1, "fit": "train", "out": tmp_path / "fit.json", "device": "cpu"}
    fit_lora(dataset, lr=1e-3, **asked)
    with pytest.raises(RunError, match="holds a fit of another lr: choose another --work"):
        fit_lora(dataset, lr=2e-3, **asked)


@pytest.mark.slow
def test_a_quick_comparison_has_ratios_to_lora_and_a_picture(tmp_path, capsys):
    main(["comparison", "--quick", "--json", str(tmp_path / "records.json")])
    lora, *others = records = json.loads((tmp_path / "records.json").read_text())["comparison"]
    assert (lora["memory_ratio"], lora["time_ratio"]) == (1, 1)
    assert {(record["adaptor"], record["way"]) for record in others} == {("mist", "disk"), ("mist", "backbone")}
    assert all(record[name] > 0 for record in records for name in ("memory_bytes", "own_bytes", "epoch_s", "end_s"))
    assert f"{others[0]['memory_ratio']:.3f}" in capsys.readouterr().out
    draw_comparison(records, tmp_path / "comparison.png")
    with Image.open(tmp_path / "comparison.png") as drawn:
        assert drawn.size > (600, 300)
