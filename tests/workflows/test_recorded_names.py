"""A file never says which code is imported, which hub is asked, or which folder is opened: the caller repeats it."""

import json
import shutil
import socket

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from coldtap.adaptors import evaluate_adaptor, load_adaptor, read_run, train_adaptor
from coldtap.adaptors.runs.onnx import export_onnx
from coldtap.errors import ModelError, OptionError, RunError
from coldtap.pipeline.backbones.backbone import load_backbone
from tests.helpers.jobs import cache, coldtap, error_line, in_memory
from tests.helpers.pictures import picture

PAYLOAD = """
from pathlib import Path
Path(__file__).with_name("it ran").touch()
from coldtap.adaptors.networks.linear import LINEAR as KIND
"""
HUB = "hf-hub:someone/model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store and a run of `linear` on it."""
    place = tmp_path_factory.mktemp("trained")
    cache(in_memory(train=16, val=8, test=8), place / "store")
    train_adaptor(place / "store", "linear", out=place / "run", epochs=1, device="cpu")
    return place


@pytest.fixture
def no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def edited(trained, tmp_path, **changes):
    """A copy of the run whose `run.json` says something else."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    record = json.loads((run / "run.json").read_text())
    settings = record["settings"] | {name: value for name, value in changes.items() if name in record["settings"]}
    others = {name: value for name, value in changes.items() if name not in record["settings"]}
    (run / "run.json").write_text(json.dumps(record | {"settings": settings} | others))
    return run


@pytest.mark.parametrize("name", ["payload:KIND", "coldtap_payload.sub:KIND", "venv.__main__:x", ":", "a:b:c"])
def test_no_module_that_a_run_names_is_imported(trained, tmp_path, monkeypatch, name):
    run = edited(trained, tmp_path, adaptor=name)
    for place in (run, tmp_path):
        (place / "payload.py").write_text(PAYLOAD)
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(run))
    before = sorted(tmp_path.rglob("*"))
    images = tmp_path / "images"
    for words in (
        ("evaluate", run, trained / "store"),
        ("export", run),
        ("predict", run, images),
    ):
        result = coldtap(*words)
        assert result.exit_code == 9
        assert f"{run / 'run.json'} names what this coldtap does not know: " in error_line(result)
        assert f"name it yourself: --adaptor {name}" in error_line(result)
    with pytest.raises(RunError, match="nothing was imported"):
        load_adaptor(run)
    assert sorted(tmp_path.rglob("*")) == before


def test_code_that_the_caller_names_is_imported_where_the_run_agrees(trained, tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = edited(trained, tmp_path, adaptor="payload:KIND")
    with pytest.raises(OptionError, match=r"is of the adaptor 'payload:KIND': leave `adaptor` out, or name that"):
        load_adaptor(run, adaptor="linear")
    assert not (tmp_path / "it ran").exists()
    result = coldtap("evaluate", run, trained / "store", "--adaptor", "payload:KIND", "--json")
    assert (result.exit_code, (tmp_path / "it ran").exists()) == (0, True)
    expected = evaluate_adaptor(trained / "run", trained / "store", device="cpu").metrics
    assert json.loads(result.stdout)["metrics"]["loss"] == expected.loss
    assert export_onnx(run, tmp_path / "a.onnx", adaptor="payload:KIND").n_bytes > 0
    assert type(load_adaptor(run, adaptor="payload:KIND")[0]) is type(load_adaptor(trained / "run")[0])


def test_another_adaptor_than_the_runs_is_refused(trained):
    result = coldtap("evaluate", trained / "run", trained / "store", "--adaptor", "mist")
    assert result.exit_code == 2
    assert "--adaptor mist" in error_line(result)
    assert "is of the adaptor 'linear'" in error_line(result)


@pytest.mark.parametrize("name", [HUB, "hf_hub:someone/model", "local-dir:/etc"])
@pytest.mark.parametrize("words", [(), ("--random-weights",), ("--checkpoint", "none.safetensors")])
def test_no_hub_and_no_folder_that_a_run_names_is_asked(trained, tmp_path, no_network, name, words):
    run = edited(trained, tmp_path, model=name)
    result = coldtap("predict", run, tmp_path, *words)
    assert result.exit_code == 4
    assert "nothing was fetched" in error_line(result)
    assert f"name it yourself: --model {name}" in error_line(result)


def test_pretrained_weights_that_are_in_no_cache_are_not_fetched_because_a_run_names_them(
    trained, tmp_path, no_network, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    run = edited(trained, tmp_path, model="test_vit.r160_in1k")
    result = coldtap("predict", run, tmp_path)
    assert result.exit_code == 4
    assert "weights are not in this machine's cache; nothing was fetched" in error_line(result)
    assert "--model test_vit.r160_in1k, or give local weights with --checkpoint FILE" in error_line(result)


def test_pretrained_weights_are_taken_from_the_cache_without_a_network(tmp_path, no_network, monkeypatch):
    name = "test_vit.r160_in1k"
    torch.manual_seed(1)
    snapshot = tmp_path / "hub/models--timm--test_vit.r160_in1k/snapshots/0"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/models--timm--test_vit.r160_in1k/refs").mkdir()
    (tmp_path / "hub/models--timm--test_vit.r160_in1k/refs/main").write_text("0")
    save_file(timm.create_model(name, pretrained=False).state_dict(), snapshot / "model.safetensors")
    images = tmp_path / "images"
    for split, n in (("train", 8), ("val", 4)):
        for i in range(n):
            (images / split / str(i % 2)).mkdir(parents=True, exist_ok=True)
            picture(i).save(images / split / str(i % 2) / f"{i}.png")
    made = ("cache-features", images, tmp_path / "store", "--model", name, "--gather", "pooled", "--device", "cpu")
    assert coldtap(*made, "--checkpoint", snapshot / "model.safetensors").exit_code == 0
    train_adaptor(tmp_path / "store", "linear", out=tmp_path / "run", epochs=1, device="cpu")
    assert read_run(tmp_path / "run").model == name
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    result = coldtap("predict", tmp_path / "run", images, "--device", "cpu")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 13)
    torch.manual_seed(2)
    save_file(timm.create_model(name, pretrained=False).state_dict(), snapshot / "model.safetensors")
    result = coldtap("predict", tmp_path / "run", images, "--device", "cpu")
    assert result.exit_code == 4
    assert "trained on features of another extractor" in error_line(result)


def test_no_hub_that_an_artefact_names_is_asked(tmp_path, no_network):
    artefact = tmp_path / "backbone.safetensors"
    images = tmp_path / "images"
    for i in range(20):
        (images / "train" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        picture(i, 32, 32).save(images / "train" / str(i % 2) / f"{i}.png")
    made = coldtap("quantize", "coldtap/vit-reference", "--calibration", images, "--out", artefact)
    assert made.exit_code == 0, made.stderr
    data = artefact.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    about = json.loads(header["__metadata__"]["coldtap"]) | {"model": HUB}
    header["__metadata__"]["coldtap"] = json.dumps(about)
    forged = json.dumps(header).encode()
    artefact.write_bytes(len(forged).to_bytes(8, "little") + forged + data[8 + n :])
    with pytest.raises(ModelError, match=r"names the model 'hf-hub:someone/model', which lies elsewhere"):
        load_backbone(quantised=artefact, device="cpu")
