"""From what a person gives as the place of a store or a run to its storage: the one place that knows the kinds."""

from pathlib import Path, PurePath

from coldtap.stores.storage.atomic import require_no_url
from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.local import LocalStorage

type Place = str | Path | Storage


def storage_at(place: Place, *, follow_links: bool = False) -> Storage:
    """Return the storage of a place: a folder's path, there or not yet, or a storage itself.

    Args:
        place: what a person gives; of a path the last part may be a link.
        follow_links: whether links to files in the folder are read, as hub caches and git-annex lay them out.

    Raises:
        OptionError: it is a URL, for which there is no storage.
    """
    if isinstance(place, Storage):
        return place
    require_no_url(place)
    return LocalStorage(Path(place), follow_links=follow_links)


def place_of(storage: Storage) -> Path | Storage:
    """Return what gives the storage again: the path of a folder, else itself."""
    return storage.root if isinstance(storage, LocalStorage) else storage


def overlap(one: Storage, other: Storage) -> bool:
    """Return whether one is, lies in or holds the other."""
    a, b = (PurePath(_resolved(storage)) for storage in (one, other))
    return a.is_relative_to(b) or b.is_relative_to(a)


def _resolved(storage: Storage) -> str:
    return str(storage.root.resolve() if isinstance(storage, LocalStorage) else storage)
