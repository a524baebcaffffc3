"""coldtap: run a frozen vision backbone once, keep its features, train small adaptors from them alone.

    from coldtap import cache_features, open_store, train_adaptor

The names are loaded when first used: reading a store needs no torch, training needs no timm. One whose extra is not
installed raises MissingExtraError, which is an ImportError too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from coldtap.extras import require_extras_of
from coldtap.version import __version__ as __version__

if TYPE_CHECKING:
    from coldtap.adaptors.training.evaluate import evaluate_adaptor as evaluate_adaptor
    from coldtap.adaptors.training.train import train_adaptor as train_adaptor
    from coldtap.pipeline.job import cache_features as cache_features
    from coldtap.pipeline.quantisation.diagnosis.diagnose import diagnose as diagnose
    from coldtap.pipeline.quantisation.onnx.export import export_backbone as export_backbone
    from coldtap.pipeline.quantisation.quantize import quantize as quantize
    from coldtap.stores.compensation.fit import fit_compensation as fit_compensation
    from coldtap.stores.editing.add_targets import add_targets as add_targets
    from coldtap.stores.reading.store import open_store as open_store

_PUBLIC = {
    "add_targets": "coldtap.stores.editing.add_targets",
    "cache_features": "coldtap.pipeline.job",
    "diagnose": "coldtap.pipeline.quantisation.diagnosis.diagnose",
    "evaluate_adaptor": "coldtap.adaptors.training.evaluate",
    "export_backbone": "coldtap.pipeline.quantisation.onnx.export",
    "fit_compensation": "coldtap.stores.compensation.fit",
    "open_store": "coldtap.stores.reading.store",
    "quantize": "coldtap.pipeline.quantisation.quantize",
    "train_adaptor": "coldtap.adaptors.training.train",
}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "add_targets",
    "cache_features",
    "diagnose",
    "evaluate_adaptor",
    "export_backbone",
    "fit_compensation",
    "open_store",
    "quantize",
    "train_adaptor",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        require_extras_of(name.replace("_", "-"))
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'coldtap' has no attribute {name!r}")
