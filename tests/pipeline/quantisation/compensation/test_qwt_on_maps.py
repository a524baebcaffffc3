"""QwT beside residual blocks: a grouped, strided map of the block's input, held against numpy."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.backbones.integer.scheme import SchemeByLayer
from coldtap.pipeline.quantisation.compensation.qwt import _groups, compensate_blocks
from coldtap.pipeline.quantisation.ptq.calibration_images import read_calibration_images
from coldtap.pipeline.quantisation.ptq.model import quantise
from coldtap.pipeline.quantisation.quantize import quantize
from tests.helpers.jobs import in_memory
from tests.helpers.quantised_models import HOW, backbone_of, pixels, snr_db, taps_of

QUIET = 1e-5  # of the middle column's variance, as docs/methods.md has it
# Stride 2 and two groups each: of 64 channels to 64, where a transposed matrix would fit as well, and of 64 to 128.
GROUPED = {"layer2.0": (2, 64, 64), "layer3.0": (2, 64, 128)}


def grouped_resnet():
    torch.manual_seed(0)
    return ResNet(Bottleneck, (1, 1, 1, 1), channels=(32, 32, 64, 16), num_classes=0).eval()


@pytest.fixture(scope="module")
def plain():
    """In w6a6, on 128 images, as yet uncompensated."""
    backbone, scheme = backbone_of(grouped_resnet()), SchemeByLayer.parse("w6a6", ())
    batches = list(pixels(128).split(32))
    return quantise(backbone, batches, scheme, ranges="least-squares", reparameterised=True, seed=0)


def compensated(plain, ridge):
    models = replace(plain, model=deepcopy(plain.model))
    compensate_blocks(models, ridges=(ridge,))
    return models


def input_of(name, models, images):
    """What a block of the compensated model reads."""
    x = images
    for unit in models.anatomy.units:
        if unit.name == name:
            return x
        x = unit.run(models.model, x)
    raise AssertionError(name)


def in_groups(maps, n_groups):
    """(batch, channel, height, width) as float64 rows of pixels by group, (group, row, channel)."""
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    return np.stack(np.split(rows, n_groups, axis=1))


@pytest.mark.parametrize("name", GROUPED)
def test_what_a_block_gains_is_the_stored_map_of_its_strided_input_group_by_group(plain, name):
    models = compensated(plain, 0.0)
    block, bare = models.model.get_submodule(name), plain.model.get_submodule(name)
    weight, bias = block.qwt.weight.double().numpy(), block.qwt.bias.double().numpy()
    assert weight.shape == GROUPED[name]
    with torch.inference_mode():
        x = input_of(name, models, plain.images[0])
        given = block(x)
        gained = in_groups(given - bare(x), 1)[0]
    by_group = [rows @ matrix for rows, matrix in zip(in_groups(x[:, :, ::2, ::2], 2), weight, strict=True)]
    wanted = np.concatenate(by_group, axis=1) + bias
    assert wanted.std() > 1e-3 * float(given.std())
    np.testing.assert_allclose(gained, wanted, rtol=0, atol=2e-6 * float(given.abs().max()))


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("name", GROUPED)
def test_its_weight_is_least_squares_of_what_the_block_lacks_on_its_strided_input(plain, name, ridge):
    """By numpy's solver: columns centred and of unit size, the ridge as rows √ridge to 0."""
    models = compensated(plain, ridge)
    found, n_groups = models.model.get_submodule(name).qwt, GROUPED[name][0]
    with torch.inference_mode():
        inputs = [input_of(name, models, batch) for batch in plain.images]
        lacks = [plain.float_model.get_submodule(name)(x) - plain.model.get_submodule(name)(x) for x in inputs]
    x = in_groups(torch.cat(inputs)[:, :, ::2, ::2], n_groups)
    r = in_groups(torch.cat(lacks), n_groups)
    for i in range(n_groups):
        weight = solved(x[i], r[i], ridge)
        kept = found.weight[i].double().numpy()
        np.testing.assert_allclose(kept, weight, rtol=1e-3, atol=1e-6)  # float16 keeps 11 bits
        bias = found.bias.view(n_groups, -1)[i].numpy()
        np.testing.assert_allclose(bias, r[i].mean(0) - x[i].mean(0) @ kept, rtol=1e-5, atol=1e-6)


def solved(x, r, ridge):
    centred = x - x.mean(0)
    size = np.sqrt(np.square(centred).sum(0))
    loud = np.square(size) > QUIET * np.median(np.square(size))
    rows = np.concatenate([centred[:, loud] / size[loud], np.sqrt(ridge) * np.eye(loud.sum())])
    targets = np.concatenate([r - r.mean(0), np.zeros((loud.sum(), r.shape[1]))])
    weight = np.zeros((x.shape[1], r.shape[1]))
    weight[loud] = np.linalg.lstsq(rows, targets)[0] / size[loud, None]
    return weight


@pytest.mark.parametrize(
    ("n_in", "n_out", "n_groups"),
    [
        *[(64, 256, 1), (256, 256, 4), (256, 512, 4), (512, 512, 8)],  # a ResNet-50's: in // 64 divides them all
        *[(512, 1024, 8), (1024, 1024, 16), (1024, 2048, 16), (2048, 2048, 32)],
        *[(32, 208, 1), (208, 48, 2), (192, 256, 2), (48, 96, 1), (130, 7, 1), (320, 640, 5)],
    ],
)
def test_groups_are_the_most_of_64_inputs_or_more_that_divide_both_sides(n_in, n_out, n_groups):
    assert _groups(n_in, n_out) == n_groups


def test_widths_that_do_not_divide_by_64_are_compensated_stored_and_read_again(tmp_path):
    torch.manual_seed(0)
    module = ResNet(BasicBlock, (1, 1, 1, 1), channels=(32, 208, 48, 96), num_classes=0).eval()
    path, source, scheme = tmp_path / "q.safetensors", in_memory(train=64), SchemeByLayer.parse("w6a6", ())
    report = quantize(module, source, path, scheme="w6a6", compensate="qwt", preprocess=HOW, device="cpu")
    assert [fit.n_parameters for fit in report.fits[:3]] == [65 * 32, 33 * 208, 105 * 48]
    stored = load_file(path)
    assert stored["qwt.weight/layer2.0"].shape == (1, 32, 208)
    assert stored["qwt.weight/layer3.0"].shape == (2, 104, 24)  # 208 // 64 = 3 divides neither side

    backbone, images = backbone_of(module), read_calibration_images(source, HOW, n_images=None, seed=0)
    plain = quantise(backbone, images.batches, scheme, ranges="least-squares", reparameterised=True, seed=0)
    made = replace(plain, model=deepcopy(plain.model))
    compensate_blocks(made)
    loaded, fresh = load_backbone(module, quantised=path, kernel="float", device="cpu"), pixels(16, seed=3)
    given = loaded(fresh)
    for wanted, got in zip(taps_of(made.model, fresh, loaded), given, strict=True):
        assert snr_db(wanted, got) > 60
    assert snr_db(taps_of(plain.model, fresh, loaded)[-1], given[-1]) < 60
