"""A trained adaptor, back from its run folder."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from coldtap.adaptors.data.compensated import Compensated, parse_maps
from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.networks.options import parse_options
from coldtap.adaptors.runs.record import RunInfo
from coldtap.adaptors.runs.run_folder import ADAPTOR, COMPENSATION, read_run
from coldtap.errors import OptionError, RunError
from coldtap.stores.format.canonical import sha256
from coldtap.stores.format.compensation import TapMaps


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRun:
    """A finished run: its adaptor alone, in eval mode on the CPU, and the map that features go through before it."""

    info: RunInfo
    adaptor: nn.Module
    maps: TapMaps | None


def load_adaptor(folder: str | Path) -> tuple[nn.Module, RunInfo]:
    """Load a finished run: its module in eval mode on the CPU, and what `run.json` says.

    The module maps features as `RunInfo.features` describes them, with a batch axis before `row_shape`, in float32,
    to logits (batch, class). Of a run with a compensation it applies that first: what it takes are features as the
    run's extractor gives them.

    Raises:
        RunError: There is no finished run, it is of another format version, or a file is missing or damaged.
    """
    run = load_run(folder)
    if run.maps is None:
        return run.adaptor, run.info
    return Compensated(run.adaptor, run.maps, run.info.features).eval(), run.info


def load_run(folder: str | Path) -> LoadedRun:
    """Load the parts of a finished run.

    Raises:
        RunError: As `load_adaptor` does.
    """
    folder = Path(folder)
    info = read_run(folder)
    if info is None:
        raise RunError(f"there is no finished run at {folder}: make one with `train-adaptor`")
    data = _read(folder / ADAPTOR, info.adaptor_sha256)
    module = build_adaptor(info)
    try:
        module.load_state_dict(load(data))
    except (RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{folder / ADAPTOR} does not fit the settings in run.json ({str(error).splitlines()[0]})"
        ) from error
    return LoadedRun(info=info, adaptor=module.eval(), maps=_maps(folder / COMPENSATION, info))


def _maps(path: Path, info: RunInfo) -> TapMaps | None:
    if info.compensation_sha256 is None:
        return None
    data = _read(path, info.compensation_sha256)
    try:
        return parse_maps(data)
    except (SafetensorError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): train again into another `out`") from error


def _read(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): train again into another `out`") from error
    if sha256(data) != digest:
        raise RunError(f"{path} is not what run.json says, so it is damaged: train again into another `out`")
    return data


def build_adaptor(info: RunInfo) -> nn.Module:
    """Build the untrained module of a run from what `run.json` says.

    Raises:
        RunError: The run's adaptor or options are unknown to this coldtap.
    """
    try:
        kind = adaptor_kind(info.settings.adaptor)
        options = parse_options(kind.options, info.settings.options, adaptor=kind.name)
    except OptionError as error:
        raise RunError(f"run.json names what this coldtap does not know: {error}") from error
    return kind.build(info.features, options, n_classes=info.n_classes)
