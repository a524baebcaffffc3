"""The command that trains a run again, with every setting spelt out."""

import dataclasses
import shlex
from pathlib import Path

from coldtap.adaptors.runs.settings import RunSettings

NOT_FLAGS = ("adaptor", "options", "store_digest", "extractor_digest")
PROTOCOL = ("fit", "keep")  # set by a protocol; `train-adaptor` has no flags for them


def rerun_command(folder: Path, store: str, settings: RunSettings) -> str:
    """Return a command for a shell, a line a setting; the new run lies beside the first.

    A run of a protocol's second step, which learns from val too, is trained by a call of the Python function.
    """
    given = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_FLAGS}
    out = f"{folder}-again"
    if (settings.fit, settings.keep) != ("train", "best"):
        call = {"out": out, **given, "settings": dict(settings.options)}
        arguments = "".join(f",\n  {name}={value!r}" for name, value in call.items())
        code = f"from coldtap import train_adaptor\ntrain_adaptor({store!r}, {settings.adaptor!r}{arguments})"
        return f"python -c {shlex.quote(code)}"
    flags = {name: value for name, value in given.items() if name not in PROTOCOL and value is not None}
    lines = [
        f"train-adaptor {shlex.quote(store)}",
        f"--adaptor {shlex.quote(settings.adaptor)}",
        f"--out {shlex.quote(out)}",
        *(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in flags.items()),
        *(f"--set {shlex.quote(f'{name}={value}')}" for name, value in settings.options.items()),
    ]
    return " \\\n  ".join(lines)
