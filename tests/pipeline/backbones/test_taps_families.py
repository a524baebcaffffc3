"""For each family of backbones, what is stored is what plain hooks on the plain model give."""

import copy
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import nn

from coldtap.adaptors import train_adaptor
from coldtap.errors import MissingFeaturesError, ModelError, OptionError
from coldtap.pipeline.job import cache_features
from coldtap.stores import open_store
from tests.helpers.jobs import TAPS, TinyNet, cache, in_memory, read
from tests.helpers.pictures import picture

BATCH = 4


@dataclass(frozen=True)
class Family:
    """A timm model, made small where it can be without becoming another kind."""

    name: str
    side: int
    prefix: int = 0
    small: dict = field(default_factory=dict)

    def __str__(self):
        return self.name


VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3}
TOKENS = [
    Family("vit_tiny_patch16_224", 48, 1, {**VIT, "img_size": 48}),
    Family("vit_medium_patch16_gap_240", 48, 0, {**VIT, "img_size": 48}),
    Family("vit_base_patch16_siglip_gap_224", 32, 0, {**VIT, "img_size": 32}),
    Family("vit_medium_patch16_reg4_gap_256", 48, 4, {**VIT, "img_size": 48}),
    Family("deit_tiny_distilled_patch16_224", 32, 2, {**VIT, "img_size": 32}),
    Family("vit_small_patch14_dinov2", 56, 1, {**VIT, "img_size": 56}),
    Family("vit_small_patch14_reg4_dinov2", 70, 5, {**VIT, "img_size": 70}),
]
SWIN = {"img_size": 56, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
STAGES = [
    Family("swin_tiny_patch4_window7_224", 56, small=SWIN),
    Family("convnext_atto", 64, small={"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
    Family("test_resnet", 64),
]


def built(family):
    """A model whose weights and statistics are all noise, so that no layer is an identity."""
    model = timm.create_model(family.name, **family.small).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
        for name, statistic in model.named_buffers():
            if "running" in name:
                statistic.add_(torch.rand(statistic.shape, generator=noise))
    return model


def hooked(model):
    """The modules whose outputs are the taps of a model; z0 is the input of the first of `blocks`."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    if hasattr(model, "stages"):
        return list(model.stages)
    if hasattr(model, "layers"):
        return list(model.layers)
    return [model.act1, model.layer1, model.layer2, model.layer3, model.layer4]


def plain_taps(model, images, batch_size):
    """(image, token, channel) of each tap, by hooks on the model and nothing of coldtap."""
    found = [[] for _ in range(len(hooked(model)) + hasattr(model, "blocks"))]
    handles = []
    modules = hooked(model)
    if hasattr(model, "blocks"):
        handles.append(modules[0].register_forward_pre_hook(lambda _, inputs: found[0].append(inputs[0].clone())))
    for taps, module in zip(found[-len(modules) :], modules, strict=True):
        handles.append(module.register_forward_hook(lambda _, __, out, taps=taps: taps.append(out.clone())))
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):  # 8 train and 4 val images: batches hold one split each
            model(images[start : start + batch_size])
    for handle in handles:
        handle.remove()
    return [as_tokens(torch.cat(taps), model).numpy() for taps in found]


def as_tokens(tap, model):
    if tap.ndim == 3:
        return tap
    channels_last = type(model).__name__ == "SwinTransformer"
    return tap.flatten(1, 2) if channels_last else tap.flatten(2).transpose(1, 2)


def prepared(pictures, model, side):
    config = resolve_data_config({"input_size": (3, side, side)}, model=model)
    transform = create_transform(**config)
    return torch.stack([transform(image) for image in pictures])


FIRST = {"train": 0, "val": 8}


def image(split, number):
    return picture(FIRST[split] + number, 14, 18)


def source():
    return {split: [(image(split, i), i % 2) for i in range(n)] for split, n in (("train", 8), ("val", 4))}


def in_store_order(store):
    """The rows of a store and their pictures, split by split, as the job ran them."""
    rows = np.concatenate([store.rows("train"), store.rows("val")])
    places = [where.split() for where in store.sources(rows)]  # item 3 of val
    return rows, [image(split, int(number)) for _, number, _, split in places]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[*TOKENS, *STAGES], ids=str)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def plain(family):
    return built(family)


@pytest.fixture(scope="module")
def store(family, plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("family") / "store"
    cache_features(
        source(),
        path,
        model=copy.deepcopy(plain),
        preprocess={"input_size": family.side},
        tier="float32",
        batch_size=BATCH,
        device="cpu",
        sum_at="0,2,3" if family in TOKENS else None,
    )
    return open_store(path)


@pytest.fixture(scope="module")
def expected(family, plain, store):
    rows, pictures = in_store_order(store)
    return rows, plain_taps(plain, prepared(pictures, plain, family.side), BATCH)


def test_layers_equal_plain_hooks_bit_for_bit(store, expected):
    rows, taps = expected
    layers = [array for array in store.arrays.values() if array.gather == "layers"]
    assert sorted(tap for array in layers for tap in array.taps) == list(range(len(taps)))
    for array in layers:
        stored = read(array, rows)
        for position, tap in enumerate(array.taps):
            np.testing.assert_array_equal(stored[:, position], taps[tap])
            assert len(np.unique(stored[:, position].reshape(len(rows), -1), axis=0)) == len(rows)


def test_pooled_is_the_prefix_tokens_and_the_mean_of_the_others(store, expected, family):
    rows, taps = expected
    for array in (array for array in store.arrays.values() if array.gather == "pooled"):
        stored = read(array, rows)
        assert array.geometry.prefix_tokens == family.prefix
        for position, tap in enumerate(array.taps):
            np.testing.assert_array_equal(stored[:, position, : family.prefix], taps[tap][:, : family.prefix])
            mean = taps[tap][:, family.prefix :].mean(axis=1, dtype=np.float64)
            np.testing.assert_allclose(stored[:, position, family.prefix], mean, rtol=1e-5, atol=1e-6)


def test_sums_equal_the_running_float32_sum_of_plain_hooks_bit_for_bit(store, expected, family):
    rows, taps = expected
    sums = {array.taps[0]: array for array in store.arrays.values() if array.gather == "sum"}
    assert sorted(sums) == ([0, 2, 3] if family in TOKENS else [])
    for k, array in sums.items():
        total = taps[0].copy()
        for tap in taps[1 : k + 1]:
            total += tap
        np.testing.assert_array_equal(read(array, rows), total)


def test_the_grid_is_the_models_own(store, family):
    geometries = [array.geometry for array in store.arrays.values()]
    assert all(geometry.prefix_tokens == family.prefix for geometry in geometries)
    if family in TOKENS:
        patch = 14 if "14" in family.name else 16
        assert {geometry.grid for geometry in geometries} == {(family.side // patch,) * 2}
    else:
        n_stages = 5 if "resnet" in family.name else 4
        assert len(set(geometries)) == n_stages
        assert {array.gather for array in store.arrays.values()} == {"layers", "pooled"}


def test_the_final_norm_is_the_models_own(store, plain):
    modules = dict(plain.named_modules())
    norm = next(
        (modules[n] for n in ("norm", "fc_norm", "head.norm") if isinstance(modules.get(n), nn.LayerNorm)), None
    )
    if norm is None:
        assert type(plain).__name__ == "ResNet"
        assert store.norm is None
        return
    assert (store.norm.kind, store.norm.eps) == ("layer_norm", norm.eps)
    np.testing.assert_array_equal(store.norm.weight, norm.weight.detach().numpy())
    np.testing.assert_array_equal(store.norm.bias, norm.bias.detach().numpy())


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_batch_size_changes_features_by_rounding_alone(store, expected, family, plain, tmp_path, batch_size):
    """The stated tolerance: in float32, 1e-5 of a tap's largest value."""
    rows, taps = expected
    how = {"preprocess": {"input_size": family.side}, "tier": "float32", "gather": ["layers"], "device": "cpu"}
    cache_features(source(), tmp_path / "s", model=copy.deepcopy(plain), batch_size=batch_size, **how)
    other = open_store(tmp_path / "s")
    for array in other.arrays.values():
        stored = read(array, rows)
        for position, tap in enumerate(array.taps):
            largest = np.abs(taps[tap]).max()
            np.testing.assert_allclose(stored[:, position], taps[tap], rtol=0, atol=1e-5 * largest)


def test_linear_trains_on_every_family(store, tmp_path):
    result = train_adaptor(store.path, "linear", out=tmp_path / "run", epochs=1, device="cpu")
    assert result.info.metrics["val"].n_samples == 4


def only(*families):
    return pytest.mark.parametrize("family", families, indirect=True, ids=str, scope="module")


@only(*STAGES)
@pytest.mark.parametrize("adaptor", ["last", "mist"])
def test_last_and_mist_refuse_a_stage_network_in_one_line(store, tmp_path, adaptor):
    with pytest.raises(MissingFeaturesError, match="stage") as refusal:
        train_adaptor(store.path, adaptor, out=tmp_path / "run", epochs=1, device="cpu")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


@only(TOKENS[1])
@pytest.mark.parametrize("adaptor", ["last", "mist"])
def test_last_and_mist_take_a_vit_without_prefix_tokens(store, tmp_path, adaptor):
    result = train_adaptor(store.path, adaptor, out=tmp_path / "run", epochs=1, device="cpu")
    assert result.info.metrics["val"].n_samples == 4


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_a_name_and_a_checkpoint_give_the_same_features_as_the_module(tmp_path, name):
    model = built(Family(name, 64, small={"img_size": 64} if name == "test_vit" else {}))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    how = {"preprocess": {"input_size": 64}, "tier": "float32", "batch_size": BATCH, "device": "cpu"}
    by_name = cache_features(source(), tmp_path / "a", model=name, checkpoint=tmp_path / "weights.safetensors", **how)
    model.reset_classifier(0)  # which belongs to no feature, and is not part of the extractor
    by_module = cache_features(source(), tmp_path / "b", model=model, **how)
    assert by_name.n_rows == by_module.n_rows == 12
    one, other = open_store(tmp_path / "a"), open_store(tmp_path / "b")
    assert one.recipe.address == other.recipe.address
    for array in one.arrays:
        rows, _ = in_store_order(one)
        np.testing.assert_array_equal(read(one.arrays[array], rows), read(other.arrays[array], rows))


def test_sum_of_a_stage_network_is_refused_in_one_line_and_writes_nothing(tmp_path):
    with pytest.raises(OptionError, match="`gather='sum'` needs taps of one geometry") as refusal:
        cache_features(
            source(),
            tmp_path / "store",
            model=built(STAGES[1]),
            preprocess={"input_size": 64},
            gather=["layers", "sum"],
        )
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "store").exists()


def test_named_taps_of_any_module_from_a_source_in_memory(tmp_path):
    images = in_memory(train=8, val=4, test=4)
    report = cache(images, tmp_path / "store", tier="float32", sum_at="1,2")
    assert (report.status, report.n_rows, report.n_rejected) == ("written", 16, 0)
    store, model = open_store(tmp_path / "store"), TinyNet()
    for split in images:
        rows = store.rows(split)
        numbers = [int(where.split()[1]) for where in store.sources(rows)]
        assert store.targets(rows).tolist() == [images[split][number][1] for number in numbers]
        pixels = np.stack([np.asarray(images[split][number][0]) for number in numbers])
        with torch.inference_mode():
            z0 = model.patch((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
            z1 = model.blocks[0](z0)
            z2 = model.blocks[1](z1)
        for array, taps in (("layers/g2x2-p0-c4", torch.stack([z0, z1, z2], 1)), ("sum/g2x2-p0-c4/1", z0 + z1)):
            stored = read(store.arrays[array], rows)
            np.testing.assert_allclose(stored, taps.flatten(-2).transpose(-1, -2), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(store.norm.weight, model.norm.weight.detach().numpy())
    assert [tap.name for tap in store.recipe.extractor.taps] == list(TAPS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["patch", "blocks.7"], "no submodule 'blocks.7'; it has patch, blocks, blocks.0"),
        (["patch", ""], "no submodule ''"),
        (["patch", "norm"], r"the tap 'norm' gives \(1, 4\)"),
    ],
)
def test_taps_that_a_module_cannot_give_are_named(tmp_path, names, message):
    with pytest.raises(ModelError, match=message):
        cache(in_memory(train=8, val=4), tmp_path / "store", tap_names=names)


class Aside(TinyNet):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_a_tap_that_a_forward_pass_does_not_reach_is_named(tmp_path):
    with pytest.raises(ModelError, match="the tap 'unused' is not reached"):
        cache(in_memory(train=8, val=4), tmp_path / "store", model=Aside(), tap_names=["patch", "unused"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_backbone_in_half_precision_gives_nearly_the_same_features(tmp_path, precision):
    images = in_memory(train=8, val=4)
    for name in ("float32", precision):
        cache(images, tmp_path / name, tier="float32", precision=name)
    exact, rough = open_store(tmp_path / "float32"), open_store(tmp_path / precision)
    assert rough.recipe.extractor.precision == precision
    assert rough.recipe.extractor_digest != exact.recipe.extractor_digest
    np.testing.assert_array_equal(rough.norm.weight, exact.norm.weight)
    for name in exact.arrays:
        expected, found = (read(store.arrays[name], store.rows("train")) for store in (exact, rough))
        assert not np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


class Loud(TinyNet):
    """Its last tap reaches 1e5, and 1e8 where the image is white."""

    def __init__(self):
        super().__init__()
        self.loud = nn.Identity()

    def forward(self, images):
        maps = self.patch(images)
        white = images.mean((1, 2, 3), keepdim=True) > 0.99
        return self.loud(maps / maps.abs().amax((1, 2, 3), keepdim=True) * torch.where(white, 1e8, 1e5))


def loud(path, tier, images):
    cache(images, path, model=Loud(), tap_names=["patch", "loud"], tier=tier, max_rejected=0.5)
    return open_store(path)


@pytest.mark.parametrize("gather", ["layers", "pooled", "sum"])
def test_float16_keeps_large_taps_by_an_exact_power_of_two(tmp_path, gather):
    images = in_memory(train=70, val=4)  # more train images than the calibration reads
    exact, kept = loud(tmp_path / "a", "float32", images), loud(tmp_path / "b", "float16", images)
    array = next(array for array in kept.arrays.values() if array.gather == gather)
    rows = kept.rows("train")
    expected, found = read(exact.arrays[array.name], rows), read(array, rows)
    assert np.abs(expected).max() > (65504 if gather != "pooled" else 5e3)
    exponents = array.exponents_of()
    exponent = exponents[-1]
    assert exponent >= (5 if gather != "pooled" else 1)
    np.testing.assert_allclose(found, expected, rtol=2**-11, atol=2.0 ** (exponent - 25))
    if gather == "layers":
        assert exponents[0] == 0
        np.testing.assert_array_equal(found[:, 0], expected[:, 0].astype(np.float16).astype(np.float32))


def test_a_row_beyond_the_headroom_is_rejected_with_its_tap_and_no_other(tmp_path):
    images = in_memory(train=8, val=4)
    images["val"][2] = (Image.new("RGB", (8, 8), "white"), 0)
    store = loud(tmp_path / "s", "float16", images)
    rejected = pq.read_table(tmp_path / "s/rejected.parquet").to_pylist()
    assert [(line["sample_id"], line["tap"]) for line in rejected] == [(rejected[0]["sample_id"], 1)]
    assert rejected[0]["source"] == "item 2 of val"
    assert "1e+08 in layers at tap 1 overflows the float16 tier" in rejected[0]["reason"]
    assert store.splits == {"train": 8, "val": 3}
    values = read(store.arrays["layers/g2x2-p0-c4"], [*store.rows("train"), *store.rows("val")])
    assert np.isfinite(values).all()


@pytest.mark.parametrize("tier", ["float32", "bfloat16"])
def test_tiers_with_a_wide_exponent_keep_such_a_row(tmp_path, tier):
    images = in_memory(train=8, val=4)
    images["val"][2] = (Image.new("RGB", (8, 8), "white"), 0)
    store = loud(tmp_path / "s", tier, images)
    assert store.splits == {"train": 8, "val": 4}
    assert read(store.arrays["layers/g2x2-p0-c4"], store.rows("val")).max() > 1e7
