"""Texts of the library, which names its parameters in backticks, in the words of the command line.

`` `tier='int9'` `` becomes `--tier int9`, `` `max_error` `` becomes `--max-error`, and an entry of a mapping,
`` `settings['tap']=3` ``, becomes `--set tap=3`. Flags are those of the command that runs; what it does not have is
looked up in the others, since advice may be about another command.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Parameters of the library that are called otherwise on the command line.
OTHERWISE_CALLED = {
    "overrides": "override",
    "sites": "site",
    "options": "settings",
    "names": "sets",
}

TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
PARAMETER = re.compile(rf"""`([a-z_]+)(?:\[({TEXT})\])?(?:=({TEXT}|[^`'"\s]+))?`""")

_flags: ContextVar[Callable[[], Mapping[str, str]]] = ContextVar("_flags", default=dict)


@contextmanager
def flags_of(flags: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Let `in_flags` speak of these flags by parameter; they are asked for when the first text comes."""
    token = _flags.set(flags)
    try:
        yield
    finally:
        _flags.reset(token)


def flags_by_parameter(command: Any, others: Iterable[Any]) -> dict[str, str]:
    """Return the flag of every parameter of a Typer command, and of the others where it has none of that name."""
    flags: dict[str, str] = {}
    for one in (command, *others):
        options = [parameter for parameter in one.params if parameter.param_type_name == "option"]
        for option in options:
            flags.setdefault(option.name, option.opts[0])
    return flags | {name: flags[other] for name, other in OTHERWISE_CALLED.items() if other in flags}


def in_flags(text: str) -> str:
    """Return a text of the library with its parameters as flags; what is none stays as it is."""
    flags = _flags.get()() if "`" in text else {}

    def flag(found: re.Match[str]) -> str:
        name, key, value = found.groups()
        if name not in flags:
            return found[0]
        shown = "" if value is None or (value == "True" and not key) else f"={_as_typed(value)}"
        if key:
            return f"{flags[name]} {_as_typed(key)}{shown}"
        return f"{flags[name]} {shown[1:]}" if shown else flags[name]

    return PARAMETER.sub(flag, text)


def _as_typed(value: str) -> str:
    return str(ast.literal_eval(value)) if value[0] in "'\"" else value
