"""The demo: digits as files, colours of principal components, and the whole of it on a few images."""

import sys

import numpy as np
import pytest
from PIL import Image

from examples.demo import __main__ as demo
from examples.demo.digits import write_digits
from examples.demo.picture import component_colours


def test_digits_are_grey_images_in_class_folders_with_every_class_in_every_split(tmp_path):
    folder = write_digits(tmp_path / "digits")
    for split, n_images in {"train": 800, "val": 200, "test": 797}.items():
        assert len(list((folder / split).rglob("*.png"))) == n_images
        assert sorted(path.name for path in (folder / split).iterdir()) == list("0123456789")
    with Image.open(next(folder.rglob("*.png"))) as image:
        assert (image.mode, image.size) == ("L", (8, 8))
        assert image.getextrema()[1] == 255


def test_digits_that_are_there_are_left_alone(tmp_path):
    assert write_digits(tmp_path) == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_components_follow_what_varies_most():
    rng = np.random.default_rng(0)
    patches = 0.01 * rng.standard_normal((6, 4, 8)).astype(np.float32)
    strongest = rng.standard_normal((6, 4)).astype(np.float32)
    patches[:, :, 5] += 10 * strongest
    colours = component_colours(patches, np.array([1, 4]))
    assert colours.shape == (2, 4, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    red = component_colours(patches, np.arange(6))[:, :, 0]
    assert np.corrcoef(red.ravel(), strongest.ravel())[0, 1] > 0.95


@pytest.mark.slow
def test_the_demo_leaves_a_table_and_a_picture(tmp_path, capfd, monkeypatch, server):
    def run(words):
        """Forked from a process that has its imports; `[python, -m, coldtap.cli.main, …]` would do them each time."""
        assert words[1:3] == ["-m", "coldtap.cli.main"]
        job = server.start(*words[3:])
        assert job.wait() == 0, job.err
        return 1.0

    monkeypatch.setattr(demo, "_run", run)
    demo.run_demo(tmp_path / "out", epochs=1, n_images=120)
    printed = capfd.readouterr().out
    for adaptor in demo.ADAPTORS:
        assert f"  {adaptor} " in printed
    with Image.open(tmp_path / "out" / "features.png") as picture:
        assert picture.size[0] > 1000


def test_without_scikit_learn_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"^7$") as ended:
        demo.guarded(demo.demo)(out=tmp_path / "out", epochs=1)
    assert ended.value.code == 7
    assert "scikit-learn" in capsys.readouterr().err
