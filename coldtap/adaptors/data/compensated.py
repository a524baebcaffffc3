"""A store's compensation as an adaptor uses it: picked for the taps that it reads, kept in its run, put before it."""

import torch
from safetensors.numpy import load, save
from torch import nn

from coldtap.adaptors.data.restore import over_row
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.errors import MissingFeaturesError
from coldtap.stores import Store
from coldtap.stores.format.compensation import TapMaps


def maps_of(store: Store, spec: FeatureSpec, name: str | None) -> TapMaps | None:
    """Return the maps of the taps of `spec` by a store's compensation; None where no name is given.

    Raises:
        MissingFeaturesError: The store has no such compensation, or it has no map of the array.
    """
    if name is None:
        return None
    compensation = store.compensation(name)
    if spec.array not in compensation.maps:
        raise MissingFeaturesError(
            f"the compensation {name!r} of {store.storage} has no map of {spec.array}, only of "
            f"{', '.join(compensation.maps)}: fit it with a float store that holds this array"
        )
    taps = store.arrays[spec.array].taps
    return compensation.maps[spec.array].of_places([taps.index(tap) for tap in spec.taps])


def maps_bytes(maps: TapMaps) -> bytes:
    """Return the file of a run's maps: `scale` and `offset`, (tap, channel) of the taps that the adaptor reads."""
    return save({"scale": maps.scale, "offset": maps.offset})


def parse_maps(data: bytes) -> TapMaps:
    """Parse what `maps_bytes` gave; anything else is a SafetensorError, KeyError or TypeError."""
    return TapMaps(**{name: values.copy() for name, values in load(data).items()})


class Compensated(nn.Module):
    """An adaptor behind the map that its features go through, each row a product and a sum."""

    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, adaptor: nn.Module, maps: TapMaps, spec: FeatureSpec) -> None:
        super().__init__()
        self.adaptor = adaptor
        self.register_buffer("scale", over_row(maps.scale, spec.row_shape))
        self.register_buffer("offset", over_row(maps.offset, spec.row_shape))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (batch, *row shape) as the extractor gives them to logits."""
        logits: torch.Tensor = self.adaptor(features * self.scale + self.offset)
        return logits
