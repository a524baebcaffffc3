"""A trained adaptor, back from its run folder."""

from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from coldtap.adaptors.data.compensated import Compensated, parse_maps
from coldtap.adaptors.networks.kinds import recorded_kind
from coldtap.adaptors.networks.options import parse_options
from coldtap.adaptors.runs.record import RunInfo
from coldtap.adaptors.runs.run_folder import ADAPTOR, COMPENSATION, RUN, read_run
from coldtap.errors import CorruptStoreError, OptionError, RunError
from coldtap.stores.format.canonical import sha256
from coldtap.stores.format.compensation import TapMaps
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage

WEIGHT_BYTES = 4  # float32


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRun:
    """A finished run: its adaptor alone, in eval mode on the CPU, and the map that features go through before it."""

    info: RunInfo
    adaptor: nn.Module
    maps: TapMaps | None


def load_adaptor(run: Place, *, adaptor: str | None = None) -> tuple[nn.Module, RunInfo]:
    """Load a finished run: its module in eval mode on the CPU, and what `run.json` says.

    The module maps features as `RunInfo.features` describes them, with a batch axis before `row_shape`, in float32,
    to logits (batch, class). Of a run with a compensation it applies that first: what it takes are features as the
    run's extractor gives them.

    Args:
        run: The run folder, or its storage.
        adaptor: The run's adaptor where it is none of coldtap's own, as `module:NAME`: no file names code to import.

    Raises:
        RunError: There is no finished run, it is of another format version, or a file is missing or damaged.
    """
    loaded = load_run(run, adaptor=adaptor)
    if loaded.maps is None:
        return loaded.adaptor, loaded.info
    return Compensated(loaded.adaptor, loaded.maps, loaded.info.features).eval(), loaded.info


def load_run(run: Place, *, adaptor: str | None = None) -> LoadedRun:
    """Load the parts of a finished run.

    Raises:
        RunError: As `load_adaptor` does.
    """
    storage = storage_at(run)
    info = read_run(storage)
    if info is None:
        raise RunError(f"there is no finished run at {storage}: make one with `train-adaptor`")
    data = _read(storage, ADAPTOR, info.adaptor_sha256)
    module = build_adaptor(info, adaptor=adaptor, where=storage.describe(RUN), n_bytes=len(data))
    try:
        module.load_state_dict(load(data))
    except (RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{storage.describe(ADAPTOR)} does not fit the settings in run.json ({str(error).splitlines()[0]})"
        ) from error
    return LoadedRun(info=info, adaptor=module.eval(), maps=_maps(storage, info))


def _maps(run: Storage, info: RunInfo) -> TapMaps | None:
    if info.compensation_sha256 is None:
        return None
    data = _read(run, COMPENSATION, info.compensation_sha256)
    try:
        return parse_maps(data)
    except (SafetensorError, KeyError, TypeError) as error:
        where = run.describe(COMPENSATION)
        raise RunError(f"{where} is damaged ({error!r}): train again into another `out`") from error


def _read(run: Storage, name: str, digest: str) -> bytes:
    where = run.describe(name)
    try:
        data = run.get(name, limit=None)
    except OSError as error:
        raise RunError(f"{where} cannot be read ({error.strerror}): train again into another `out`") from error
    except CorruptStoreError as error:
        raise RunError(f"{error}: train again into another `out`") from error
    if sha256(data) != digest:
        raise RunError(f"{where} is not what run.json says, so it is damaged: train again into another `out`")
    return data


def build_adaptor(info: RunInfo, *, adaptor: str | None, where: str, n_bytes: int) -> nn.Module:
    """Build the untrained module of a run from what `run.json` says.

    Args:
        info: What it says.
        adaptor: As `load_adaptor` takes it.
        where: The file, for messages.
        n_bytes: Of the weights; nothing larger is built.

    Raises:
        OptionError: `adaptor` is another one than the run's.
        RunError: The run's adaptor is not coldtap's own and was not named, its options are unknown, or it has more
            parameters than there are weights.
    """
    try:
        kind = recorded_kind(info.settings.adaptor, asked=adaptor, where=where)
        options = parse_options(kind.options, info.settings.options, adaptor=kind.name)
    except OptionError as error:
        if adaptor is not None:
            raise
        raise RunError(f"{where} names what this coldtap does not know: {error}") from error
    n_parameters = kind.count(info.features, options, n_classes=info.n_classes)
    if n_parameters * WEIGHT_BYTES > n_bytes:
        raise RunError(f"{where} tells of {n_parameters} parameters, more than there are weights: train again")
    return kind.build(info.features, options, n_classes=info.n_classes)
