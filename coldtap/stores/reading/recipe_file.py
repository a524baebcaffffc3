"""`recipe.json`: reading it, refusing what is no store, and comparing it with what is asked."""

from itertools import chain, groupby, islice
from typing import Any

from coldtap.errors import CorruptStoreError, MachineError, RecipeMismatchError, StoreError
from coldtap.stores.format.canonical import parse_json
from coldtap.stores.format.recipe import Recipe, differences
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import TEMPORARY_SUFFIX, Storage

RECIPE = "recipe.json"
RECORDED = {"environment", "model", "source"}


def read_recipe(place: Place) -> tuple[Recipe, dict[str, Any]] | None:
    """Return the recipe of a store and what was recorded beside it, or None where there is nothing yet.

    Raises:
        StoreError: the path is a file, or a folder with something else in it.
        CorruptStoreError: `recipe.json` is damaged.
    """
    storage = storage_at(place)
    where = storage.describe(RECIPE)
    try:
        record = parse_json(storage.get(RECIPE))
    except FileNotFoundError:
        _refuse_foreign(storage)
        return None
    except NotADirectoryError as error:
        raise StoreError(
            f"{storage} {error.strerror}: give the path of a store (a folder), or one that does not exist yet"
        ) from error
    except PermissionError as error:
        raise MachineError(f"{where} may not be read ({error.strerror}): change its mode or ask its owner") from error
    except OSError as error:
        raise CorruptStoreError(f"{where} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CorruptStoreError(f"{where} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise CorruptStoreError(f"{where} is not a JSON object")
    recipe, recorded = Recipe.from_dict(record, where=where), record.get("recorded")
    if not isinstance(recorded, dict) or RECORDED - set(recorded):
        raise CorruptStoreError(f"{where}: `recorded` lacks some of {sorted(RECORDED)}; it was edited by hand")
    return recipe, recorded


def _refuse_foreign(storage: Storage) -> None:
    found = _first_names(storage)
    if found:
        zarr = any(storage.stat(name) for name in ("zarr.json", ".zgroup", ".zarray"))
        kind = "a Zarr store that coldtap did not write" if zarr else "no store"
        raise StoreError(
            f"{storage} is {kind} (it holds {', '.join(found[:3])}{' …' if len(found) > 3 else ''} and no {RECIPE}): "
            "give an empty or a new path; nothing was changed"
        )


def _first_names(storage: Storage) -> list[str]:
    """The first few names at the root, but for what a job leaves that died before its recipe."""
    keys = chain(storage.list(), (name for name in storage.leftovers() if name != RECIPE + TEMPORARY_SUFFIX))
    names = (name for name, _ in groupby(key.partition("/")[0] for key in keys))
    return list(islice(names, 4))


def require_same_recipe(store: Storage, old: Recipe, new: Recipe) -> None:
    """Refuse to go on with a store of another recipe.

    Raises:
        RecipeMismatchError: naming each field that differs, old and new.
    """
    if lines := differences(old, new):
        raise RecipeMismatchError(
            f"{store} holds another recipe; choose another path, or the old settings. "
            f"Fields that differ (stored → asked): {'; '.join(lines)}"
        )
