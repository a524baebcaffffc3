"""Preprocessing is timm's, bit for bit, and a view is a pure function of its key."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from coldtap.errors import ModelError, OptionError
from coldtap.pipeline.backbones.inputs import normalise, preprocess_of_model
from coldtap.pipeline.images import preprocess as module
from coldtap.pipeline.images.decode import BadImageError
from coldtap.pipeline.images.preprocess import INTERPOLATIONS, Augmentation, Preprocess
from tests.helpers.pictures import picture

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def preprocess(**changes):
    values = {"height": 32, "width": 32, "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    return Preprocess(**{**values, **IMAGENET, **changes})


def timm_transform(chosen):
    return timm.data.create_transform(
        input_size=(3, chosen.height, chosen.width),
        crop_pct=chosen.crop_pct,
        crop_mode=chosen.crop_mode,
        interpolation=chosen.interpolation,
        mean=chosen.mean,
        std=chosen.std,
    )


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize(("crop_pct", "size"), [(1.0, (32, 32)), (0.875, (24, 40)), (0.95, (56, 56))])
def test_equals_timms_evaluation_transform_bit_for_bit(crop_mode, interpolation, crop_pct, size):
    chosen = preprocess(
        height=size[0], width=size[1], crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation
    )
    for width, height in [(32, 32), (100, 61), (20, 90), (300, 299), (7, 7)]:
        image = picture(width, width, height)
        pixels = chosen.pixels(image)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (3, *size)
        ours = normalise(torch.from_numpy(pixels.copy())[None], chosen, torch.float32)[0]
        assert torch.equal(ours, timm_transform(chosen)(image))


def test_normalise_equals_torchvision_on_every_pixel_value():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(3, 16, 16)
    chosen = preprocess()
    expected = tvf.normalize(tvf.to_tensor(pixels.permute(1, 2, 0).numpy()), chosen.mean, chosen.std)
    assert torch.equal(normalise(pixels[None], chosen, torch.float32)[0], expected)


def test_normalise_rounds_once_to_the_precision_asked_for():
    pixels = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    before = pixels.clone()
    exact = normalise(pixels, preprocess(), torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(normalise(pixels, preprocess(), dtype), exact.to(dtype))
    assert torch.equal(pixels, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_normalise_gives_the_same_bits_on_a_gpu():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    expected = normalise(pixels, preprocess(), torch.float32)
    assert torch.equal(normalise(pixels.cuda(), preprocess(), torch.float32).cpu(), expected)


@pytest.mark.parametrize(
    ("crop_mode", "width", "height"), [("center", 1, 80000), ("center", 80000, 1), ("border", 1, 200)]
)
def test_needle_shaped_image_is_bad_not_a_full_memory(crop_mode, width, height):
    chosen = preprocess(height=64, width=64, crop_pct=1.0, crop_mode=crop_mode)
    with pytest.raises(BadImageError, match=rf"^too narrow: {width} x {height} pixels .* 64 x 64$"):
        chosen.pixels(Image.new("RGB", (width, height)))


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
def test_narrow_image_that_can_be_resized_is(crop_mode):
    chosen = preprocess(height=64, width=64, crop_pct=1.0, crop_mode=crop_mode)
    assert chosen.pixels(Image.new("RGB", (2, 120))).shape == (3, 64, 64)


keys = st.tuples(st.integers(0, 2**32), st.text(max_size=20), st.integers(1, 100))


@settings(deadline=None, max_examples=40)
@given(key=keys, width=st.integers(1, 60), height=st.integers(1, 60), noise=st.integers(0, 99))
def test_view_is_a_pure_function_of_its_key(key, width, height, noise):
    seed, sample_id, view = key
    image = picture(noise, width, height)

    def draw():
        return preprocess(height=8, width=6).augmented(
            image, seed=seed, sample_id=sample_id, view=view, augmentation=Augmentation()
        )

    first = draw()
    random.seed(noise)
    np.random.seed(noise)
    torch.manual_seed(noise)
    assert first.shape == (3, 8, 6)
    assert first.dtype == np.uint8
    assert np.array_equal(first, draw())


def test_views_do_not_depend_on_threads_or_order():
    image, chosen, augmentation = picture(0, 40, 30), preprocess(), Augmentation()

    def view_of(number):
        return chosen.augmented(image, seed=1, sample_id="a", view=number, augmentation=augmentation)

    alone = [view_of(number) for number in range(1, 40)]
    with ThreadPoolExecutor(8) as pool:
        backwards = list(pool.map(view_of, range(39, 0, -1)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, reversed(backwards), strict=True))


def test_seed_id_and_view_each_change_the_view():
    draws = {tuple(module._draws(*key)) for key in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "1a", 1)]}
    assert len(draws) == 5


def test_draws_are_pinned_for_ever():
    # Stores keep views: other numbers here would make every store with views another one.
    assert module._draws(0, "a", 1)[:3] == [0.2717759633299974, 0.9467308178187843, 0.0009564612794213945]
    assert len(module._draws(0, "a", 1)) == 23


def test_draws_are_uniform():
    draws = np.array([module._draws(0, str(number), 1) for number in range(2000)])
    assert (draws >= 0).all()
    assert (draws < 1).all()
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.03
    assert np.abs(draws.var(axis=0) - 1 / 12).max() < 0.01


@settings(deadline=None, max_examples=150)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=22, max_size=22),
)
def test_crop_lies_inside_the_image_and_inside_the_ranges(width, height, draws):
    augmentation = Augmentation(crop_scale=(0.2, 1.0))
    left, top, right, bottom = module._crop_box(width, height, draws, augmentation)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crop_is_torchvisions_for_the_same_draws(monkeypatch):
    """torchvision's own get_params, fed with our draws, gives our box."""
    augmentation = Augmentation()
    for number in range(200):
        width, height = 20 + number, 220 - number
        draws = module._draws(0, str(number), 1)[1:]
        left, top, right, bottom = module._crop_box(width, height, draws, augmentation)
        attempts = iter(draws[2:])

        def uniform(self, low, high, attempts=attempts):
            return torch.tensor([low + (high - low) * next(attempts)], dtype=torch.float64)

        places = iter(draws[:2])

        def randint(low, high, size, places=places):
            return torch.tensor([math.floor(next(places) * high)])

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform)
            patch.setattr(torch, "randint", randint)
            i, j, h, w = RandomResizedCrop.get_params(
                torch.zeros(3, height, width), list(augmentation.crop_scale), list(augmentation.crop_ratio)
            )
        assert (left, top, right - left, bottom - top) == (j, i, w, h)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_view_is_torchvisions_resized_crop_and_flip(interpolation):
    image, chosen = picture(0, 50, 35), preprocess(interpolation=interpolation)
    augmentation = Augmentation(flip=1.0)
    view = chosen.augmented(image, seed=3, sample_id="x", view=2, augmentation=augmentation)
    left, top, right, bottom = module._crop_box(50, 35, module._draws(3, "x", 2)[1:], augmentation)
    mode = timm.data.transforms.str_to_interp_mode(interpolation)
    crop = tvf.resized_crop(image, top, left, bottom - top, right - left, [32, 32], mode)
    assert np.array_equal(view, np.asarray(tvf.hflip(crop)).transpose(2, 0, 1))


def test_flip_probability_is_kept():
    image = Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))
    chosen = preprocess(height=1, width=2, interpolation="nearest")

    def flips(probability):
        augmentation = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(2.0, 2.0), flip=probability)
        views = [
            chosen.augmented(image, seed=0, sample_id="", view=v, augmentation=augmentation) for v in range(1, 301)
        ]
        return sum(int(view[0, 0, 0] == 255) for view in views)

    assert flips(0.0) == 0
    assert flips(1.0) == 300
    assert 110 < flips(0.5) < 190


@pytest.mark.parametrize("record", [preprocess(), Augmentation(), Augmentation(crop_scale=(0.5, 0.9), flip=0.0)])
def test_dict_round_trip_through_json(record):
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize("record", [preprocess(), Augmentation()])
def test_unknown_and_missing_keys_are_refused(record):
    with pytest.raises(OptionError, match="unknown or missing colour; known: "):
        type(record).from_dict({**record.to_dict(), "colour": 1})
    first = next(iter(record.to_dict()))
    with pytest.raises(OptionError, match=f"unknown or missing {first}; known: {first}, "):
        type(record).from_dict({key: value for key, value in record.to_dict().items() if key != first})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 0}, "height=0: wanted a number of pixels"),
        ({"width": 2.5}, "width=2.5: wanted a number of pixels"),
        ({"crop_pct": 0.0}, "crop_pct=0.0: wanted a number above 0"),
        ({"crop_mode": "centre"}, "crop_mode='centre': wanted one of center, squash, border"),
        ({"interpolation": "random"}, "interpolation='random': wanted one of nearest"),
        ({"mean": (0.5,)}, r"mean=\(0.5,\): wanted 3 numbers"),
        ({"mean": (0.5, 0.5, math.nan)}, "wanted 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "wanted numbers above 0"),
    ],
)
def test_values_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        preprocess(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale=\(0.0, 1.0\): wanted 0 < least"),
        ({"crop_scale": (0.5,)}, r"crop_scale=\(0.5,\): wanted 2 numbers"),
        ({"crop_ratio": (2.0, 1.0)}, r"crop_ratio=\(2.0, 1.0\): wanted 0 < least"),
        ({"flip": 1.5}, "flip=1.5: wanted a probability"),
    ],
)
def test_augmentation_that_cannot_be_used_is_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        Augmentation(**changes)


class Plain(torch.nn.Module):
    """A model that timm did not make."""


def configured(**config):
    model = Plain()
    model.pretrained_cfg = {"input_size": (3, 32, 48), "crop_pct": 0.9, "interpolation": "bilinear", **config}
    return model


def test_configuration_of_the_model_and_overrides():
    found = preprocess_of_model(configured(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    assert (found.height, found.width, found.crop_pct, found.crop_mode) == (32, 48, 0.9, "center")
    assert (found.interpolation, found.mean, found.std) == ("bilinear", (0.5,) * 3, (0.25,) * 3)
    changed = preprocess_of_model(
        configured(), {"input_size": 64, "crop_mode": "squash", "crop_pct": None, "mean": [0.1, 0.2, 0.3]}
    )
    assert (changed.height, changed.width, changed.crop_mode, changed.crop_pct) == (64, 64, "squash", 0.9)
    assert changed.mean == (0.1, 0.2, 0.3)
    assert preprocess_of_model(configured(), {"input_size": (16, 20)}).width == 20


def test_model_without_a_configuration_gets_timms_defaults():
    found = preprocess_of_model(Plain())
    assert (found.height, found.interpolation, found.mean) == (224, "bicubic", IMAGENET["mean"])


def test_bad_overrides_are_refused():
    with pytest.raises(OptionError, match="unknown preprocessing colour; known: input_size, crop_pct"):
        preprocess_of_model(configured(), {"colour": 1})
    with pytest.raises(OptionError, match=r"input_size=\(1, 2, 3, 4\): wanted SIDE"):
        preprocess_of_model(configured(), {"input_size": (1, 2, 3, 4)})
    with pytest.raises(ModelError, match="takes 1 channels; images are decoded to 3"):
        preprocess_of_model(configured(input_size=(1, 28, 28)))


def test_all_interpolations_exist_in_timm():
    for interpolation in INTERPOLATIONS:
        assert preprocess(interpolation=interpolation).pixels(picture(0, 40, 40)).shape == (3, 32, 32)
