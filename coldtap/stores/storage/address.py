"""From what a person gives as the place of a store or a run to its storage: the one place that knows the kinds."""

from pathlib import Path

from coldtap.stores.storage.contract import Storage
from coldtap.stores.storage.local import LocalStorage

type Place = str | Path | Storage


def storage_at(place: Place) -> Storage:
    """Return the storage of a place: a folder's path, there or not yet, or a storage itself."""
    return place if isinstance(place, Storage) else LocalStorage(Path(place))
