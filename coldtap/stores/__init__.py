"""What a store is: recipe, format, writing, reading, verifying. Imports neither torch nor timm."""

from coldtap.stores.array_reader import StoredArray
from coldtap.stores.norm import FinalNorm
from coldtap.stores.recipe import Recipe
from coldtap.stores.store import Store, open_store

__all__ = ["FinalNorm", "Recipe", "Store", "StoredArray", "open_store"]
