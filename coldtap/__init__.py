"""coldtap: run a frozen vision backbone once, keep its features, train small adaptors from them alone.

    from coldtap import cache_features, open_store, train_adaptor

The names are loaded when first used: reading a store needs no torch, training needs no timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coldtap.adaptors.training import train_adaptor as train_adaptor
    from coldtap.pipeline.job import cache_features as cache_features
    from coldtap.stores.adding_targets import add_targets as add_targets
    from coldtap.stores.store import open_store as open_store

__version__ = "0.1.0"
_PUBLIC = {
    "add_targets": "coldtap.stores.adding_targets",
    "cache_features": "coldtap.pipeline.job",
    "open_store": "coldtap.stores.store",
    "train_adaptor": "coldtap.adaptors.training",
}
__all__ = ["add_targets", "cache_features", "open_store", "train_adaptor"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'coldtap' has no attribute {name!r}")
