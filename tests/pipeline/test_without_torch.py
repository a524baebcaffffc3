"""A machine without torch and timm lists, decodes and preprocesses images, and plans a job."""

import subprocess
import sys

from coldtap.pipeline.backbones.backbone import load_backbone
from coldtap.pipeline.images.sources import open_source
from coldtap.pipeline.plan.options import EncodingOptions, RowOptions
from coldtap.pipeline.plan.plan import plan_job
from tests.helpers.pictures import write_classes

WITHOUT_TORCH = """
import importlib, pkgutil, sys
sys.modules["torch"] = sys.modules["timm"] = sys.modules["torchvision"] = None  # any import of them now fails

import coldtap.pipeline.images, coldtap.pipeline.plan
import coldtap.pipeline.job
for part in (coldtap.pipeline.images, coldtap.pipeline.plan):
    for module in pkgutil.walk_packages(part.__path__, part.__name__ + "."):
        importlib.import_module(module.name)
"""

PLAN = """
from coldtap.pipeline.images.decode_ahead import Decoder, Sample
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.images.sources import open_source
from coldtap.pipeline.plan.backbone_description import BackboneDescription
from coldtap.pipeline.plan.description import JobDescription
from coldtap.pipeline.plan.options import EncodingOptions, ExtractorOptions, RowOptions
from coldtap.pipeline.plan.plan import plan_job
from coldtap.stores.format.geometry import Geometry

preprocess = Preprocess(
    height=32, width=32, crop_pct=1.0, crop_mode="squash", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
)
job = JobDescription(
    source=sys.argv[1], extractor=ExtractorOptions(), rows=RowOptions(views=1), encoding=EncodingOptions(taps="last:2")
)
source = job.open_source()
with Decoder(source=source, preprocess=preprocess, batch_size=4, n_threads=1) as decoder:
    batch = next(decoder.batches([Sample(0), Sample(1, view=1)]))
    assert not batch.reasons and batch.pixels.shape == (2, 3, 32, 32) and batch.pixels.std() > 0

backbone = BackboneDescription(
    architecture="coldtap/vit-reference",
    weights=sys.argv[2],
    precision="float32",
    preprocess=preprocess,
    tap_names=tuple(f"z{i}" for i in range(10)),
    geometries={i: Geometry(grid=(8, 8), prefix_tokens=1, channels=192) for i in range(10)},
    stages=False,
    norm=None,
)
plan = plan_job(source, backbone, splits=source.listing.splits, rows=job.rows, encoding=job.encoding)
assert JobDescription.loads(job.dumps()) == job
print(plan.recipe.address)
"""


def without_torch(code: str, *arguments: str) -> str:
    """Run code in a process that cannot import torch, timm or torchvision; returns what it prints."""
    command = [sys.executable, "-c", WITHOUT_TORCH + code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_images_plans_and_the_job_import_neither_torch_nor_timm():
    assert without_torch("print('torch' in sys.modules and sys.modules['torch'] is None)") == "True"


def test_a_job_is_planned_from_a_described_backbone_as_from_a_loaded_one(tmp_path):
    write_classes(tmp_path / "images", 3, "ant", "bee")
    backbone = load_backbone("coldtap/vit-reference", device="cpu")
    address = without_torch(PLAN, str(tmp_path / "images"), backbone.weights)
    source = open_source(tmp_path / "images")
    options = {"rows": RowOptions(views=1), "encoding": EncodingOptions(taps="last:2")}
    plan = plan_job(source, backbone, splits=source.listing.splits, **options)
    assert address == plan.recipe.address
