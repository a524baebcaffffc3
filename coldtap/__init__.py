"""coldtap: run a frozen vision backbone once, keep its features, train small adaptors from them alone.

    from coldtap import cache_features, open_store, train_adaptor

The names are loaded when first used: reading a store needs no torch, training needs no timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coldtap.adaptors.evaluating import evaluate_adaptor as evaluate_adaptor
    from coldtap.adaptors.training import train_adaptor as train_adaptor
    from coldtap.pipeline.job import cache_features as cache_features
    from coldtap.pipeline.quantisation.diagnose import diagnose as diagnose
    from coldtap.pipeline.quantisation.onnx_export import export_backbone as export_backbone
    from coldtap.pipeline.quantisation.quantize import quantize as quantize
    from coldtap.stores.adding_targets import add_targets as add_targets
    from coldtap.stores.fitting_compensation import fit_compensation as fit_compensation
    from coldtap.stores.store import open_store as open_store

__version__ = "0.1.0"
_PUBLIC = {
    "add_targets": "coldtap.stores.adding_targets",
    "cache_features": "coldtap.pipeline.job",
    "diagnose": "coldtap.pipeline.quantisation.diagnose",
    "evaluate_adaptor": "coldtap.adaptors.evaluating",
    "export_backbone": "coldtap.pipeline.quantisation.onnx_export",
    "fit_compensation": "coldtap.stores.fitting_compensation",
    "open_store": "coldtap.stores.store",
    "quantize": "coldtap.pipeline.quantisation.quantize",
    "train_adaptor": "coldtap.adaptors.training",
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
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'coldtap' has no attribute {name!r}")
