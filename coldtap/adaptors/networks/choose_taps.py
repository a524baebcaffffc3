"""Which array of a store holds the taps that an adaptor asks for: one tap, or every g-th."""

from collections.abc import Sequence

from coldtap.adaptors.networks.contract import FeatureSpec, arrays_of, describe_gathers, refuse_stage_network, spec_of
from coldtap.errors import MissingFeaturesError, OptionError
from coldtap.stores import Store, StoredArray
from coldtap.stores.format.gathers import GATHERS, GatherName


def find_tap(store: Store, tap: int, gathers: Sequence[GatherName], *, adaptor: str) -> tuple[StoredArray, int]:
    """Find one tap, of whatever geometry.

    Args:
        store: An open store.
        tap: The tap's number; negative ones count from the backbone's last.
        gathers: The gathers that can serve, the preferred first.
        adaptor: The adaptor's name, for the message.

    Returns:
        The array that holds the tap, and the tap's number.

    Raises:
        MissingFeaturesError: None of these gathers holds the tap.
    """
    wanted = tap if tap >= 0 else store.depth + 1 + tap
    arrays = [array for gather in gathers for array in arrays_of(store, gather)]
    for array in arrays:
        if wanted in array.taps:
            return array, wanted
    held = sorted({tap for array in arrays for tap in array.taps})
    # All taps of `pooled` are still 1 % of the bytes; of `layers` one tap is a tenth of all.
    taps = "all" if GATHERS[gathers[0]].has_patch_mean or not 0 <= wanted <= store.depth else wanted
    choose = f", there with taps {held}: choose with `settings['tap']=N`, or" if held else ":"
    raise MissingFeaturesError(
        f"{adaptor} needs tap {tap} in {' or '.join(f'`{gather}`' for gather in gathers)}; {store.storage} holds "
        f"{describe_gathers(store)}{choose} cache again with `gather={gathers[0]!r}` and `taps={str(taps)!r}`"
    )


def find_every(store: Store, gap: int, *, adaptor: str, first: int = 0) -> FeatureSpec:
    """Find every `gap`-th tap of `layers` up to the last, from `first` on.

    Args:
        store: An open store.
        gap: Blocks of the backbone from one tap to the next.
        adaptor: The adaptor's name, for the messages.
        first: The first tap: 0 for z0, the input of the first block, or `gap` for block outputs alone.

    Returns:
        The features to read.

    Raises:
        MissingFeaturesError: The store holds no `layers`, or not these taps, or a stage network.
        OptionError: The gap does not divide the backbone's depth.
    """
    refuse_stage_network(store, adaptor=adaptor)
    layers = arrays_of(store, "layers")
    if not layers:
        raise MissingFeaturesError(
            f"{adaptor} needs `layers`; {store.storage} holds {describe_gathers(store)}: cache again with "
            "`gather='layers'`"
        )
    if store.depth % gap:
        raise OptionError(f"gap={gap} does not divide the backbone's depth of {store.depth} blocks")
    taps = tuple(range(first, store.depth + 1, gap))
    if missing := sorted(set(taps) - set(layers[0].taps)):
        raise MissingFeaturesError(
            f"{adaptor} with gap={gap} needs taps {list(taps)}; {store.storage} lacks {missing} in `layers`: "
            "cache again with `gather='layers'` and `taps='all'`"
        )
    return spec_of(store, layers[0], taps)
