"""What a store is: recipe, format, writing, reading, verifying. Imports neither torch nor timm."""

from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.reading.array import StoredArray
from coldtap.stores.reading.store import Store, open_store

__all__ = ["FinalNorm", "Recipe", "Store", "StoredArray", "open_store"]
