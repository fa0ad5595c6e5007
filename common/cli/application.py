"""The command line's frame: the application itself, failures told in sentences, progress and output."""

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedhead.errors import FedheadError

INTERRUPTED = 130

app = typer.Typer(
    help="Federated transfer learning on Flower: ship the backbone once, share only the heads.",
    epilog="Example: [bold]fedhead simulate[/bold] runs ten sites on bundled data, offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
errors = Console(stderr=True, emoji=False)


def _version(asked: bool) -> None:
    if asked:
        from fedhead import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def fedhead(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Federated transfer learning on Flower: ship the backbone once, share only the heads."""


def in_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Turn failures into one sentence on stderr and an exit status, unless `--debug` asks for the traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> None:
        logging.basicConfig(
            level=logging.WARNING,
            format="%(message)s",
            handlers=[RichHandler(console=errors, show_time=False, show_path=False, markup=False)],
        )
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            errors.print(
                "[bold]Interrupted.[/bold] Features extracted so far are kept; start again to go on from them."
            )
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read the output has read enough; what is left to flush must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except FedheadError as error:
            if options["debug"]:
                traceback.print_exc()
            errors.print("[bold red]Error:[/bold red]", end=" ")
            errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(error.exit_status) from None
        except Exception as error:
            if options["debug"]:
                raise
            errors.print("[bold red]Error:[/bold red]", end=" ")
            said = str(error).strip().splitlines()
            errors.print(
                f"An unexpected {type(error).__name__}{f': {said[0]}' if said else ''}. Run again with --debug for the "
                "traceback, and please report it.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(1) from None

    return wrapped


def output() -> Console:
    """Return the terminal, printing names of sites, classes and folders as they are, not read as markup."""
    return Console(markup=False, emoji=False)


def progress_bars() -> Progress:
    """Return bars that are drawn on stderr and leave nothing behind."""
    return Progress(
        TextColumn("{task.description:<9}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )
