"""How many images a forward pass takes where nobody says."""

from coldtap.pipeline.backbones.backbone import Backbone


def choose_batch_size(backbone: Backbone) -> int:
    """Choose the images per batch: a power of two from 4 to 256 that keeps one tap near a million numbers, 16 on a GPU.

    Measured on two cores (`docs/log.md`): a tap that stays in the cache runs fastest.
    """
    largest = max(geometry.tokens * geometry.channels for geometry in backbone.geometries.values())
    budget = 2**24 if backbone.device.type == "cuda" else 2**20
    return min(max(1 << ((budget // largest).bit_length() - 1), 4), 256) if budget >= largest else 4
