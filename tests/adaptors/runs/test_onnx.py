"""An adaptor as an ONNX file: the same logits without torch, metadata that say what to feed, nothing overwritten."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import coldtap
from coldtap import add_targets
from coldtap.adaptors import load_adaptor, train_adaptor
from coldtap.adaptors.networks.contract import copy_final_norm
from coldtap.adaptors.networks.kinds import ADAPTORS
from coldtap.adaptors.networks.options import option_defaults, parse_options
from coldtap.adaptors.networks.parts import HeadOptions
from coldtap.adaptors.runs.onnx import MAX_DIFFERENCE, OPSET, compare_logits, onnx_bytes
from coldtap.errors import RunError
from coldtap.stores import open_store
from coldtap.stores.format.geometry import Geometry
from tests.helpers.jobs import coldtap as run_coldtap
from tests.helpers.jobs import error_line, read
from tests.helpers.places import ROOT
from tests.helpers.synthetic import layer_norm, synthetic_store

GEOMETRY = Geometry(grid=(2, 3), prefix_tokens=1, channels=32)  # as narrow as the ladder's default options allow
N_TAPS, N_CLASSES = 3, 3
TARGETS = [i % N_CLASSES for i in range(12)]
SPLITS = ["train"] * 6 + ["val"] * 6
FEWER = {"modules": 2, "depth": 2}  # the exporter takes a second for some five of them


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    rng = np.random.default_rng(0)
    features = rng.standard_normal((12, N_TAPS, GEOMETRY.tokens, GEOMETRY.channels)).astype(np.float32)
    geometries = dict.fromkeys(range(N_TAPS), GEOMETRY)
    names = ["ant", "bee", "cow"]
    synthetic_store(path, features, TARGETS, SPLITS, geometries=geometries, norm=layer_norm(32), class_names=names)
    return open_store(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, store):
    out = tmp_path_factory.mktemp("runs") / "linear"
    train_adaptor(store.path, "linear", out=out, epochs=1, batch_size=3, device="cpu")
    return out


@pytest.fixture(scope="module")
def exported(run):
    """A run with its ONNX file in it, and what the command said."""
    result = run_coldtap("export", run, "--format", "onnx")
    assert result.exit_code == 0, result.stderr
    return run / "adaptor.onnx", result


def built(store, adaptor, **settings):
    """A module with weights of noise, in which nothing starts at zero, and the features that it reads."""
    kind = ADAPTORS[adaptor]
    few = {name: n for name, n in FEWER.items() if name in option_defaults(kind.options)}
    spec, options = kind.plan(store, parse_options(kind.options, {**few, **settings}, adaptor=adaptor))
    module = kind.build(spec, options, n_classes=N_CLASSES).eval()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) / 2)
        copy_final_norm(module, store.norm)
    return module, spec


def require_same_logits(store, module, spec, data):
    """onnxruntime on stored features and on noise, by one and by several."""
    agreement = compare_logits(module, data, spec)
    assert agreement.largest_difference <= 1e-5 * agreement.largest_logit
    array = store.arrays[spec.array]
    rows = store.rows("train")
    values = np.empty((len(rows), *spec.row_shape), np.float32)
    array.read_into(values, rows, None if spec.gather == "sum" else spec.taps)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"features": values})
    with torch.inference_mode():
        expected = module(torch.from_numpy(values)).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_every_adaptor_gives_the_same_logits_in_onnxruntime(store, adaptor):
    module, spec = built(store, adaptor)
    require_same_logits(store, module, spec, onnx_bytes(module, spec, {}))


@pytest.mark.parametrize("adaptor", [name for name, kind in ADAPTORS.items() if issubclass(kind.options, HeadOptions)])
def test_logits_of_every_token_are_the_same_too(store, adaptor):
    module, spec = built(store, adaptor, pool="tokens")
    data = onnx_bytes(module, spec, {})
    require_same_logits(store, module, spec, data)
    shape = onnx.load_from_string(data).graph.output[0].type.tensor_type.shape
    assert [axis.dim_param or axis.dim_value for axis in shape.dim] == ["batch", 6, N_CLASSES]


@pytest.mark.parametrize(
    ("adaptor", "settings"),
    [
        ("linear", {"pool": "both", "norm": "none"}),
        ("mist", {"pool": "all", "depth": 1, "heads": 2, "bias": "yes", "dropout": 0.5, "drop_path": 0.5}),
        ("last", {"recursion": "A", "modules": 1, "gap": 2, "norm": "new", "norm_at": "before"}),
    ],
)
def test_options_change_nothing_about_it(store, adaptor, settings):
    module, spec = built(store, adaptor, **settings)
    require_same_logits(store, module, spec, onnx_bytes(module, spec, {}))


def test_the_command_says_what_was_written_and_how_close_the_logits_are(exported, run):
    path, result = exported
    first, second, third = result.stdout.splitlines()
    assert first.startswith(f"{path}: linear, ")
    assert first.endswith(f"opset {OPSET}; written")
    assert second == "features: float32 (batch, 1, 2, 32), pooled of tap 2"
    said = re.fullmatch(r"onnxruntime .* logits differ by at most (\S+), the largest is (\S+)", third)
    assert said is not None
    assert float(said[1]) <= 1e-5 * float(said[2])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    module, info = load_adaptor(run)
    values = torch.randn(4, *info.features.row_shape)
    (found,) = session.run(None, {"features": values.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(values))


def test_input_output_and_opset_are_as_stated(exported):
    model = onnx.load(exported[0])
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    shapes = {}
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        assert tensor.elem_type == onnx.TensorProto.FLOAT
        shapes[value.name] = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    assert shapes == {"features": ["batch", 1, 2, 32], "logits": ["batch", N_CLASSES]}


def test_the_metadata_say_what_to_feed(exported, run):
    about = onnxruntime.InferenceSession(exported[0]).get_modelmeta().custom_metadata_map
    info = load_adaptor(run)[1]
    assert (about["coldtap_version"], about["adaptor"]) == (coldtap.__version__, "linear")
    assert about["extractor_digest"] == info.extractor_digest
    assert json.loads(about["class_names"]) == ["ant", "bee", "cow"]
    assert (about["target"], about["target_kind"]) == ("label", "class")
    assert json.loads(about["options"]) == dict(info.settings.options)
    assert json.loads(about["extractor"]) == dict(info.extractor)
    features = json.loads(about["features"])
    assert features.pop("axes").startswith("(batch, tap, prefix + 1, channel)")
    assert features == info.features.to_dict()


def test_no_path_of_this_machine_is_in_the_file(exported):
    data = exported[0].read_bytes()
    for path in (Path(coldtap.__file__).parent, Path(torch.__file__).parent, Path.home(), exported[0].parent):
        assert str(path).encode() not in data


@pytest.mark.parametrize("kind", ["class", "labels", "token-class"])
def test_the_example_of_the_documentation_runs(tmp_path, store, kind):
    names = ["ant", "bee", "cow"]
    targets = {
        "class": TARGETS,
        "labels": [[number, (number + 1) % N_CLASSES] for number in TARGETS],
        "token-class": [np.full(GEOMETRY.grid, number) for number in TARGETS],
    }
    shutil.copytree(store.path, tmp_path / "store")
    of_samples = {f"sample-{number:03d}": target for number, target in enumerate(targets[kind])}
    add_targets(tmp_path / "store", "more", of_samples, kind=kind, class_names=names)
    run = tmp_path / "run"
    train_adaptor(tmp_path / "store", "linear", out=run, epochs=1, batch_size=3, target="more", device="cpu")
    assert run_coldtap("export", run, "--out", tmp_path / "adaptor.onnx").exit_code == 0
    about = onnxruntime.InferenceSession(tmp_path / "adaptor.onnx").get_modelmeta().custom_metadata_map
    assert (about["target"], about["target_kind"]) == ("more", kind)
    page = (ROOT / "docs/export.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module, info = load_adaptor(run)
    values = read(store.arrays[info.features.array], store.rows("val"))[:, list(info.features.taps)]
    np.save(tmp_path / "features.npy", values)
    ran = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True)
    with torch.inference_mode():
        logits = module(torch.from_numpy(values))
    if kind == "labels":
        expected = [[name for name, given in zip(names, row, strict=True) if given] for row in logits.sigmoid() > 0.5]
    else:
        expected = np.array(names)[logits.softmax(-1).argmax(-1)].tolist()
    assert ast.literal_eval(ran.stdout) == expected


def test_the_same_file_is_left_alone_and_another_one_is_not_overwritten(tmp_path, exported, run):
    path = tmp_path / "new/folder/net.onnx"
    first = json.loads(run_coldtap("export", run, "--out", path, "--json").stdout)
    assert (first["file"], first["bytes"], first["was_there"]) == (str(path), path.stat().st_size, False)
    assert path.read_bytes() == exported[0].read_bytes()
    before = path.stat().st_mtime_ns
    assert run_coldtap("export", run, "--out", path).stdout.splitlines()[0].endswith("is there already; nothing to do")
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"mine")
    result = run_coldtap("export", run, "--out", path)
    assert result.exit_code == 9
    assert f"{path} is there already and holds something else: choose another --out" in error_line(result)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{run}", "--format", "tflite"], 2, "--format tflite: choose one of onnx"),
        (["{run}", "--out", "{folder}"], 2, "--out {folder} is a folder: give a file, such as {folder}/adaptor.onnx"),
        (["{folder}"], 9, "there is no finished run at {folder}"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, run, words, code, message):
    result = run_coldtap("export", *(word.format(run=run, folder=tmp_path) for word in words))
    assert result.exit_code == code
    assert message.format(folder=tmp_path) in error_line(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line_with_its_remedy(tmp_path, run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run_coldtap("export", run, "--out", tmp_path / "net.onnx")
    assert result.exit_code == 7
    assert error_line(result) == f"export needs {package}: pip install 'coldtap[onnx]'"


def test_without_onnxruntime_the_file_is_written_and_not_compared(tmp_path, run, exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_coldtap("export", run, "--out", tmp_path / "net.onnx")
    assert result.stdout.splitlines()[-1] == "not compared with torch: onnxruntime is not installed"
    assert (tmp_path / "net.onnx").read_bytes() == exported[0].read_bytes()


class Undecided(nn.Module):
    """Which way it goes depends on the values, which no graph can say."""

    def forward(self, features):
        return features.flatten(1) if features.sum() > 0 else features.flatten(1)[:, :N_CLASSES]


def test_a_module_that_is_no_graph_cannot_be_exported(store):
    _, spec = built(store, "linear")
    with pytest.raises(RunError, match=r"Undecided cannot be exported as ONNX: .*"):
        onnx_bytes(Undecided().eval(), spec, {})


def test_another_network_is_not_taken_for_the_adaptor(store):
    module, spec = built(store, "linear")
    data = onnx_bytes(module, spec, {})
    with torch.no_grad():
        next(module.parameters()).add_(MAX_DIFFERENCE * 100)
    with pytest.raises(RunError, match="the exported network is not the adaptor: its logits differ by"):
        compare_logits(module, data, spec)
