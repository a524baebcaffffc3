"""The packaged reference backbone: its bytes, its shape, its preprocessing, and the script that trains it."""

import hashlib
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer

from coldtap.errors import ModelError
from coldtap.pipeline.backbones import reference
from tests.helpers.places import ROOT

REPOSITORY = ROOT
PRETRAIN_DATA = REPOSITORY.parent / "shared" / "data" / "pretrain" / "cifar10-jpeg.parquet"


@pytest.fixture(autouse=True)
def one_thread():
    """Keep torch to one thread: on a busy machine the threads of tiny batches spend minutes waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    return reference.build_reference()


def test_packaged_weights_have_the_stated_digest_and_size():
    content = reference.WEIGHTS.read_bytes()
    assert hashlib.sha256(content).hexdigest() == reference.WEIGHTS_SHA256
    assert len(content) <= 11_000_000


def test_model_card_states_the_digest():
    card = reference.WEIGHTS.with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    assert reference.WEIGHTS_SHA256 in card


def test_backbone_is_a_frozen_sized_float32_vit(backbone):
    assert type(backbone) is VisionTransformer
    assert not backbone.training
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert len(backbone.blocks) == 9
    with torch.inference_mode():
        features = backbone.forward_features(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 65, 192)
    assert torch.isfinite(features).all()


def test_two_builds_give_the_same_features(backbone):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(backbone(image), reference.build_reference()(image))


def test_timm_finds_the_preprocessing_on_the_model(backbone):
    config = resolve_model_data_config(backbone)
    assert config == {
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }


def test_preprocessing_keeps_the_whole_of_a_wide_image(backbone):
    # White left and right edges, black middle: a centre crop would see black alone.
    pixels = np.zeros((32, 128, 3), np.uint8)
    pixels[:, :16] = pixels[:, -16:] = 255
    image = create_transform(**resolve_model_data_config(backbone))(Image.fromarray(pixels))
    assert image.shape == (3, 32, 32)
    assert image[:, :, 0].min() > 0.9
    assert image[:, :, 16].max() < -0.9


def test_weights_of_another_digest_are_refused(tmp_path):
    damaged = tmp_path / "vit-reference.safetensors"
    content = bytearray(reference.WEIGHTS.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ModelError, match=r"sha256 is .* expected .*install coldtap again"):
        reference.build_reference(damaged)


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot read the weights"):
        reference.build_reference(tmp_path / "nothing.safetensors")


def test_weights_of_another_layout_are_refused():
    with pytest.raises(ModelError, match="do not fit coldtap/vit-reference"):
        reference.build_reference(layout={**reference.LAYOUT, "depth": 10})


def test_backbone_still_classifies_the_images_it_was_trained_for(backbone):
    if not PRETRAIN_DATA.exists():
        pytest.skip("needs ../shared/data, which is not part of the repository")
    table = pq.read_table(PRETRAIN_DATA, filters=[("split", "==", "test")]).slice(0, 500)
    transform = create_transform(**resolve_model_data_config(backbone))
    images = [transform(Image.open(io.BytesIO(image.as_py()))) for image in table["image"]]
    with torch.inference_mode():
        predicted = backbone(torch.stack(images)).argmax(1).numpy()
    assert (predicted == table["label"].to_numpy()).mean() > 0.6


# The script that trains it.


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "pretrain_reference", REPOSITORY / "scripts" / "pretrain_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory) -> Path:
    """Dark and bright noise, 32 x 32: 48 images to train on, 8 to test on, 8 to validate on."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = [png(rng.integers(0, 128, (32, 32, 3), np.uint8) + 127 * np.uint8(label)) for label in labels]
    splits = ["train"] * 48 + ["test"] * 8 + ["val"] * 8
    path = tmp_path_factory.mktemp("two-classes") / "two-classes.parquet"
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, pa.int32()), "split": splits}), path)
    return path


class DeathError(Exception):
    """Stands for whatever ends a run between two epochs."""


def die_after(epoch: int):
    def on_epoch(finished: int) -> None:
        if finished == epoch:
            raise DeathError("between two epochs")

    return on_epoch


@pytest.fixture(scope="module")
def everything(script):
    """Return settings that turn every option on, so that each one's draws have to be resumed."""
    return script.Settings(
        epochs=3, batch_size=16, crop=0.4, jitter=0.4, grey=0.2, invert=0.2, cutout=0.5, mixup=0.5,
        patch_drop=0.5, hog=1.0,
    )  # fmt: skip


def test_an_interrupted_training_resumes_to_identical_weights(script, everything, two_classes, tmp_path, capsys):
    undisturbed, interrupted = tmp_path / "undisturbed.safetensors", tmp_path / "interrupted.safetensors"
    script.train(two_classes, undisturbed, everything)
    for epoch in (1, 2):
        with pytest.raises(DeathError, match="between two epochs"):
            script.train(two_classes, interrupted, everything, on_epoch=die_after(epoch))
        assert not interrupted.exists()
    script.train(two_classes, interrupted, everything)
    assert undisturbed.read_bytes() == interrupted.read_bytes()

    capsys.readouterr()
    script.train(two_classes, interrupted, everything)
    assert "finished already" in capsys.readouterr().out


def test_a_checkpoint_of_other_settings_is_refused(script, two_classes, tmp_path):
    out = tmp_path / "weights.safetensors"
    with pytest.raises(DeathError, match="between two epochs"):
        script.train(two_classes, out, script.Settings(epochs=1, batch_size=16), on_epoch=die_after(1))
    with pytest.raises(SystemExit, match=r"epochs: 1 there, 2 now"):
        script.train(two_classes, out, script.Settings(epochs=2, batch_size=16))


def test_evaluation_probes_the_val_split_of_every_set(script, two_classes, capsys):
    mean = script.evaluate(reference.WEIGHTS, two_classes.parent)
    assert mean == 1.0
    assert "two-classes 1.000" in capsys.readouterr().out
