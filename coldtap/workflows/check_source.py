"""The images of a store held against what was read when it was made."""

from collections.abc import Callable
from pathlib import Path

from coldtap.pipeline.images.decode import BadImageError, content_digest
from coldtap.pipeline.images.sources import open_source
from coldtap.stores import open_store
from coldtap.stores.reading.store import Store
from coldtap.stores.storage.address import Place
from coldtap.stores.verify.problems import Problem
from coldtap.stores.verify.verify import source_problems


def check_source(source: Path, store: Place) -> list[Problem]:
    """Return what is wrong with the images of a sound store: gone, broken, or changed since they were cached.

    Raises:
        SourceError: The source cannot be listed.
        StoreError: There is no such store.
    """
    opened = open_store(store)
    return list(source_problems(opened, _digests_of(source, opened)))


def _digests_of(source: Path, store: Store) -> Callable[[str], str | None]:
    images = open_source(source, labels="optional", seed=store.recipe.rows.seed or 0)
    places = {sample: index for index, sample in enumerate(images.listing.ids)}

    def digest(sample: str) -> str | None:
        if sample not in places:
            return None
        try:
            return content_digest(images.read(places[sample]))
        except BadImageError as error:
            return str(error)

    return digest
