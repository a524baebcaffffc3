"""`coldtap diagnose`: its numbers are those of a direct computation, and of `quantize`; its files, and bad input."""

import csv
import io
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from coldtap.errors import ColdtapError, MachineError, OptionError, RunError, SourceError
from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.backbones.inputs import normalise
from coldtap.pipeline.backbones.integer.scheme import SchemeByLayer
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.quantisation.compensation.cwac import SiteFit
from coldtap.pipeline.quantisation.compensation.site_table import site_table
from coldtap.pipeline.quantisation.diagnosis.diagnose import FILES, diagnose
from coldtap.pipeline.quantisation.diagnosis.picture import draw_diagnosis
from coldtap.pipeline.quantisation.diagnosis.result import Spread
from coldtap.pipeline.quantisation.ptq.calibration_images import read_calibration_images
from coldtap.pipeline.quantisation.ptq.model import quantise
from coldtap.pipeline.quantisation.quantize import quantize
from coldtap.stores.compensation.channel_affine import RIDGE
from tests.helpers.jobs import coldtap, error_line
from tests.helpers.pictures import encoded, picture

N_IMAGES, N_HELD_OUT, SEEDS = 16, 4, 2
SITE = "blocks.0.attn.proj"  # the first: no prefix of it is compensated
PREPROCESS = Preprocess(
    height=32, width=32, crop_pct=1.0, crop_mode="squash", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
)


def smooth(seed):
    """Noise of few waves, so that patches differ from image to image."""
    return picture(seed, 5, 5).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3)
    for parameter in model.parameters():  # timm starts so small that a block adds next to nothing
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="module")
def source():
    return [(smooth(seed), 0) for seed in range(24)]


@pytest.fixture(scope="module")
def ask(vit, source):
    def diagnose_small(out, calibration=source, **options):
        asked = {"scheme": "w4a4", "seeds": SEEDS, "images": N_IMAGES, "device": "cpu", "preprocess": PREPROCESS}
        return diagnose(vit, calibration, out, **{**asked, **options})

    return diagnose_small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("diagnosis") / "out"


@pytest.fixture(scope="module")
def diagnosis(ask, folder):
    return ask(folder)


@pytest.fixture(scope="module")
def backbone(vit):
    return load_backbone(vit, preprocess=PREPROCESS, device="cpu")


def images_of(source, seed):
    """The calibration images of a seed and those held out."""
    read = read_calibration_images(source, PREPROCESS, n_images=N_IMAGES + N_HELD_OUT, seed=seed)
    pixels = torch.cat(list(read.batches))
    return pixels[:N_IMAGES], pixels[N_IMAGES:]


def snr_db(wanted, got):
    """Signal to noise of (…, channel) in dB; a channel's mean is no signal."""
    wanted, got = (values.reshape(-1, values.shape[-1]).astype(np.float64) for values in (wanted, got))
    return 10 * math.log10(wanted.var(0).sum() / np.square(wanted - got).mean(0).sum())


# Numbers


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_site_is_what_a_direct_computation_gives(diagnosis, backbone, source, seed):
    fit, held_out = images_of(source, seed)
    schemes = SchemeByLayer.parse("w4a4", ())
    models = quantise(backbone, fit.split(4), schemes, ranges="least-squares", reparameterised=True, seed=seed)

    def pairs(pixels):
        """The site's output with and without quantisation, of the same tokens."""
        blocks = models.model.blocks[0], models.float_model.blocks[0]
        found = []
        images = normalise(pixels, PREPROCESS, torch.float32)
        with torch.inference_mode():
            z0 = models.model._pos_embed(models.model.patch_embed(images))
            for block in blocks:
                handle = block.attn.proj.register_forward_hook(lambda _, __, output: found.append(output))
                block(z0)
                handle.remove()
        return [output.reshape(-1, output.shape[-1]).double().numpy() for output in found]

    site = next(one for one in diagnosis.sites if one.name == SITE)
    got, wanted = pairs(fit)
    assert site.uncompensated_db.values[seed] == pytest.approx(snr_db(wanted, got), abs=1e-3)

    x, y = got - got.mean(0), wanted - wanted.mean(0)
    change = np.linalg.solve(x.T @ x + RIDGE * np.diag(np.square(x).sum(0)), x.T @ (y - x))
    matrix = np.eye(len(change)) + change
    scale = ((x * y).sum(0) + RIDGE * np.square(y).sum(0)) / (np.square(x).sum(0) + RIDGE * np.square(y).sum(0))
    got, wanted = pairs(held_out)
    mean_x, mean_y = pairs(fit)[0].mean(0), pairs(fit)[1].mean(0)
    diagonal = snr_db(wanted, (got - mean_x) * scale + mean_y)
    full = snr_db(wanted, (got - mean_x) @ matrix + mean_y)
    assert site.diagonal_gain_db.values[seed] == pytest.approx(diagonal - snr_db(wanted, got), abs=1e-3)
    assert site.full_gain_db.values[seed] == pytest.approx(full - diagonal, abs=1e-3)
    of_units = np.square(x.std(0)[:, None] * matrix / y.std(0))
    share = 1 - np.diag(of_units).sum() / of_units.sum()
    assert site.off_diagonal_share.values[seed] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(
    ("compensation", "field"), [("none", "uncompensated_db"), ("cwac", "cwac_db"), ("qwt", "qwt_db")]
)
def test_taps_are_those_of_the_artefact_of_that_seed(diagnosis, vit, backbone, source, tmp_path, compensation, field):
    seed, out = 1, tmp_path / "quantised.safetensors"
    asked = {"scheme": "w4a4", "images": N_IMAGES, "device": "cpu", "preprocess": PREPROCESS}
    quantize(vit, source, out, compensate=compensation, seed=seed, **asked)
    quantised = load_backbone(vit, quantised=out, kernel="float", device="cpu")
    _, held_out = images_of(source, seed)
    levels = [
        snr_db(wanted.numpy(), got.numpy()) for wanted, got in zip(backbone(held_out), quantised(held_out), strict=True)
    ]
    assert [getattr(tap, field).values[seed] for tap in diagnosis.taps] == pytest.approx(levels, abs=0.1)
    assert [tap.name for tap in diagnosis.taps] == ["z0", "z1", "z2"]


@pytest.mark.parametrize(("compensation", "part", "field"), [("cwac", "sites", "cwac_db"), ("qwt", "blocks", "qwt_db")])
def test_sites_and_blocks_are_as_quantize_reports_them(diagnosis, vit, source, tmp_path, compensation, part, field):
    out = tmp_path / "quantised.safetensors"
    asked = {"scheme": "w4a4", "images": N_IMAGES, "device": "cpu", "preprocess": PREPROCESS}
    report = quantize(vit, source, out, compensate=compensation, seed=0, **asked)
    lines = getattr(diagnosis, part)
    assert [line.name for line in lines] == [fit.site for fit in report.fits]
    for line, fit in zip(lines, report.fits, strict=True):
        assert getattr(line, field).values[0] == pytest.approx(10 * math.log10(fit.signal / fit.after), abs=0.1)
        assert line.uncompensated_db.values[0] == pytest.approx(10 * math.log10(fit.signal / fit.before), abs=0.1)


def test_each_seed_has_images_of_its_own(diagnosis):
    assert (diagnosis.n_calibration, diagnosis.n_held_out) == (N_IMAGES, N_HELD_OUT)
    assert [run["seed"] for run in diagnosis.runs] == [0, 1]
    assert len({run["images"] for run in diagnosis.runs}) == SEEDS
    last = diagnosis.taps[-1].cwac_db
    assert last.lowest < last.mean < last.highest


# Files


def test_json_and_csv_hold_the_same_numbers(diagnosis, folder):
    assert {path.name for path in folder.iterdir()} == set(FILES)
    record = json.loads((folder / "diagnosis.json").read_bytes())
    assert record == json.loads(json.dumps(diagnosis.to_dict()))
    lines = list(csv.DictReader(io.StringIO((folder / "sites.csv").read_text())))
    assert len(lines) == 4 * 7 + 2 * 3 + 3 * 3
    for line in lines:
        of_part = {one["name"]: one for one in record[f"{line['part']}s"]}
        spread = of_part[line["name"]][line["measure"]]
        values = [float(line["seed 0"]), float(line["seed 1"])]
        assert values == spread["values"]
        assert float(line["mean"]) == spread["mean"] == pytest.approx(np.mean(values))
        assert (float(line["lowest"]), float(line["highest"])) == (min(values), max(values))


def test_the_picture_is_that_of_the_diagnosis(diagnosis, folder):
    data = (folder / "diagnosis.png").read_bytes()
    assert data == draw_diagnosis(diagnosis)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100
    changed = replace(diagnosis.taps[1], cwac_db=Spread((9.0, 11.0)))
    assert data != draw_diagnosis(replace(diagnosis, taps=[diagnosis.taps[0], changed, diagnosis.taps[2]]))


def test_an_earlier_diagnosis_is_replaced(ask, tmp_path):
    for name in FILES:
        (tmp_path / name).write_text("old")
    ask(tmp_path, seeds=1)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    assert json.loads((tmp_path / "diagnosis.json").read_bytes())["scheme"] == "w4a4"
    assert (tmp_path / "sites.csv").read_text().startswith("part,name,measure")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


KILLED_WHILE_IT_WRITES = """
import os, signal, sys
from pathlib import Path
from coldtap.stores.storage.atomic import write_file

def pieces():
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)

write_file(Path(sys.argv[1]), pieces())
"""


def test_what_a_killed_diagnosis_leaves_does_not_stop_the_next_which_leaves_none_of_it(ask, tmp_path):
    out = tmp_path / "out"
    for name in FILES:
        killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_WRITES, out / name], check=False)
        assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in out.iterdir()} == {f"{name}.partial" for name in FILES}
    ask(out, seeds=1)
    assert {path.name for path in out.iterdir()} == set(FILES)
    (out / "thesis.csv.partial").write_bytes(b"of somebody else")
    with pytest.raises(RunError, match=r"holds thesis\.csv\.partial, which is of no diagnosis"):
        ask(out)


def test_a_tap_that_is_exact_is_said_to_be(ask, tmp_path):
    diagnosis = ask(tmp_path, seeds=1, overrides=["patch_embed.*=float"])
    assert diagnosis.taps[0].uncompensated_db.values == (math.inf,)
    record = json.loads((tmp_path / "diagnosis.json").read_bytes())
    assert record["taps"][0]["uncompensated_db"]["mean"] is None
    assert "patch_embed.proj" in record["left_float"]


def test_site_table_shows_levels_and_parameters():
    some = {"n_parameters": 1536, "n_folded_parameters": 768}
    fits = [
        SiteFit(site="blocks.0.attn.proj", signal=1.0, before=0.1, after=0.01, kept=0.75, **some),
        SiteFit(site="blocks.0.mlp.fc2", signal=1.0, before=0.5, after=0.0, kept=0.0, **some),
        SiteFit(site="blocks.1.mlp.fc2", signal=0.0, before=0.5, after=0.5, kept=1.0, **some),
    ]
    header, *lines = (line.split() for line in site_table(fits).splitlines())
    assert header[0] == "site"
    assert lines == [
        ["blocks.0.attn.proj", "10.00", "20.00", "75%", "1,536", "768"],
        ["blocks.0.mlp.fc2", "3.01", "exact", "0%", "1,536", "768"],
        ["blocks.1.mlp.fc2", "–", "–", "100%", "1,536", "768"],
        ["all", "4,608", "2,304"],
    ]


# The command


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(20):
        (folder / f"{seed}.png").write_bytes(encoded(smooth(seed)))
    return folder


def test_command_prints_tables_and_tells_of_its_images(pictures, tmp_path):
    out = tmp_path / "out"
    options = ("--calibration", pictures, "--out", out, "--scheme", "w6a6", "--images", N_IMAGES, "--seeds", 1)
    result = coldtap("diagnose", "coldtap/vit-reference", *options)
    assert result.exit_code == 0, result.stderr
    record = json.loads((out / "diagnosis.json").read_bytes())
    shown = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line}
    assert len(record["sites"]) == 18
    for site in record["sites"]:
        levels = [f"{site[name]['mean']:.2f}" for name in ("uncompensated_db", "cwac_db", "full_gain_db")]
        assert [shown[site["name"]][i] for i in (1, 2, -1)] == levels
    assert shown["z9"][1:] == [
        f"{record['taps'][9][name]['mean']:.2f}" for name in ("uncompensated_db", "cwac_db", "qwt_db")
    ]
    assert "16 images to calibrate on, 4 others held out" in result.stderr
    assert record["settings"]["model"] == "coldtap/vit-reference"


# Bad input


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"seeds": 0}, OptionError, "`seeds=0`: give 1 or more"),
        ({"scheme": "w3"}, OptionError, "scheme 'w3': choose one of w8a8"),
        ({"ranges": "best"}, OptionError, "`ranges='best'`: choose one of"),
        ({"target": "best"}, OptionError, "`target='best'`: choose one of"),
        ({"images": 15}, OptionError, "`images=15`: give at least 16"),
        ({"overrides": ["blocks"]}, OptionError, "`overrides='blocks'`: expected"),
        (
            {"images": 20},
            SourceError,
            r"takes 20 images to calibrate on and 5 others: .* 25 different images, and list has 24",
        ),
        (
            {"calibration": [(smooth(seed), 0) for seed in range(18)], "images": None},
            SourceError,
            "16 .* and 4 others: list has 18 that can",
        ),
        ({"calibration": "nowhere"}, SourceError, "nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(ask, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        ask(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(ask, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"holds thesis.txt, which is of no diagnosis: choose another folder"):
        ask(tmp_path)
    with pytest.raises(RunError, match=r"thesis.txt'` is a file: give a folder"):
        ask(tmp_path / "thesis.txt")
    with pytest.raises(OptionError, match=r"thesis.txt is a file, and no folder can be there"):
        ask(tmp_path / "thesis.txt/out", calibration="nowhere")
    with pytest.raises(MachineError, match="a name in this path is too long: choose a shorter one"):
        ask(tmp_path / (300 * "n"), calibration="nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_command_ends_in_one_line_on_a_mistake(pictures, tmp_path):
    options = ("--calibration", pictures, "--out", tmp_path / "out", "--images", 17)
    result = coldtap("diagnose", "coldtap/vit-reference", *options)
    assert result.exit_code == ColdtapError.exit_code + 2
    assert "takes 17 images to calibrate on and 4 others" in error_line(result)
