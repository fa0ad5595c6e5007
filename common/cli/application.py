"""The command line's frame: the application, failures in sentences, progress and output."""

import codecs
import functools
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import click
import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment

from fedhead.errors import FedheadError
from fedhead.logs import log_failure
from fedhead.wording import without_controls

INTERRUPTED = 130

app = typer.Typer(
    help="Federated transfer learning on Flower: ship the backbone once, share only the heads.",
    epilog="Example: [bold]fedhead simulate[/bold] runs ten sites on bundled data, offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)


class _WithoutControls(RenderHook):
    """Shows control characters in texts as escapes; names of sites, classes and files may hold them."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(each) for each in renderables]


class _Shown:
    def __init__(self, what: ConsoleRenderable) -> None:
        self._what = what

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self._what, options):
            yield part if part.control else Segment(without_controls(part.text), part.style)


def _terminal(*, stderr: bool = False, markup: bool = True) -> Console:
    console = Console(stderr=stderr, markup=markup, emoji=False)
    console.push_render_hook(_WithoutControls())
    return console


errors = _terminal(stderr=True)
logger = logging.getLogger("fedhead")


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
        root = logging.getLogger()
        handlers = list(root.handlers)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[terminal_handler()])
        _print_any_name()
        try:
            command(*args, **options)
        except (click.exceptions.Exit, click.exceptions.Abort, click.ClickException):
            # The command line's own ways to end.
            raise
        except KeyboardInterrupt:
            errors.print(
                "[bold]Interrupted.[/bold] Features extracted so far are kept; start again to continue from them."
            )
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read the output has read enough; what is left to flush must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except FedheadError as error:
            if options["debug"]:
                traceback.print_exc()
            _say(str(error))
            raise typer.Exit(error.exit_status) from None
        except Exception as error:
            if options["debug"]:
                raise
            said = str(error).strip().rstrip(".").splitlines()
            _say(
                f"An unexpected {type(error).__name__}{f': {said[0]}' if said else ''}. Run again with --debug for the "
                "traceback, and please report it."
            )
            raise typer.Exit(1) from None
        finally:
            # A command that is called after this one in the same process configures logging for itself.
            root.handlers[:] = handlers

    return wrapped


def _say(failure: str) -> None:
    if not log_failure(logger, failure):
        errors.print("[bold red]Error:[/bold red]", end=" ")
        errors.print(failure, markup=False, highlight=False, soft_wrap=True)


def terminal_handler() -> RichHandler:
    """Return a log handler that writes to the terminal."""
    return RichHandler(console=errors, show_time=False, show_path=False, markup=False)


def _print_any_name() -> None:
    """Print names that are not UTF-8 as raw bytes, and other undecodable text as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ANY_NAME)


def _bytes_of_names(error: UnicodeError) -> tuple[bytes | str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = (
        bytes([ord(one) - 0xDC00]) if "\udc80" <= one <= "\udcff" else one.encode("ascii", "backslashreplace")
        for one in error.object[error.start : error.end]
    )
    return b"".join(parts), error.end


ANY_NAME = "fedhead.any_name"
codecs.register_error(ANY_NAME, _bytes_of_names)


def output() -> Console:
    """Return the terminal, printing names of sites, classes and folders as they are, not read as markup."""
    return _terminal(markup=False)


@contextmanager
def progress_of(what: str, *, visible: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Draw one bar while a block runs; gives a function to call with the number done and the total.

    Args:
        what: the name of the bar.
        visible: whether the bar appears before the first call.
    """
    with progress_bars() as bars:
        bar = bars.add_task(what, total=None, visible=visible)
        yield lambda done, total: bars.update(bar, completed=done, total=total, visible=True)


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
