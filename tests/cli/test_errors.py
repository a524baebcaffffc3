"""Errors of the library name its parameters; the command line, and it alone, speaks of flags."""

import ast
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer

from coldtap.cli.errors import OTHERWISE_CALLED, flags_by_parameter, flags_of, in_flags
from coldtap.cli.main import app, guarded
from tests.test_import_direction import PACKAGE

COMMANDS = typer.main.get_command(app).commands
FLAG = re.compile(r"(?:^|[^-\w])--[a-z]")
# It writes a command line, for the user to copy.
EXEMPT = PACKAGE / "adaptors" / "report" / "rerun.py"


def flags(command):
    return flags_by_parameter(COMMANDS[command], COMMANDS.values())


def said(text, command="cache-features"):
    with flags_of(lambda: flags(command)):
        return in_flags(text)


@pytest.mark.parametrize(
    ("command", "text", "shown"),
    [
        ("cache-features", "`tier='int9'`: choose one of", "--tier int9: choose one of"),
        ("cache-features", "give `snr` or `max_error`", "give --snr or --max-error"),
        ("cache-features", "`snr=30`, at most `max_rejected=0.01`", "--snr 30, at most --max-rejected 0.01"),
        ("cache-features", "leave out `random_weights=True`", "leave out --random-weights"),
        ("cache-features", "`views=-1`: give 0 or more", "--views -1: give 0 or more"),
        ("quantize", "`sites` is of `compensate='cwac'`", "--site is of --compensate cwac"),
        ("quantize", "`overrides='blocks.*=…'`: no layer", "--override blocks.*=…: no layer"),
        ("benchmark", "`options='rank'`: say whose", "--set rank: say whose"),
        ("train-adaptor", "cache again with `gather='layers'`", "cache again with --gather layers"),
        ("train-adaptor", "with `gather='layers'` and `taps='all'`", "with --gather layers and --taps all"),
        ("train-adaptor", "choose with `settings['tap']=N`, or", "choose with --set tap=N, or"),
        ("train-adaptor", "`settings['bias']=True`", "--set bias=True"),
        ("train-adaptor", "`grid['lr']`: give at least one value", "--grid lr: give at least one value"),
        ("train-adaptor", """`grid["it's"]`: no such setting""", "--grid it's: no such setting"),
        ("report", "`images` or `out`", "--images or --out"),
    ],
)
def test_a_parameter_is_shown_as_the_flag_of_the_command(command, text, shown):
    assert said(text, command) == shown


@pytest.mark.parametrize("value", ["it's", 'say "a"', "a`b", "back\\slash", "new\nline", "ä ö", "a 'b' \"c\""])
def test_any_value_is_shown_as_it_was_typed(value):
    assert said(f"`out={value!r}` is a folder", "quantize") == f"--out {value} is a folder"


@pytest.mark.parametrize(
    "text",
    ["run `coldtap quantize` again", "MIST needs `sum`", "`if __name__ == '__main__':`", "`dmesg` tells", "a ` alone"],
)
def test_what_is_no_parameter_stays_as_it_is(text):
    assert said(text) == text


def test_outside_of_a_command_texts_stay_as_they_are():
    assert in_flags("`tier='int9'`: choose one of") == "`tier='int9'`: choose one of"


def test_the_flag_is_that_of_the_command_that_runs():
    assert flags("train-adaptor")["settings"] == "--set"
    for name, command in COMMANDS.items():
        own = {parameter.name: parameter.opts[0] for parameter in command.params if parameter.name != parameter.opts[0]}
        assert {flag: flags(name)[flag] for flag in own} == own
    assert set(OTHERWISE_CALLED) <= set(flags("benchmark"))


def texts(tree):
    """Return line and value of each string, docstrings excepted."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def flags_in(path):
    return [f"{path}:{line}: {text}" for line, text in texts(ast.parse(path.read_text())) if FLAG.search(text)]


def library():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "cli"]


def test_texts_of_the_library_speak_of_no_flags():
    assert [found for path in library() if path != EXEMPT for found in flags_in(path)] == []


def test_what_is_exempt_has_flags():
    assert flags_in(EXEMPT) != []


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 60),
        lambda: np.empty(1 << 50),
        lambda: pa.allocate_buffer(1 << 60),
        lambda: bytearray(1 << 60),
    ],
)
def test_a_refused_allocation_is_a_line_and_an_exit_code(capsys, allocate):
    with pytest.raises(SystemExit) as ended:
        guarded(allocate)()
    assert ended.value.code == 7
    said = capsys.readouterr().err
    assert said.startswith("error: not enough memory (")
    assert said.endswith("): free some, or ask for less at once\n")
    assert said.count("\n") == 1


def test_another_runtime_error_is_no_users_mistake():
    def fails():
        raise RuntimeError("a shape")

    with pytest.raises(RuntimeError, match="a shape"):
        guarded(fails)()
