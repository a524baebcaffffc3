"""OUT/benchmark.json: the rules that all cells of a folder share, so that no table mixes two kinds of result.

The first call writes them. A later one may ask for more of a kind, and the file grows: adaptors, values of a grid,
seeds, datasets. It may ask for some of the datasets and adaptors. Whatever else differs is refused.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.networks.options import parse_options
from coldtap.adaptors.training.grid import trial_options
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.errors import ModelError, RunError
from coldtap.stores.format.canonical import canonical_json, parse_json
from coldtap.stores.storage.atomic import write_file
from coldtap.workflows.benchmark.contenders import Contender

if TYPE_CHECKING:
    from coldtap.workflows.benchmark.run import Benchmark

RULES_FILE = "benchmark.json"
ADAPTORS = "adaptors"
ABSENT = "(absent)"
# Of the machine, not of the result; and what the stores themselves know.
NOT_RULES = ("device", "gather")


def settled_rules(benchmark: "Benchmark") -> bytes:
    """Returns the content of `benchmark.json` for a benchmark, grown from the one in its folder; nothing is written.

    Raises:
        RunError: The folder holds results of other rules, naming each that differs; or its file is damaged.
        ModelError: The checkpoint cannot be read.
    """
    path = benchmark.out / RULES_FILE
    asked = _rules_of(benchmark)
    held = _read(path)
    if held is not None:
        if different := list(_differences("", held, asked)):
            raise RunError(
                f"{benchmark.out} holds a benchmark of other rules: {'; '.join(different)}. Choose another `out`"
            )
        asked[ADAPTORS] = {**held[ADAPTORS], **asked[ADAPTORS]}
        asked["datasets"] = sorted({*held["datasets"], *asked["datasets"]})
    return canonical_json(asked) + b"\n"


def write_rules(benchmark: "Benchmark", rules: bytes) -> None:
    """Writes what `settled_rules` gave.

    Raises:
        MachineError: The disk is full, read-only or refuses.
    """
    write_file(benchmark.out / RULES_FILE, [rules])


def _rules_of(benchmark: "Benchmark") -> dict[str, Any]:
    rules = benchmark.rules
    caching = {name: value for name, value in benchmark.caching.items() if name not in NOT_RULES}
    if (checkpoint := caching.get("checkpoint")) is not None:
        caching["checkpoint"] = _sha256(Path(checkpoint))
    return {
        "protocol": rules.protocol,
        "seeds": rules.seeds,
        # A benchmark's stores are its own and have no compensation; a folder of before there were any goes on.
        "training": {name: value for name, value in asdict(rules.training).items() if name != "compensation"},
        "caching": {name: value for name, value in caching.items() if value not in (None, False)},
        ADAPTORS: {each.adaptor: _settings(each, rules.training) for each in benchmark.contenders},
        "datasets": sorted(benchmark.datasets),
    }


def _settings(contender: Contender, training: TrainingOptions) -> dict[str, Any]:
    """The options of all trials, the defaults too, and the values of the grid by name."""
    kind = adaptor_kind(contender.adaptor)
    options = asdict(parse_options(kind.options, contender.options, adaptor=contender.adaptor))
    trials = trial_options(
        contender.adaptor, kind.options, contender.trials, training=training, options=contender.options
    )
    grid = {name: sorted({trial.varied[name] for trial in trials}, key=repr) for name in trials[0].varied}
    return {"options": {name: value for name, value in options.items() if name not in grid}, "grid": grid}


def _sha256(checkpoint: Path) -> str:
    try:
        with checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"`checkpoint={str(checkpoint)!r}`: cannot be read: {error.strerror}") from error


def _read(path: Path) -> dict[str, Any] | None:
    try:
        held = parse_json(path.read_bytes())
        if isinstance(held[ADAPTORS], dict) and isinstance(held["datasets"], list):
            return dict(held)
        raise TypeError("it has other parts")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} cannot be read ({error}): choose another `out`, or delete the folder") from error


def _differences(path: str, held: Any, asked: Any) -> Iterator[str]:
    """Each rule that differs and is not merely more than there was, as `name: old → new`."""
    if path == "datasets":
        return
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        # Of the adaptors those in both: others are new, or were not asked for this time.
        names = set(held) & set(asked) if path == ADAPTORS else set(held) | set(asked)
        for name in sorted(names):
            yield from _differences(f"{path}.{name}".lstrip("."), held.get(name, ABSENT), asked.get(name, ABSENT))
    elif isinstance(held, list) and isinstance(asked, list):
        if any(value not in asked for value in held):
            yield f"{path}: {_shown(held)} → {_shown(asked)}"
    elif path == "seeds":
        if held > asked:
            yield f"{path}: {held} → {asked}"
    elif held != asked:
        yield f"{path}: {_shown(held)} → {_shown(asked)}"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
