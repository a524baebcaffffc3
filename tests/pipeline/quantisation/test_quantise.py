"""Whole models: families, the sequential driver, folding, the artefact, and the commands around it."""

import copy
import hashlib
import json
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from coldtap.errors import (
    ModelError,
    OptionError,
    RecipeMismatchError,
    SourceError,
    StoreError,
)
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.backbones.integer.artefact import read_artefact
from coldtap.pipeline.backbones.integer.families import anatomy_of
from coldtap.pipeline.backbones.integer.layers import quantised_layers
from coldtap.pipeline.backbones.integer.run_on import run_on
from coldtap.pipeline.backbones.integer.scheme import SchemeByLayer
from coldtap.pipeline.backbones.taps import read_taps_of
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.job import cache_features
from coldtap.pipeline.quantisation.compensation.cwac import compensate_channels
from coldtap.pipeline.quantisation.compensation.qwt import compensate_blocks
from coldtap.pipeline.quantisation.compensation.site_table import left_float_lines
from coldtap.pipeline.quantisation.ptq.calibration_images import read_calibration_images
from coldtap.pipeline.quantisation.ptq.model import quantise
from coldtap.pipeline.quantisation.ptq.sites import units_at_work
from coldtap.pipeline.quantisation.quantize import quantize
from coldtap.stores.compensation.channel_affine import ChannelAffine
from coldtap.stores.reading.store import open_store
from tests.helpers.jobs import coldtap, error_line, files, in_memory
from tests.helpers.kernels import exact_kernel
from tests.helpers.quantised_models import (
    FAMILIES,
    HOW,
    backbone_of,
    bottleneck_resnet,
    closeness_db,
    pixels,
    quantised,
    resnet,
    snr_db,
    taps_of,
    vit,
)

FRESH = pixels(16, seed=3)


@pytest.fixture(scope="module")
def four_bits():
    """Each family in w4a4, as yet uncompensated."""
    return {name: quantised(make(), "w4a4") for name, make in FAMILIES.items()}


def own(models):
    """A copy whose quantised model may be changed."""
    return replace(models, model=copy.deepcopy(models.model))


def with_cwac(models, sites=None, **options):
    copied = own(models)
    chosen = copied.anatomy.choose_sites(sites or copied.anatomy.sites)
    return copied, compensate_channels(copied, sites=chosen, **options)


# Families.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_near_its_float_taps_at_eight_bits_and_its_float_half_is_the_backbone(family):
    module = FAMILIES[family]()
    backbone = backbone_of(module)
    models = quantised(module, "w8a8")
    wanted = backbone(FRESH)
    for tap, same, got in zip(
        wanted, taps_of(models.float_model, FRESH, backbone), taps_of(models.model, FRESH, backbone), strict=True
    ):
        torch.testing.assert_close(same, tap, rtol=0, atol=1e-4 * float(tap.abs().max()))
        assert closeness_db(tap, got) > 25
    floats = [name for name, layer in models.model.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)]
    assert not floats
    assert len(quantised_layers(models.model)) == len(models.anatomy.layers) > 8


def test_vit_layers_and_sites_are_those_of_its_blocks():
    anatomy = quantised(vit()).anatomy
    of_block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert anatomy.layers == ["patch_embed.proj", *(f"blocks.{i}.{layer}" for i in range(2) for layer in of_block)]
    assert anatomy.choose_sites(anatomy.sites) == [
        f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.proj", "mlp.fc2")
    ]
    assert next(anatomy.layers_of(unit) for unit in anatomy.units) == ["patch_embed.proj"]
    assert anatomy.choose_sites(["*"]) == anatomy.layers


def test_norms_are_folded_and_their_place_is_kept():
    models = quantised(bottleneck_resnet())
    kinds = Counter(type(module).__name__ for module in models.model.modules())
    assert kinds["BatchNorm2d"] == 0
    assert isinstance(models.model.get_submodule("layer1.0.bn1"), nn.Identity)
    assert models.model.get_submodule("layer1.0.conv1").bias is not None
    assert "layer2.0.downsample.0" in models.anatomy.layers


def test_what_is_not_handled_is_named_and_stays_float():
    module = resnet(timm.models.resnet.Bottleneck, cardinality=4, base_width=16)
    models = quantised(module)
    assert models.anatomy.left_float == {
        f"layer{i}.0.conv2": "a grouped, depthwise or otherwise padded convolution" for i in range(1, 5)
    }
    assert type(models.model.get_submodule("layer1.0.conv2")) is nn.Conv2d
    hybrid = anatomy_of(timm.create_model("vit_tiny_r_s16_p8_224", img_size=64))
    assert hybrid.left_float["patch_embed.backbone.conv"] == "StdConv2dSame is not handled"
    attention = quantised(resnet(block_args={"attn_layer": "eca"}))
    named = attention.anatomy.left_float
    assert named
    assert all(".se." in name for name in named), named


def test_what_stays_float_is_told_in_a_line_a_reason():
    reasons = {**{f"conv{i}": "grouped" for i in range(5)}, "se": "ConvMlp is not handled"}
    assert left_float_lines(reasons) == [
        "left in float: conv0, conv1, conv2 and 2 more (grouped)",
        "left in float: se (ConvMlp is not handled)",
    ]


def test_heads_are_no_part_of_what_taps_need():
    heads = {"num_classes": 5, "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    for module in (vit(num_classes=5), VisionTransformerDistilled(**heads).eval()):
        models = quantised(module)
        assert not [layer for layer in models.anatomy.layers if "head" in layer]
        assert type(models.model.head) is nn.Linear


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: timm.create_model("convnext_atto", num_classes=0), "ConvNeXt cannot be quantised yet: ViT and DeiT"),
        (
            lambda: vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
            "ViT blocks of type ParallelScaling",
        ),
    ],
)
def test_another_family_is_refused_by_name(module, said):
    with pytest.raises(ModelError, match=said):
        quantised(module())


def test_a_model_that_does_more_than_its_family_is_refused():
    class Twice(timm.models.vision_transformer.VisionTransformer):
        def forward_intermediates(self, x, **options):
            maps = super().forward_intermediates(x, **options)
            return [(2 * one[0], 2 * one[1]) if isinstance(one, tuple) else 2 * one for one in maps]

    torch.manual_seed(0)
    module = Twice(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0).eval()
    with pytest.raises(ModelError, match=r"Twice taken apart into its blocks .*cannot be quantised yet"):
        quantised(module)


def test_overrides_give_layers_other_bits_or_leave_them_float():
    models = quantised(vit(), "w4a4", **{"blocks.1.*": "w6a6", "*.mlp.fc1": "float"})
    bits = {name: str(layer.scheme) for name, layer in quantised_layers(models.model).items()}
    assert bits["blocks.0.attn.qkv"] == "w4a4"
    assert bits["blocks.1.mlp.fc2"] == "w6a6"
    assert "blocks.0.mlp.fc1" not in bits
    assert models.anatomy.left_float["blocks.1.mlp.fc1"] == "as asked"
    with pytest.raises(OptionError, match="leave every layer in float"):
        quantised(vit(), **{"*": "float"})


def test_reparameterisation_helps_where_channels_differ_and_an_unfit_model_goes_without():
    module = vit()
    with torch.no_grad():
        for block in module.blocks:
            for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight.copy_(torch.logspace(-1.5, 1, 48))
                norm.bias.copy_(norm.weight * torch.linspace(-1, 1, 48))
                reader.weight.div_(norm.weight)  # small channels matter as much as large ones
    backbone = backbone_of(module)
    wanted = backbone(FRESH)[-1]
    found = {
        way: snr_db(wanted, taps_of(quantised(module, "w6a6", reparameterised=way).model, FRESH, backbone)[-1])
        for way in (True, False)
    }
    assert found[True] > found[False] + 6
    assert quantised(resnet()).anatomy.norms_before == {}


# The driver and the compensations.


@pytest.mark.parametrize("family", FAMILIES)
def test_compensation_lowers_the_error_of_every_tap_on_other_images(family):
    """Of 512 images: the last map of a ResNet is one pixel here, and QwT weighs 64 channels or more at once."""
    backbone, scheme = backbone_of(FAMILIES[family]()), SchemeByLayer.parse("w4a4", ())
    batches = list(pixels(512).split(32))
    models = quantise(backbone, batches, scheme, ranges="least-squares", reparameterised=True, seed=0)
    compensated, fits = with_cwac(models)
    qwt = own(models)
    blocks = compensate_blocks(qwt)
    wanted = backbone(FRESH)
    before, cwac, linear = (
        [snr_db(tap, got) for tap, got in zip(wanted, taps_of(one.model, FRESH, backbone), strict=True)]
        for one in (models, compensated, qwt)
    )
    # The stem's tap: QwT leaves it, and a ViT's stem has none of CWAC's sites.
    assert linear[0] == before[0]
    assert cwac[0] > before[0] if models.anatomy.family == "resnet" else cwac[0] == before[0]
    for after in (cwac, linear):
        assert all(level > base + 0.5 for level, base in zip(after[1:], before[1:], strict=True)), (before, after)
    assert all(fit.after < fit.before for fit in [*fits, *blocks])


def test_a_site_is_fitted_on_the_stream_that_its_prefix_gives_once_it_is_compensated(four_bits):
    models = own(four_bits["vit"])
    batch = models.images[0]
    before = [unit.run for unit in models.anatomy.units]
    stem = before[0](models.model, batch)
    first = before[1](models.model, stem)
    seen = []
    for work in units_at_work(models, "local"):
        seen.append(next(iter(work.pairs())))
        for site in models.anatomy.layers_of(work.unit):
            if site.endswith("mlp.fc2"):
                affine = ChannelAffine(scale=np.full(48, 1.5), offset=np.full(48, 0.25))
                models.model.get_submodule(site).compensate(affine)
    torch.testing.assert_close(seen[2].input, before[1](models.model, stem))
    assert not torch.allclose(seen[2].input, first)
    # Local: the float unit on that stream; the float model's own stream where the target is true.
    torch.testing.assert_close(seen[2].wanted, before[2](models.float_model, seen[2].input))
    exact = before[2](models.float_model, before[1](models.float_model, before[0](models.float_model, batch)))
    true = [next(iter(work.pairs())) for work in units_at_work(four_bits["vit"], "true")]
    torch.testing.assert_close(true[2].wanted, exact)


def test_a_site_gives_its_own_layers_outputs(four_bits):
    models = four_bits["vit"]
    outputs = {}

    def keep(module, inputs, output):
        outputs["fc2"] = output

    layer = models.model.get_submodule("blocks.1.mlp.fc2")
    handle = layer.register_forward_hook(keep)
    with torch.inference_mode():
        models.anatomy.output(models.model, models.images[2])
    handle.remove()
    work = next(work for work in units_at_work(models, "local") if work.unit.name == "blocks.1")
    pairs = list(work.pairs("blocks.1.mlp.fc2"))
    torch.testing.assert_close(pairs[2].got, outputs["fc2"])
    assert [pair.fold for pair in pairs] == [0, 1, 2, 3]


def test_qwt_is_the_least_squares_map_of_a_blocks_input(four_bits):
    models = own(four_bits["vit"])
    work = next(work for work in units_at_work(models, "local") if work.unit.name)
    pairs = list(work.pairs())
    x = torch.cat([pair.input for pair in pairs]).flatten(0, 1).double()
    missing = torch.cat([pair.wanted - pair.got for pair in pairs]).flatten(0, 1).double()
    fits = compensate_blocks(models, ridges=(0.0,))
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), missing).solution
    block = models.model.get_submodule("blocks.0")
    assert fits[0].site == "blocks.0"
    torch.testing.assert_close(block.qwt.weight[0].double(), solved[:-1], rtol=2e-3, atol=2e-5)
    plain = four_bits["vit"].model.get_submodule("blocks.0")
    with torch.inference_mode():
        added = block(pairs[0].input) - plain(pairs[0].input)
    torch.testing.assert_close(added.double(), pairs[0].input.double() @ solved[:-1] + solved[-1], rtol=0, atol=1e-3)


def test_parameters_are_counted_before_and_after_folding(four_bits):
    _, fits = with_cwac(four_bits["vit"])
    assert sum(fit.n_parameters for fit in fits) == 4 * 48 * 2  # 4 d a block for two sites
    assert sum(fit.n_folded_parameters for fit in fits) == 0
    plain = quantised(FAMILIES["deit"](), "w4a4", reparameterised=False)
    _, fits = with_cwac(plain, sites=["blocks.*.attn.qkv"])
    assert [fit.n_folded_parameters for fit in fits] == [3 * 48] * 2  # no bias there: it gains one
    assert [fit.n_parameters for fit in compensate_blocks(own(four_bits["vit"]))] == [48 * 49] * 2


def test_a_site_that_cannot_be_folded_is_refused_by_name(four_bits):
    with pytest.raises(ModelError, match=r"site 'blocks.\*.ls1' cannot be folded: no quantised layer has that name"):
        four_bits["vit-layer-scale"].anatomy.choose_sites(["blocks.*.attn.proj", "blocks.*.ls1"])


# Folding.


def operations(model, images):
    """Every operator that a forward pass runs with the shapes of its inputs, and how often."""
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profile:
        read_taps_of(model, None, 0)(images)
    return Counter(
        (event.name, str(event.input_shapes)) for event in profile.events() if event.name.startswith(("aten", "onednn"))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_compensation_leaves_the_same_graph_and_the_same_integers(four_bits, family):
    plain = own(four_bits[family])
    folded, fits = with_cwac(plain)
    assert fits
    for name, layer in quantised_layers(folded.model).items():
        before = plain.model.get_submodule(name)
        assert torch.equal(layer.product().codes, before.product().codes)
        assert layer.product().input == before.product().input
        assert (layer.product().bias is None) == (before.product().bias is None)
    batch = plain.images[0]
    for models in (plain, folded):
        run_on(models.model, exact_kernel())
        read_taps_of(models.model, None, 0)(batch)  # weights are packed at the first pass
    assert operations(folded.model, batch) == operations(plain.model, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_compensation_is_the_affine_map_after_the_layer(four_bits, family):
    """Site by site, on the same input: sums of integers are exact, so the difference is the rounding of one product."""
    models = own(four_bits[family])
    folded, fits = with_cwac(models)
    for fit in fits:
        plain, layer = (one.model.get_submodule(fit.site) for one in (models, folded))
        plain.use(exact_kernel())
        layer.use(exact_kernel())
        shape = (2, 5, plain.codes.shape[1]) if plain.window is None else (2, plain.codes.shape[1], 9, 9)
        values = plain.input.restore(torch.randint(0, 16, shape)) * 0.7
        axes = (-1,) if plain.window is None else (-1, 1, 1)
        scale, offset = (torch.from_numpy(part).reshape(axes) for part in (layer.affine.scale, layer.affine.offset))
        wanted = plain(values) * scale + offset
        torch.testing.assert_close(layer(values).double(), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_whole_models_agree_between_simulation_and_integers(family, scheme):
    """But for codes that rounding puts on the other side: rare, and one step."""
    models, backbone = quantised(FAMILIES[family](), scheme), backbone_of(FAMILIES[family]())
    simulated = taps_of(models.model, FRESH, backbone)
    run_on(models.model, exact_kernel())
    for wanted, got in zip(simulated, taps_of(models.model, FRESH, backbone), strict=True):
        assert closeness_db(wanted, got) > (45 if scheme == "w8a8" else 35)


# Calibration images.


def test_calibration_images_are_the_train_splits_chosen_by_the_seed():
    source = in_memory(train=40, val=20)
    first, again, other = (read_calibration_images(source, HOW, n_images=24, seed=seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert [len(batch) for batch in first.batches] == [6, 6, 6, 6]
    everything = {image.numpy().tobytes() for image in torch.cat(read_train(source))}
    assert {image.numpy().tobytes() for image in torch.cat(list(first.batches))} <= everything
    assert read_calibration_images(source, HOW, n_images=None, seed=0).n_images == 40


def read_train(source):
    return list(read_calibration_images({"train": source["train"]}, HOW, n_images=None, seed=0).batches)


def test_images_that_cannot_be_read_are_passed_over_and_counted():
    good = in_memory(train=30)["train"]
    images = {"train": [*good[:20], (b"no image", 0), (b"", 1), *good[20:]]}
    found = read_calibration_images(images, HOW, n_images=None, seed=0)
    assert (found.n_images, found.n_unusable) == (30, 2)


# The artefact and its commands.


OPTIONS = {"images": 32, "preprocess": HOW, "device": "cpu"}


@pytest.mark.parametrize("family", ["vit", "resnet", "deit"])
@pytest.mark.parametrize("compensate", ["none", "qwt", "cwac"])
def test_an_artefact_gives_back_the_model_that_it_was_made_of(tmp_path, four_bits, family, compensate):
    module, path = FAMILIES[family](), tmp_path / "q.safetensors"
    source = in_memory(train=40)
    report = quantize(module, source, path, scheme="w4a4", compensate=compensate, **OPTIONS)
    assert report.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.n_bytes == path.stat().st_size
    again = tmp_path / "again.safetensors"
    quantize(module, source, again, scheme="w4a4", compensate=compensate, **OPTIONS)
    assert again.read_bytes() == path.read_bytes()
    loaded = load_backbone(module, quantised=path, kernel="float", device="cpu")
    assert loaded.extractor().quantisation == {
        "scheme": "w4a4",
        "compensation": compensate,
        "artefact": report.digest,
    }
    assert loaded.weights == backbone_of(module).weights
    made = rebuilt(module, source, compensate)
    for wanted, got in zip(taps_of(made.model, FRESH, loaded), loaded(FRESH), strict=True):
        assert snr_db(wanted, got) > 60


def rebuilt(module, source, compensate):
    """The same by the parts that `quantize` is made of."""
    images = read_calibration_images(source, HOW, n_images=32, seed=0)
    scheme = SchemeByLayer.parse("w4a4", ())
    models = quantise(backbone_of(module), images.batches, scheme, ranges="least-squares", reparameterised=True, seed=0)
    if compensate == "cwac":
        compensate_channels(models, sites=models.anatomy.choose_sites(models.anatomy.sites))
    if compensate == "qwt":
        compensate_blocks(models)
    return models


def test_an_artefact_holds_codes_at_their_width_and_no_float_copy_of_them(tmp_path):
    path = tmp_path / "q.safetensors"
    quantize(vit(), in_memory(train=40), path, scheme="w6a6", **OPTIONS)
    tensors = load_file(path)
    assert tensors["codes/blocks.0.attn.qkv"].numel() == 48 * 144 * 6 // 8
    assert tensors["codes/patch_embed.proj"].numel() == 48 * 3 * 8 * 8  # eight bits
    assert not [name for name in tensors if name.startswith("float/") and name.endswith(("qkv.weight", "fc1.bias"))]
    assert {name.split("/")[0] for name in tensors} == {
        "codes",
        "weight_scale",
        "bias",
        "cwac.scale",
        "cwac.offset",
        "float",
    }
    artefact = read_artefact(path)
    assert artefact.about.calibration["images"] == 32
    assert artefact.about.settings["reparameterised"] is True


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """The reference backbone in w8a8, and the images that it was calibrated on."""
    folder = tmp_path_factory.mktemp("artefact")
    source = in_memory(train=48, val=8)
    report = quantize("coldtap/vit-reference", source, folder / "q.safetensors", images=32, device="cpu")
    return report.path, source


def test_a_quantised_store_says_so_and_float_features_never_stand_in_for_it(tmp_path, artefact):
    path, source = artefact
    options = {"batch_size": 8, "device": "cpu", "tier": "float32"}
    cache_features(source, tmp_path / "q", quantized=path, **options)
    store = open_store(tmp_path / "q")
    assert store.recipe.extractor.quantisation["artefact"] == read_artefact(path).digest
    assert store.recorded["environment"]["kernel"] in ("onednn", "int_mm", "float")
    with pytest.raises(RecipeMismatchError, match="quantisation"):
        cache_features(source, tmp_path / "q", **options)
    cache_features(source, tmp_path / "f", **options)
    assert open_store(tmp_path / "f").recipe.extractor.quantisation is None
    other = path.with_name("other.safetensors")
    quantize("coldtap/vit-reference", source, other, images=32, compensate="none", device="cpu")
    with pytest.raises(RecipeMismatchError, match="artefact"):
        cache_features(source, tmp_path / "q", quantized=other, **options)
    assert cache_features(source, tmp_path / "q", quantized=path, **options).status == "unchanged"


def test_workers_run_the_kernel_that_was_chosen_and_write_the_same_bytes(tmp_path, artefact):
    path, source = artefact
    options = {"batch_size": 8, "device": "cpu", "quantized": path, "kernel": exact_kernel().name}
    cache_features(source, tmp_path / "one", **options)
    store = tmp_path / "two"
    cache_features(source, store, workers=2, **options)
    assert files(store) == files(tmp_path / "one")


def test_a_store_does_not_go_on_with_another_kernel(tmp_path, artefact):
    path, source = artefact
    options = {"batch_size": 8, "device": "cpu", "quantized": path}
    begun = tmp_path / "s"
    cache_features(source, begun, kernel="float", **options)
    (begun / "manifest").unlink()
    with pytest.raises(StoreError, match=rf"kernel: float → {exact_kernel().name}.* with the same `kernel`"):
        cache_features(source, begun, kernel=exact_kernel().name, **options)
    # What a clock would choose today does not matter.
    assert cache_features(source, begun, kernel="auto", **options).status == "written"
    assert open_store(begun).recorded["environment"]["kernel"] == "float"


def test_the_commands_quantise_cache_train_and_predict(tmp_path, images):
    out = tmp_path / "q.safetensors"
    made = coldtap("quantize", "coldtap/vit-reference", "--calibration", images, "--out", out, "--images", "24")
    assert made.exit_code == 0, made.stderr
    assert "37 layers in w8a8" in made.stdout
    assert "blocks.8.mlp.fc2" in made.stdout
    cached = coldtap("cache-features", images, tmp_path / "s", "--quantized", out, "--kernel", "int")
    assert cached.exit_code == 0, cached.stderr
    assert "kernel " in cached.stderr
    run = tmp_path / "run"
    seen = coldtap("inspect", tmp_path / "s").stdout
    assert f"(w8a8, compensation cwac, artefact {read_artefact(out).digest[:12]}, weights " in seen
    trained = coldtap("train-adaptor", tmp_path / "s", "--adaptor", "linear", "--epochs", "1", "--out", run)
    assert trained.exit_code == 0, trained.stderr
    predicted = coldtap("predict", run, images, "--quantized", out)
    assert predicted.exit_code == 0, predicted.stderr
    as_float = coldtap("predict", run, images)
    assert as_float.exit_code == 4
    assert "give its file with --quantized" in error_line(as_float)


def test_predict_names_the_artefact_that_it_needs_and_the_one_that_it_was_given(tmp_path, images):
    made = {
        "ours": quantize("coldtap/vit-reference", images, tmp_path / "ours", images=16, device="cpu"),
        "other": quantize(
            "coldtap/vit-reference", images, tmp_path / "other", images=16, device="cpu", preprocess={"crop_pct": 0.5}
        ),
    }
    digests = {name: report.digest[:12] for name, report in made.items()}
    for name, options in (("quantised", {"quantized": made["ours"].path}), ("float", {})):
        cache_features(images, tmp_path / name, gather=["pooled"], taps="9", device="cpu", **options)
        words = ("--adaptor", "linear", "--epochs", "1", "--out", tmp_path / f"run-{name}")
        trained = coldtap("train-adaptor", tmp_path / name, *words)
        assert trained.exit_code == 0, trained.stderr
    for run, given, said in (
        (
            "run-quantised",
            "other",
            f"--quantized {tmp_path / 'other'} is another quantised backbone (w8a8, artefact {digests['other']}) than "
            f"that whose features {tmp_path / 'run-quantised'} was trained on (w8a8, artefact {digests['ours']})",
        ),
        (
            "run-float",
            "ours",
            f"--quantized {tmp_path / 'ours'} is a quantised backbone (w8a8, artefact {digests['ours']}), and "
            f"{tmp_path / 'run-float'} was trained on features of a float one: leave --quantized out",
        ),
    ):
        result = coldtap("predict", tmp_path / run, images, "--quantized", tmp_path / given)
        assert result.exit_code == 4
        assert said in error_line(result)
        assert "preprocessing" not in error_line(result)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of class folders."""
    folder = tmp_path_factory.mktemp("images")
    for split, some in in_memory(train=40, val=8, test=8).items():
        for i, (image, label) in enumerate(some):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i}.png")
    return folder


def test_a_killed_quantize_leaves_an_older_artefact_whole(tmp_path, images, server):
    out = tmp_path / "q.safetensors"
    words = ("quantize", "coldtap/vit-reference", "--calibration", images, "--out", out, "--images", "24")
    job = server.start(*words)
    assert job.wait() == 0, job.err
    before = out.read_bytes()
    job = server.start(*words, "--scheme", "w4a4")
    job.send(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert out.read_bytes() == before
    job = server.start(*words, "--scheme", "w4a4")
    assert job.wait() == 0, job.err
    assert out.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


# Bad input.


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--images", "8"], 2, "--images 8: give at least 16 calibration images"),
        (["--seed", "-1"], 2, "--seed -1: give 0 or more"),
        (["--images", "4000"], 3, "calibration needs 4000 different images, and"),
        (["--scheme", "w2b2"], 2, "scheme 'w2b2': choose one of w8a8, w6a6, w4a8, w4a4"),
        (["--scheme", "int8"], 2, "scheme 'int8': choose one of w8a8, w6a6, w4a8, w4a4"),
        (["--compensate", "lora"], 2, "--compensate lora: choose one of none, qwt, cwac"),
        (["--ranges", "minmax"], 2, "--ranges minmax: choose one of percentile, least-squares"),
        (["--target", "far"], 2, "--target far: choose one of local, true"),
        (["--ridge", "-1"], 2, "--ridge -1.0: give a finite number, 0 or more"),
        (["--ridge", "inf"], 2, "--ridge inf: give a finite number, 0 or more"),
        (["--override", "block.0.*=w8a8"], 2, "--override block.0.*=…: no layer has that name"),
        (["--override", "blocks"], 2, "--override blocks: expected PATTERN=SCHEME"),
        (["--override", "*=float"], 2, "leave every layer in float"),
        (["--site", "blocks.*.ls1"], 4, "site 'blocks.*.ls1' cannot be folded"),
        (["--site", "*", "--compensate", "none"], 2, "--site is of --compensate cwac; none was asked for"),
        (["--device", "cuda"], 7, "this machine has 0 GPUs"),
        (["--checkpoint", "nothing.pt"], 2, "comes with its weights"),
    ],
)
def test_bad_options_of_quantize_are_one_line_and_nothing_is_written(tmp_path, images, options, code, said):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    out = tmp_path / "q.safetensors"
    result = coldtap("quantize", "coldtap/vit-reference", "--calibration", images, "--out", out, *options)
    assert result.exit_code == code
    assert said in error_line(result)
    assert not out.exists()


def test_an_artefact_replaces_no_other_file_and_its_place_is_looked_at_first(tmp_path, images):
    other, folder = tmp_path / "other.parquet", tmp_path / "folder"
    other.write_bytes(b"dear to somebody")
    folder.mkdir()
    for out, code, said in (
        (other, 2, "would replace another file"),
        (folder, 2, f"--out {folder} is a folder: give the path of a file"),
        (other / "q.safetensors", 2, f"{other} is a file, and no folder can be there"),
        (tmp_path / (250 * "q"), 7, "a name in this path is too long: choose a shorter one"),
        (tmp_path / "new" / (300 * "q"), 7, "a name in this path is too long: choose a shorter one"),
    ):
        # Nothing is decoded before: the source is not even there.
        result = coldtap("quantize", "coldtap/vit-reference", "--calibration", tmp_path / "nothing", "--out", out)
        assert result.exit_code == code
        assert said in error_line(result)
    assert other.read_bytes() == b"dear to somebody"
    assert not list(folder.iterdir())


def test_a_kernel_without_a_quantised_backbone_is_refused(tmp_path, images):
    for kernel in ("int", "bogus"):
        result = coldtap("cache-features", images, tmp_path / "s", "--kernel", kernel)
        assert result.exit_code == 2
        assert f"--kernel {kernel} is of a quantised backbone" in error_line(result)


def test_calibration_that_is_empty_or_not_there_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for calibration in (tmp_path / "empty", tmp_path / "nowhere"):
        result = coldtap("quantize", "coldtap/vit-reference", "--calibration", calibration, "--out", tmp_path / "q")
        assert result.exit_code == 3
        assert str(calibration) in error_line(result)
    few = in_memory(train=10)["train"]
    for images in (few, few * 3):  # copies tell the images held out nothing
        with pytest.raises(SourceError, match=r"calibration needs 16 different images, and .* has 10 that can be read"):
            quantize("coldtap/vit-reference", {"train": images}, tmp_path / "q", device="cpu")


def test_images_of_another_size_are_resized_as_they_will_be_when_features_are_made(tmp_path):
    source = {"train": [(image.resize((50, 41)), label) for image, label in in_memory(train=20)["train"]]}
    report = quantize("coldtap/vit-reference", source, tmp_path / "q.safetensors", device="cpu")
    assert read_artefact(report.path).preprocess.height == 32
    result = coldtap("cache-features", tmp_path, tmp_path / "s", "--quantized", report.path, "--input-size", "64")
    assert result.exit_code in (2, 3)


def test_preprocessing_of_the_calibration_cannot_be_changed(artefact):
    found = r"was calibrated with another .* \(calibrated → asked: crop_pct: 1.0 → 0.5\): leave the options of the "
    with pytest.raises(OptionError, match=found):
        load_backbone(quantised=artefact[0], preprocess={"crop_pct": 0.5, "input_size": 32, "mean": None})
    with pytest.raises(OptionError, match=r"asked: height: 32 → 64; width: 32 → 48\)"):
        load_backbone(quantised=artefact[0], preprocess={"input_size": (64, 48)})
    with pytest.raises(OptionError, match="unknown preprocessing crop; known: input_size"):
        load_backbone(quantised=artefact[0], preprocess={"crop": 1})
    other = Preprocess.from_dict({**read_artefact(artefact[0]).about.preprocess, "mean": (0.1, 0.1, 0.1)})
    with pytest.raises(OptionError, match=r"asked: mean: \[.*\] → \[0.1, 0.1, 0.1\]\)"):
        load_backbone(quantised=artefact[0], preprocess=other)


@pytest.mark.parametrize("size", [32, (32, 32), (3, 32, 32)])
def test_preprocessing_of_the_calibration_may_be_said_again(artefact, size):
    said = read_artefact(artefact[0]).preprocess
    asked = {"input_size": size, "crop_pct": said.crop_pct, "mean": list(said.mean), "std": None}
    assert load_backbone(quantised=artefact[0], preprocess=asked, kernel="float").preprocess == said
    assert load_backbone(quantised=artefact[0], preprocess=said, kernel="float").preprocess == said


def test_an_artefact_of_another_backbone_is_refused(tmp_path, artefact):
    path, _source = artefact
    with pytest.raises(
        ModelError, match="is of coldtap/vit-reference, and `model='vit_tiny_patch16_224'` was asked for"
    ):
        load_backbone("vit_tiny_patch16_224", quantised=path)
    with pytest.raises(ModelError, match=r"is of a backbone with weights .* and the module that was given has"):
        load_backbone(vit(), quantised=path)
    made = tmp_path / "vit.safetensors"
    quantize(vit(), in_memory(train=40), made, **OPTIONS)
    with pytest.raises(ModelError, match=r"was made of a module from Python \(VisionTransformer\): give it as `model`"):
        load_backbone(quantised=made)
    with pytest.raises(ModelError, match="is of a backbone with weights"):
        load_backbone(vit(depth=3), quantised=made)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"random_weights": True}, "`quantized` brings its weights: leave out `checkpoint` and `random_weights`"),
        ({"precision": "bfloat16"}, "`precision='bfloat16'`: what a quantised backbone keeps in float is float32"),
        ({"tap_names": ["blocks.0"]}, "a quantised backbone has the taps of its family: leave out tap_names"),
        ({"kernel": "vnni"}, "`kernel='vnni'`: choose one of auto, int, float"),
    ],
)
def test_options_that_do_not_go_with_an_artefact_are_refused(artefact, options, said):
    with pytest.raises(OptionError, match=said):
        load_backbone(quantised=artefact[0], **options)


def damaged(path, tmp_path, change):
    tensors = load_file(path)
    said = json.loads(json.dumps(json.loads(_metadata(path))))
    change(tensors, said)
    out = tmp_path / "damaged.safetensors"
    save_file(tensors, out, {"coldtap": json.dumps(said)})
    return out


def _metadata(path):
    with safetensors.safe_open(str(path), "pt") as file:
        return file.metadata()["coldtap"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, said: said.update(format=9), "has format 9; this version of coldtap reads 1"),
        (lambda tensors, said: said.pop("layers"), "is no artefact of `coldtap quantize`"),
        (lambda tensors, said: said.pop("scheme"), "is no artefact of `coldtap quantize`"),
        (lambda tensors, said: tensors.pop("codes/blocks.0.mlp.fc1"), "does not fit VisionTransformer"),
        (lambda tensors, said: tensors.pop("float/cls_token"), "it lacks cls_token"),
        (
            lambda tensors, said: tensors.update({"codes/blocks.0.mlp.fc1": torch.zeros(5, dtype=torch.uint8)}),
            "5 bytes for 73728 codes of 8 bits",
        ),
        (
            lambda tensors, said: tensors.update({"float/norm.weight": torch.zeros(7)}),
            r"norm.weight has shape \(192,\)",
        ),
        (lambda tensors, said: said["layers"].update({"no.such": {}}), "is no artefact of `coldtap quantize`"),
        (
            lambda tensors, said: said["layers"].update({"no.such": next(iter(said["layers"].values()))}),
            "does not fit VisionTransformer",
        ),
    ],
)
def test_a_damaged_artefact_is_one_clear_error(tmp_path, artefact, change, said):
    with pytest.raises(ModelError, match=said):
        load_backbone(quantised=damaged(artefact[0], tmp_path, change))


def test_what_is_no_artefact_is_refused(tmp_path):
    for name, content in (("text", b"hello"), ("cut", b"\x08" + bytes(7))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match="is no artefact of `coldtap quantize`"):
            load_backbone(quantised=tmp_path / name)
    with pytest.raises(ModelError, match="no such file; `coldtap quantize` makes one"):
        load_backbone(quantised=tmp_path / "nothing")
    with pytest.raises(ModelError, match="is not a regular file: give a file of `coldtap quantize`"):
        load_backbone(quantised=tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="is no artefact of `coldtap quantize`"):
        load_backbone(quantised=tmp_path / "other.safetensors")


def test_a_backbone_in_half_precision_is_not_quantised():
    backbone = load_backbone(vit(), preprocess=HOW, precision="bfloat16", device="cpu")
    with pytest.raises(OptionError, match="a backbone is quantised from float32; this one is in bfloat16"):
        quantise(
            backbone,
            [pixels(4)],
            SchemeByLayer.parse("w8a8", ()),
            ranges="percentile",
            reparameterised=False,
            seed=0,
        )
