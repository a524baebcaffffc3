"""Which integer kernels are exact on the processor that runs the tests.

Without VNNI, oneDNN adds pairs of 8-bit products in 16 bits and saturates. coldtap finds that out and takes another
kernel; a test of that kernel's numbers has nothing to hold there.
"""

from functools import cache

import pytest
import torch

from coldtap.errors import MachineError
from coldtap.pipeline.backbones.integer.kernel_choice import choose_kernel
from coldtap.pipeline.backbones.integer.kernels import Kernel

CPU = torch.device("cpu")


def skip_where_inexact(kernel: Kernel) -> None:
    """Skip a test where the product would refuse this kernel, with its own reason."""
    if kernel.name not in ("onednn", "int_mm"):
        return
    try:
        choose_kernel(kernel.name, CPU)
    except MachineError as refusal:
        pytest.skip(str(refusal))


@cache
def exact_kernel() -> Kernel:
    """Return the integer kernel that coldtap takes on this processor."""
    return choose_kernel("int", CPU).kernel
