"""Reading the lists of chunks' digests, each held against the manifest."""

from collections.abc import Callable
from functools import partial

from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.chunk_digests import ChunkDigests, digests_name, parse_digests
from coldtap.stores.format.features import CHUNK_DIGESTS
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.reading.manifest_files import ManifestFiles

type ReadDigests = Callable[[ArraySpec, int], ChunkDigests]  # the list of a block of an array


def digests_of(files: ManifestFiles, recipe: Recipe) -> ReadDigests | None:
    """Return what reads a store's lists, or None where it has none: then only `verify` knows where chunks belong.

    What is returned raises CorruptStoreError where a list is missing, or not what the manifest says.
    """
    return partial(_read, files) if CHUNK_DIGESTS in recipe.requires else None


def _read(files: ManifestFiles, spec: ArraySpec, block: int) -> ChunkDigests:
    name = digests_name(spec.name, block)
    return parse_digests(files.read(name), spec, where=files.storage.describe(name))
