"""`recipe.json`: reading it, refusing what is no store, and comparing it with what is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldtap.errors import CorruptStoreError, MachineError, RecipeMismatchError, StoreError
from coldtap.stores.format.canonical import parse_json
from coldtap.stores.format.recipe import Recipe, differences
from coldtap.stores.storage.atomic import TEMPORARY_SUFFIX
from coldtap.stores.storage.files import read_small
from coldtap.stores.storage.lock import LOCK_NAME

RECIPE = "recipe.json"
RECORDED = {"environment", "model", "source"}


def read_recipe(store: Path) -> tuple[Recipe, dict[str, Any]] | None:
    """The recipe of a store and what was recorded beside it, or None where there is nothing yet.

    Raises:
        StoreError: the path is a file, or a folder with something else in it.
        CorruptStoreError: `recipe.json` is damaged.
    """
    path = store / RECIPE
    if store.exists() and not store.is_dir():
        raise StoreError(f"{store} is a file: give the path of a store (a folder), or one that does not exist yet")
    try:
        record = parse_json(read_small(path))
    except FileNotFoundError:
        _refuse_foreign(store)
        return None
    except NotADirectoryError as error:
        raise StoreError(f"{store} lies below a file, not a folder: give another path") from error
    except PermissionError as error:
        raise MachineError(f"{path} may not be read ({error.strerror}): change its mode or ask its owner") from error
    except OSError as error:
        raise CorruptStoreError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CorruptStoreError(f"{path} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise CorruptStoreError(f"{path} is not a JSON object")
    recipe, recorded = Recipe.from_dict(record, where=str(path)), record.get("recorded")
    if not isinstance(recorded, dict) or RECORDED - set(recorded):
        raise CorruptStoreError(f"{path}: `recorded` lacks some of {sorted(RECORDED)}; it was edited by hand")
    return recipe, recorded


def _refuse_foreign(store: Path) -> None:
    if not store.is_dir():
        return
    found = sorted(name.name for name in store.iterdir() if not _is_leftover(name.name))
    if found:
        kind = (
            "a Zarr store that coldtap did not write" if {"zarr.json", ".zgroup", ".zarray"} & {*found} else "no store"
        )
        raise StoreError(
            f"{store} is {kind} (it holds {', '.join(found[:3])}{' …' if len(found) > 3 else ''} and no {RECIPE}): "
            "give an empty or a new path; nothing was changed"
        )


def _is_leftover(name: str) -> bool:
    return name in (LOCK_NAME, RECIPE + TEMPORARY_SUFFIX)


def require_same_recipe(store: Path, old: Recipe, new: Recipe) -> None:
    """Refuse to go on with a store of another recipe.

    Raises:
        RecipeMismatchError: naming each field that differs, old and new.
    """
    if lines := differences(old, new):
        raise RecipeMismatchError(
            f"{store} holds another recipe; choose another path, or the old settings. "
            f"Fields that differ (stored → asked): {'; '.join(lines)}"
        )


def require_extraction(store: Path, recorded: Mapping[str, Any]) -> None:
    """Refuse to extract blocks into an unfinished conversion: the recipe is the same, the last bits are not.

    Raises:
        StoreError: the store was begun by `coldtap convert`.
    """
    if "converted_from" in recorded:
        raise StoreError(
            f"{store} was begun by `coldtap convert`: finish it with the same command, or choose a new path"
        )
