"""How many torch threads a worker may use without changing a bit of what one process would write.

A convolution, a product of matrices or a norm gave the same bits with any number of threads wherever it was tried, but
means over small batches did not: squeeze-and-excitation networks in batches of 4 and less (docs/log.md). So it is tried
on the job's own backbone, in every batch size that the job has.
"""

from collections.abc import Iterable

import torch

from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.pipeline.backbones.torch_state import torch_threads
from coldtap.stores.format.rows import RowPlan


def batch_sizes(plan: RowPlan, batch_size: int) -> set[int]:
    """Return all numbers of images that a forward pass of the job has: whole batches, and the last of blocks."""
    blocks = {len(plan.block(block)) for block in range(plan.n_blocks)}
    return {batch_size for rows in blocks if rows >= batch_size} | {rows % batch_size for rows in blocks} - {0}


def threads_with_the_same_features(backbone: Backbone, sizes: Iterable[int], wanted: int) -> int:
    """Return `wanted`, if so many threads give the bits of this process with its own number; else that number."""
    own = torch.get_num_threads()
    if wanted == own or backbone.device.type != "cpu":
        return wanted
    same = all(_same_features(backbone, n_images, wanted) for n_images in sorted(sizes))
    return wanted if same else own


def _same_features(backbone: Backbone, n_images: int, n_threads: int) -> bool:
    how = backbone.preprocess
    noise = torch.Generator().manual_seed(n_images)
    shape = (n_images, len(how.mean), how.height, how.width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
    ours = backbone(images)
    with torch_threads(n_threads):
        theirs = backbone(images)
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(ours, theirs, strict=True))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Bits as integers: a NaN equals itself."""
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)
