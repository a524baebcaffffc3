"""A quantised backbone as an ONNX file: the same taps, integer products, no node for compensation, clear refusals."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import coldtap
from coldtap.errors import ModelError, OptionError
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.backbones.integer.kernels import OneDnnKernel
from coldtap.pipeline.backbones.integer.layers import quantised_layers
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.quantisation.onnx.export import OPSET, compare_taps, export_backbone
from coldtap.pipeline.quantisation.quantize import quantize
from coldtap.stores.format.canonical import digest_of
from tests.helpers.jobs import coldtap as run_coldtap
from tests.helpers.jobs import error_line
from tests.helpers.kernels import skip_where_inexact
from tests.helpers.pictures import picture

SIDE = 32
SMALL = Preprocess(
    height=SIDE,
    width=SIDE,
    crop_pct=1.0,
    crop_mode="squash",
    interpolation="bicubic",
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
CALIBRATION = [(picture(i), 0) for i in range(16)]
TOLERANCE = (
    0.01  # of a tap's largest value: a rounding at a tie flips a code; 0.003 was the most that these models showed
)
VIT = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


def vit(**options):
    return noise(VisionTransformer(**{**VIT, **options}))


def distilled():
    return noise(VisionTransformerDistilled(**VIT))


def resnet(block=BasicBlock):
    return noise(ResNet(block, (1, 1, 1, 1), num_classes=0, channels=(16, 16, 16, 16)))


def noise(model: nn.Module) -> nn.Module:
    """The model in eval mode with weights and statistics of noise, always the same; nothing in it is an identity."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                spread = torch.randn(value.shape, generator=random)
                positive = value.ndim == 1 and name.endswith(("weight", "running_var"))
                fan_in = max(value[0].numel(), 1) if value.ndim > 1 else 10
                value.copy_(spread.abs() / 2 + 0.5 if positive else spread / fan_in**0.5)
    return model.eval()


def artefact_of(model, path, compensate="none", **options):
    quantize(model, CALIBRATION, path, compensate=compensate, preprocess=SMALL, device="cpu", **options)
    return path


def exported(model, folder, compensate="none", **options):
    """The artefact of a module, and its ONNX file."""
    artefact = artefact_of(model, folder / f"{compensate}.safetensors", compensate, **options)
    return artefact, export_backbone(artefact, folder / f"{compensate}.onnx", model=model)


def session_of(path, optimised=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the graph that it writes is for this machine
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def require_same_taps(path, artefact, model):
    """onnxruntime, optimising as it likes, against coldtap on a batch of its own."""
    skip_where_inexact(OneDnnKernel())  # onnxruntime saturates there too
    backbone = load_backbone(model, quantised=artefact, kernel="float", device="cpu")
    shape = (4, 3, backbone.preprocess.height, backbone.preprocess.width)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    session = session_of(path)
    names = [output.name for output in session.get_outputs()]
    assert names == backbone.taps.names()
    for name, found, expected in zip(
        names, session.run(None, {"pixels": pixels.numpy()}), backbone(pixels), strict=True
    ):
        assert found.dtype == np.float32
        assert np.abs(found - expected.numpy()).max() <= TOLERANCE * expected.abs().max(), name


def operations(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """One ViT without and with CWAC: from the compensation to (artefact, export)."""
    folder = tmp_path_factory.mktemp("vits")
    return {kind: exported(vit(), folder, kind) for kind in ("none", "cwac")}


@pytest.fixture(scope="module")
def resnets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnets")
    return {kind: exported(resnet(), folder, kind) for kind in ("none", "cwac")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An artefact of the reference backbone, its ONNX file, and what the command said."""
    folder = tmp_path_factory.mktemp("reference")
    artefact, path = folder / "reference.safetensors", folder / "reference.onnx"
    quantize("coldtap/vit-reference", CALIBRATION, artefact, device="cpu")
    result = run_coldtap("export-backbone", artefact, "--out", path, "--format", "onnx", "--json")
    assert result.exit_code == 0, result.stderr
    return artefact, path, json.loads(result.stdout)


@pytest.mark.parametrize("compensate", ["none", "cwac"])
def test_onnxruntime_gives_the_taps_of_a_vit_and_of_a_resnet(vits, resnets, compensate):
    for made, model in ((vits, vit()), (resnets, resnet())):
        artefact, export = made[compensate]
        require_same_taps(export.path, artefact, model)
        assert export.agreement.largest_difference <= TOLERANCE


@pytest.mark.parametrize(("build", "compensate"), [(distilled, "qwt"), (lambda: resnet(Bottleneck), "qwt")])
def test_other_members_of_the_families_and_a_matrix_beside_a_block_agree_too(tmp_path, build, compensate):
    artefact, export = exported(build(), tmp_path, compensate)
    require_same_taps(export.path, artefact, build())


def test_the_reference_backbone_agrees(reference):
    artefact, path, _ = reference
    require_same_taps(path, artefact, None)


def layout(path):
    """The nodes in order with their attributes, and type and shape of every tensor of the file."""
    graph = onnx.load(path).graph
    nodes = [(node.op_type, list(node.input), list(node.output), str(node.attribute)) for node in graph.node]
    return nodes, {part.name: (part.data_type, list(part.dims)) for part in graph.initializer}


def integers(path):
    """The weights' codes."""
    found = (numpy_helper.to_array(part) for part in onnx.load(path).graph.initializer)
    return [array for array in found if array.dtype == np.int8]


def test_compensation_adds_no_node_and_changes_no_integer(vits, resnets):
    for made, model in ((vits, vit()), (resnets, resnet())):
        artefact, export = made["cwac"]
        module = load_backbone(model, quantised=artefact, kernel="float", device="cpu").module
        folded = [layer.affine for layer in quantised_layers(module).values() if layer.affine is not None]
        assert any((affine.scale != 1).any() for affine in folded)
        assert any((affine.offset != 0).any() for affine in folded)
        plain = made["none"][1].path
        assert layout(export.path) == layout(plain)
        assert all(map(np.array_equal, integers(export.path), integers(plain)))
        assert export.path.read_bytes() != plain.read_bytes()


def test_a_linear_without_a_bias_gains_the_add_of_one_that_has_a_bias(tmp_path, vits):
    # Without the reparameterisation, which gives these layers a bias by itself.
    options = {"reparameterise": False, "sites": ["*"]}
    _, export = exported(vit(qkv_bias=False), tmp_path, "cwac", **options)
    assert operations(export.path) == operations(vits["none"][1].path)


def test_onnxruntime_multiplies_integers(tmp_path, vits, resnets):
    session_of(vits["cwac"][1].path, tmp_path / "vit.onnx")
    found = operations(tmp_path / "vit.onnx")
    assert found["MatMulIntegerToFloat"] == 4 * VIT["depth"]  # all linears
    assert found["MatMul"] + found["FusedMatMul"] == 2 * VIT["depth"]  # the products of attention, which stay float
    session_of(resnets["cwac"][1].path, tmp_path / "resnet.onnx")
    assert operations(tmp_path / "resnet.onnx")["QLinearConv"] == 4  # those that are read as integers again: each conv1


def test_a_dead_channel_keeps_its_bias(tmp_path):
    model = resnet()
    with torch.no_grad():
        for block in (model.layer1[0], model.layer2[0]):
            block.bn1.weight[:3] = torch.tensor([0.0, 1e-12, 1e-7])
            block.bn1.bias[:3] = torch.tensor([0.654321, 0.5, 3.0])
    artefact, export = exported(model, tmp_path)
    require_same_taps(export.path, artefact, model)


def test_layers_left_in_float_stay_float(tmp_path):
    artefact, export = exported(vit(), tmp_path, overrides=["blocks.0.*=float"])
    assert operations(export.path)["QuantizeLinear"] == export.n_layers == 4 * (VIT["depth"] - 1) + 1
    require_same_taps(export.path, artefact, vit())


def test_input_outputs_and_opset_are_as_stated(reference):
    model = onnx.load(reference[1])
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    (pixels,) = model.graph.input
    assert (pixels.name, pixels.type.tensor_type.elem_type) == ("pixels", onnx.TensorProto.UINT8)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (pixels, *model.graph.output)
    }
    assert shapes == {"pixels": ["batch", 3, 32, 32], **{f"z{i}": ["batch", 65, 192] for i in range(10)}}


def test_the_metadata_carry_the_extractor(reference):
    artefact, path, _ = reference
    about = session_of(path).get_modelmeta().custom_metadata_map
    extractor = load_backbone(quantised=artefact, kernel="float", device="cpu").extractor().to_dict()
    assert json.loads(about["extractor"]) == json.loads(json.dumps(extractor))
    assert about["extractor_digest"] == digest_of(extractor)
    assert (about["coldtap_version"], about["architecture"]) == (coldtap.__version__, "coldtap/vit-reference")
    assert (about["scheme"], about["compensation"]) == ("w8a8", "cwac")
    assert json.loads(about["calibration"])["images"] == len(CALIBRATION)


def test_no_path_of_this_machine_is_in_the_file(reference):
    data = reference[1].read_bytes()
    for path in (Path(coldtap.__file__).parent, Path(torch.__file__).parent, Path.home(), reference[0].parent):
        assert str(path).encode() not in data


def test_the_command_says_what_was_written_and_how_close_the_taps_are(tmp_path):
    skip_where_inexact(OneDnnKernel())  # onnxruntime saturates there too
    artefact, path = tmp_path / "resnet.safetensors", tmp_path / "new/folder/resnet.onnx"
    size = {"input_size": SIDE}
    quantize("test_resnet", CALIBRATION, artefact, random_weights=True, preprocess=size, device="cpu")
    result = run_coldtap("export-backbone", artefact, "--out", path)
    assert result.exit_code == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    assert first.startswith(f"{path}: test_resnet, 15 layers in w8a8, compensation cwac, ")
    assert first.endswith(f"opset {OPSET}; written")
    assert second == "pixels: uint8 (batch, 3, 32, 32); taps stage0 … stage4: float32 (batch, token, channel)"
    said = re.fullmatch(
        r"onnxruntime against .* taps differ by at most (\S+) of their largest value \(stage\d\)", third
    )
    assert said is not None
    assert float(said[1]) <= TOLERANCE
    require_same_taps(path, artefact, None)


def test_the_report_as_json(reference):
    artefact, path, said = reference
    assert (said["artefact"], said["file"], said["bytes"]) == (str(artefact), str(path), path.stat().st_size)
    assert (said["quantised_layers"], said["was_there"]) == (37, False)
    assert (said["taps"], said["input_shape"]) == ([f"z{i}" for i in range(10)], [3, 32, 32])
    assert 0 < said["largest_difference"] <= TOLERANCE


def test_without_onnxruntime_nothing_is_compared_and_the_file_is_the_same(vits, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    artefact, export = vits["none"]
    before = export.path.stat().st_mtime_ns
    again = export_backbone(artefact, export.path, model=vit())
    assert export.path.stat().st_mtime_ns == before
    assert (again.agreement, again.was_there, export.was_there) == (None, True, False)


def test_another_file_is_not_overwritten(tmp_path, vits):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(OptionError, match=r"net\.onnx is there already and holds something else: choose another `out`"):
        export_backbone(vits["none"][0], path, model=vit())
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w6a6"}, "cannot be exported: blocks.0.attn.proj has w6a6, as have 7 other layers, and ONNX"),
        ({"overrides": ["blocks.1.mlp.fc2=w4a8"]}, "cannot be exported: blocks.1.mlp.fc2 has w4a8, and ONNX"),
    ],
)
def test_other_widths_are_refused(tmp_path, options, message):
    artefact = artefact_of(vit(), tmp_path / "artefact.safetensors", **options)
    result = run_coldtap("export-backbone", artefact, "--out", tmp_path / "net.onnx")
    assert result.exit_code == 4
    assert message in error_line(result)
    assert "quantise with --scheme w8a8" in error_line(result)
    assert list(tmp_path.iterdir()) == [artefact]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{file}", "--out", "net.onnx", "--format", "tflite"], 2, "--format tflite: choose one of onnx"),
        (
            ["{file}", "--out", "{folder}"],
            2,
            "--out {folder} is a folder: give the path of a file, such as {folder}/backbone.onnx",
        ),
        # The place is looked at first: what would be exported is not even there.
        (["{folder}/none", "--out", "{file}/net.onnx"], 2, "{file} is a file, and no folder can be there"),
        (["{folder}/none", "--out", "{file}/new/net.onnx"], 2, "{file} is a file, and no folder can be there"),
        (["{folder}/none", "--out", "{folder}/" + 250 * "n"], 7, "a name in this path is too long: choose a shorter"),
        (["{folder}/none", "--out", "{folder}/new/" + 300 * "n"], 7, "a name in this path is too long"),
        (
            ["{folder}/none", "--out", "{folder}/net.onnx"],
            4,
            "{folder}/none: no such file; `coldtap quantize` makes one",
        ),
        (["{file}", "--out", "{folder}/net.onnx"], 4, "{file} is no artefact of `coldtap quantize`"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, words, code, message):
    file = tmp_path / "file"
    file.write_bytes(b"something else")
    result = run_coldtap("export-backbone", *(word.format(file=file, folder=tmp_path) for word in words))
    assert result.exit_code == code
    assert message.format(file=file, folder=tmp_path) in error_line(result)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line_with_its_remedy(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run_coldtap("export-backbone", tmp_path / "artefact", "--out", tmp_path / "net.onnx")
    assert result.exit_code == 7
    assert error_line(result) == f"export-backbone needs {package}: pip install 'coldtap[onnx]'"


def test_another_network_is_not_taken_for_the_backbone(vits):
    artefact, export = vits["none"]
    data = export.path.read_bytes()
    backbone, other, broken = (
        load_backbone(vit(), quantised=artefact, kernel=kernel, device="cpu") for kernel in ("float", "float", "int_mm")
    )
    with torch.no_grad():
        other.module.blocks[0].norm1.bias.add_(1)
        broken.module.pos_embed.fill_(torch.nan)
    said = r"the exported network is not the backbone: its tap z\d differs by 0\.\d+ of .*, where 0\.05 is allowed"
    with pytest.raises(ModelError, match=said):
        compare_taps(other, other, data)
    with pytest.raises(ModelError, match=r"its tap z\d differs by inf of"):
        compare_taps(broken, backbone, data)


def test_a_backbone_that_differs_between_kernels_is_allowed_to_differ_in_onnxruntime(vits):
    artefact, export = vits["none"]
    backbone, other = (load_backbone(vit(), quantised=artefact, kernel="float", device="cpu") for _ in range(2))
    with torch.no_grad():
        other.module.blocks[0].norm1.bias.add_(1)
    found = compare_taps(other, backbone, export.path.read_bytes())
    assert found is not None
    assert found.largest_difference > 0.05
