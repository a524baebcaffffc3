"""An adaptor's own options: a frozen dataclass each, parsed from `--set key=value` in one way.

A dataclass field is an option: its annotation (`int`, `float`, `bool`, `str` or a `Literal`) says how the text is
read, its default is the option's default, and `__post_init__` checks the range.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAliasType, get_args, get_origin, get_type_hints

from coldtap.errors import OptionError

TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_options[OptionsT](options_type: type[OptionsT], settings: Mapping[str, object], *, adaptor: str) -> OptionsT:
    """Build an adaptor's options from settings such as `{"rank": "4"}`.

    Values may be text, as the command line has them, or Python values, as the API and `run.json` have them; both
    take the same path, so that both give the same errors.

    Args:
        options_type: The dataclass of the adaptor's options.
        settings: Option name to value.
        adaptor: The adaptor's name, for the messages.

    Raises:
        OptionError: Unknown option, or a value that the option cannot take.
    """
    defaults = option_defaults(options_type)
    hints = get_type_hints(options_type)
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in defaults:
            known = ", ".join(f"{key}={default}" for key, default in defaults.items())
            raise OptionError(f"adaptor {adaptor} has no option {name!r}; it knows {known}")
        hint = hints[name]
        # `type X = …` is an object of its own: look at what it names.
        hint = hint.__value__ if isinstance(hint, TypeAliasType) else hint
        values[name] = _parse_value(name, str(value).strip(), hint)
    return options_type(**values)


def option_defaults(options_type: type[object]) -> dict[str, object]:
    """Return the options of an adaptor with their defaults, in the order of definition."""
    return {field.name: field.default for field in dataclasses.fields(options_type)}  # type: ignore[arg-type]


def _parse_value(name: str, text: str, hint: Any) -> object:
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise OptionError(f"{name}={text}: it must be one of {', '.join(get_args(hint))}")
        return text
    if hint is bool:
        if text.lower() not in TRUTHS:
            raise OptionError(f"{name}={text}: it must be true or false")
        return TRUTHS[text.lower()]
    try:
        return hint(text)
    except ValueError as error:
        kind = {int: "a whole number", float: "a number"}.get(hint, hint.__name__)
        raise OptionError(f"{name}={text}: it must be {kind}") from error


def require_at_least(minimum: int, **options: int) -> None:
    """Check whole numbers from below.

    Raises:
        OptionError: An option is smaller than `minimum`.
    """
    for name, value in options.items():
        if value < minimum:
            raise OptionError(f"{name}={value}: it must be {minimum} or more")


def require_probability(**options: float) -> None:
    """Check probabilities of dropping something: 0 included, 1 (drop everything) not.

    Raises:
        OptionError: An option lies outside [0, 1).
    """
    for name, value in options.items():
        if not 0 <= value < 1:
            raise OptionError(f"{name}={value}: it must be at least 0 and below 1")


def require_positive(**options: float) -> None:
    """Check numbers that must be finite and above 0.

    Raises:
        OptionError: An option is zero, negative, infinite or NaN.
    """
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise OptionError(f"{name}={value}: it must be above 0 and finite")
