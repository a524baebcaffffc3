"""The device of a name, for backbones and for adaptors."""

from typing import TYPE_CHECKING

from coldtap.errors import MachineError, OptionError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> "torch.device":
    """Return the device of a name; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        OptionError: the name is not `auto`, `cpu`, `cuda` or `cuda:N`.
        MachineError: the machine has no such GPU.
    """
    import torch

    n_gpus = torch.cuda.device_count()
    if name in ("auto", "cpu"):
        return torch.device("cuda", 0) if name == "auto" and n_gpus else torch.device("cpu")
    kind, colon, index = name.partition(":")
    if kind != "cuda" or bool(colon) != index.isdecimal():
        raise OptionError(f"`device={name!r}`: choose auto, cpu, cuda or cuda:N")
    if int(index or 0) >= n_gpus:
        raise MachineError(f"`device={name!r}`: this machine has {n_gpus} GPUs; use `device='cpu'`")
    return torch.device("cuda", int(index or 0))
