"""A trained adaptor, back from its run folder."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.networks.options import parse_options
from coldtap.adaptors.run_folder import ADAPTOR, RunInfo, read_run
from coldtap.stores.canonical import sha256
from coldtap.stores.errors import OptionError, RunError


def load_adaptor(folder: str | Path) -> tuple[nn.Module, RunInfo]:
    """Loads a finished run: its module in eval mode on the CPU, and what `run.json` says.

    The module maps features as `RunInfo.features` describes them, with a batch axis before `row_shape`, in float32,
    to logits (batch, class).

    Raises:
        RunError: There is no finished run, it is of another format version, or a file is missing or damaged.
    """
    folder = Path(folder)
    info = read_run(folder)
    if info is None:
        raise RunError(f"there is no finished run at {folder}: make one with `train-adaptor STORE --out {folder}`")
    path = folder / ADAPTOR
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): train again into another --out") from error
    if sha256(data) != info.adaptor_sha256:
        raise RunError(f"{path} is not what run.json says, so it is damaged: train again into another --out")
    module = build_adaptor(info)
    try:
        module.load_state_dict(load(data))
    except (RuntimeError, SafetensorError) as error:
        raise RunError(f"{path} does not fit the settings in run.json ({str(error).splitlines()[0]})") from error
    return module.eval(), info


def build_adaptor(info: RunInfo) -> nn.Module:
    """Builds the untrained module of a run from what `run.json` says.

    Raises:
        RunError: The run's adaptor or options are unknown to this coldtap.
    """
    try:
        kind = adaptor_kind(info.settings.adaptor)
        options = parse_options(kind.options, info.settings.options, adaptor=kind.name)
    except OptionError as error:
        raise RunError(f"run.json names what this coldtap does not know: {error}") from error
    return kind.build(info.features, options, n_classes=info.n_classes)
