"""`coldtap`, `cache-features` and `train-adaptor`: the commands, and how errors become exit codes.

Exit codes: 0 done · 1 `verify` found problems · 2 an option · 3 images or labels · 4 backbone, checkpoint or tap ·
5 the store does not fit the request · 6 the store is incomplete or damaged · 7 disk, permission, device, or an extra
that is not installed · 8 too many images rejected · 9 a run folder · 130 Ctrl-C · 143 SIGTERM.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from coldtap.cli.benchmark import benchmark
from coldtap.cli.cache import cache_features
from coldtap.cli.compensate import compensate
from coldtap.cli.convert import convert
from coldtap.cli.diagnose import diagnose
from coldtap.cli.errors import flags_by_parameter, flags_of, in_flags
from coldtap.cli.evaluate import evaluate
from coldtap.cli.export import export
from coldtap.cli.export_backbone import export_backbone
from coldtap.cli.inspect import inspect
from coldtap.cli.output import say
from coldtap.cli.predict import predict
from coldtap.cli.quantize import quantize
from coldtap.cli.report import report
from coldtap.cli.train import train_adaptor
from coldtap.cli.verify import verify
from coldtap.errors import ColdtapError, MachineError
from coldtap.extras import require_extras_of
from coldtap.stores.writing.stopping import STOPPED

HELP = "Run a frozen vision backbone once, keep its features, train small adaptors from them alone."


def guarded[**P](command: Callable[P, None]) -> Callable[P, None]:
    """Let the user's mistakes in a command end in one line and an exit code, never in a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ColdtapError as error:
            say(f"error: {_one_line(error)}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            say(STOPPED, err=True)
            sys.exit(130)
        except BrokenPipeError:  # `| head` has seen enough; what is left must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:  # the machine refuses where nobody had more to say about it
            say(f"error: {_one_line(error)}", err=True)
            sys.exit(MachineError.exit_code)
        except (MemoryError, RuntimeError) as error:
            if not _is_of_an_allocator(error):
                raise
            reason = _one_line(error).partition(" Exception raised from")[0] or "an allocation was refused"
            say(f"error: not enough memory ({reason}): free some, or ask for less at once", err=True)
            sys.exit(MachineError.exit_code)

    return run


def _is_of_an_allocator(error: Exception) -> bool:
    """Whether Python, numpy, Arrow or torch, which has no class of its own for it on the CPU, found no memory."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def _named[**P](name: str, command: Callable[P, None]) -> Callable[P, None]:
    """Let a command ask for its extras first, and its errors speak of its flags."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with flags_of(functools.partial(_flags_of, name)):
            try:
                require_extras_of(name)
                command(*args, **kwargs)
            except ColdtapError as error:
                error.args = (in_flags(str(error)),)
                raise

    return run


@functools.cache
def _flags_of(name: str) -> dict[str, str]:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined] # `app` is a group
    return flags_by_parameter(commands[name], commands.values())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _app(help_text: str | None = None) -> typer.Typer:
    return typer.Typer(
        help=help_text,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def _add(app: typer.Typer, name: str, command: Callable[..., None]) -> None:
    app.command(name)(guarded(_named(name, command)))


app = _app(HELP)
_add(app, "cache-features", cache_features)
_add(app, "train-adaptor", train_adaptor)
_add(app, "quantize", quantize)
_add(app, "diagnose", diagnose)
_add(app, "benchmark", benchmark)
_add(app, "evaluate", evaluate)
_add(app, "predict", predict)
_add(app, "compensate", compensate)
_add(app, "convert", convert)
_add(app, "export", export)
_add(app, "export-backbone", export_backbone)
_add(app, "report", report)
_add(app, "inspect", inspect)
_add(app, "verify", verify)


def _print_version(asked: bool) -> None:
    if asked:
        from coldtap.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """Run the `coldtap` script."""
    app()


def cache_features_main() -> None:
    """Run the `cache-features` script."""
    single = _app()
    _add(single, "cache-features", cache_features)
    single()


def train_adaptor_main() -> None:
    """Run the `train-adaptor` script."""
    single = _app()
    _add(single, "train-adaptor", train_adaptor)
    single()


if __name__ == "__main__":
    main()
