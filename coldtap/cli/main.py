"""`coldtap`, `cache-features` and `train-adaptor`: the commands, and how errors become exit codes.

Exit codes: 0 done · 1 `verify` found problems · 2 an option · 3 images or labels · 4 backbone, checkpoint or tap ·
5 the store does not fit the request · 6 the store is incomplete or damaged · 7 disk, permission or device ·
8 too many images rejected · 9 a run folder · 130 Ctrl-C · 143 SIGTERM.
"""

import sys

import click
import typer

from coldtap.cli.cache import cache_features
from coldtap.cli.inspect import inspect
from coldtap.cli.predict import predict
from coldtap.cli.train import train_adaptor
from coldtap.cli.verify import verify
from coldtap.stores.errors import ColdtapError

HELP = "Run a frozen vision backbone once, keep its features, train small adaptors from them alone."


def _app(help_text: str | None = None) -> typer.Typer:
    return typer.Typer(
        help=help_text,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


app = _app(HELP)
app.command("cache-features")(cache_features)
app.command("train-adaptor")(train_adaptor)
app.command("predict")(predict)
app.command("inspect")(inspect)
app.command("verify")(verify)


@app.callback()
def _version(
    version: bool = typer.Option(False, "--version", is_eager=True, help="Print the version and exit."),
) -> None:
    if version:
        from coldtap import __version__

        print(__version__)
        raise typer.Exit


def run(command: typer.Typer) -> None:
    """Run a command; a user's mistake ends in one line and its exit code, never in a traceback."""
    try:
        code = command(standalone_mode=False)
    except ColdtapError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("stopped; what was finished is kept: run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code or 0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> None:
    """The `coldtap` script."""
    run(app)


def cache_features_main() -> None:
    """The `cache-features` script."""
    single = _app()
    single.command("cache-features")(cache_features)
    run(single)


def train_adaptor_main() -> None:
    """The `train-adaptor` script."""
    single = _app()
    single.command("train-adaptor")(train_adaptor)
    run(single)


if __name__ == "__main__":
    main()
