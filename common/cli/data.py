"""`fedhead data`: the content of a data set and its defects, before anything runs on it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_bars
from fedhead.wording import counted, percent

if TYPE_CHECKING:
    from fedhead.data import Item, Samples, UnreadableSampleError
    from fedhead.data.summary import Summary

MOST_LINES = 25
AHEAD = {"audio": 8}
"""Number of items read ahead by kind; 64 of the others."""
EXAMPLES = 8


@app.command(epilog="Example: [bold]fedhead data 'csv:scans.csv?label=finding&group=patient' --html scans.html[/bold]")
@in_sentences
def data(
    spec: Annotated[str, typer.Argument(help="folder:PATH, csv:FILE or another data spec.", show_default=False)],
    by_site: Annotated[
        bool, typer.Option("--by-site", help="Take each row's site from the data, such as sub-folders.")
    ] = False,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Number of rows to read, evenly spaced; by default all.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="HTML file to write, with examples of each class.", rich_help_panel=options.OUTPUT),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Inspect a data set: classes, sizes, groups, duplicates, and unreadable rows with the reason."""
    from fedhead.data.annotated import drawn
    from fedhead.data.folder import look_up_sites
    from fedhead.data.page import example, page
    from fedhead.data.samples import look_up
    from fedhead.data.summary import Look, examples, rows_to_look_at
    from fedhead.features.extraction import read_ahead
    from fedhead.files import write_atomically

    samples = look_up_sites(spec) if by_site else look_up(spec)
    numbers = rows_to_look_at(len(samples), rows)
    wanted = examples(samples, numbers, EXAMPLES) if html else {}
    kept: dict[int, str] = {}
    chosen = {row for of_class in wanted.values() for row in of_class}
    look = Look(samples)
    with progress_bars() as progress:
        task = progress.add_task("Rows", total=len(numbers))
        items = read_ahead(lambda row: _read(samples, row), numbers.tolist(), ahead=AHEAD.get(samples.kind, 64))
        for row, item in zip(numbers.tolist(), items, strict=True):
            look.show(row, item)
            if row in chosen and not isinstance(item, Exception):
                kept[row] = example(drawn(samples, row, item))
            progress.advance(task)
    summary = look.summary()
    if html:
        shown = {
            samples.classes[label]: [(samples.name(row), kept[row]) for row in of_class if row in kept]
            for label, of_class in wanted.items()
        }
        write_atomically(html, page(summary, _facts(summary), shown))
    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
    else:
        _print(summary, output(), html)
    if summary.readable == 0:
        raise typer.Exit(1)


def _read(samples: "Samples", row: int) -> "Item | UnreadableSampleError":
    from fedhead.data import UnreadableSampleError

    try:
        return samples.read(row)
    except UnreadableSampleError as error:
        return error


def _print(summary: "Summary", console: Console, html: Path | None) -> None:
    console.print(summary.spec, style="bold", highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("class", overflow="fold")
    marks, things = _marks(summary)
    for column in (_items(summary), "share", *([things] if marks else [])):
        table.add_column(column, justify="right", no_wrap=True)
    listed = sorted(summary.classes.items(), key=lambda one: -one[1])
    shown = listed if len(listed) <= MOST_LINES else [*listed[: MOST_LINES - 5], *listed[-4:]]
    for position, (name, rows) in enumerate(shown):
        if len(shown) < len(listed) and position == MOST_LINES - 5:
            table.add_row(f"... {len(listed) - len(shown)} more")
        table.add_row(_visible(name), str(rows), percent(rows / summary.rows), *marks.get(name, []))
    if listed:
        console.print(table)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for name, value in _facts(summary):
        lines.add_row(name, value)
    for position, one in enumerate(summary.broken[:MOST_LINES]):
        lines.add_row("" if position else "Broken", one.reason)
    if len(summary.broken) > MOST_LINES:
        lines.add_row("", f"... and {len(summary.broken) - MOST_LINES} more; --json and --html list them all")
    for position, left in enumerate(summary.left_out):
        lines.add_row("" if position else "Left out", left)
    for position, caution in enumerate(summary.cautions()):
        lines.add_row("" if position else "Take care", caution)
    if html:
        lines.add_row("Page", str(html))
    console.print(lines, highlight=False)


def _items(summary: "Summary") -> str:
    """Return the unit that the table of classes counts."""
    if summary.annotated is None or not summary.classes:
        return "rows"
    return "words" if summary.kind == "text" else "images"


def _marks(summary: "Summary") -> tuple[dict[str, list[str]], str]:
    """Return the cell of each class in the table with the number of its boxes or pixels, and the column's title."""
    found = summary.annotated
    if found is None or not set(summary.classes) <= set(found.marks):
        return {}, ""
    total = max(sum(found.marks.values()), 1)
    pixels = found.things == "pixels"
    cells = {name: [percent(number / total) if pixels else f"{number:,}"] for name, number in found.marks.items()}
    return cells, found.things


def _visible(name: str) -> str:
    """Return a class name, in quotes where spaces around it would not be seen."""
    return name if name == name.strip() and name else repr(name)


def _facts(summary: "Summary") -> list[tuple[str, str]]:
    """Return facts about the data, other than its classes."""
    from fedhead.data.items import ITEMS

    looked = "" if summary.looked_at == summary.rows else f"; {summary.looked_at} of them were read"
    several = ", any number of them per row" if summary.multi_label else ""
    without = "with real targets" if summary.targets else "without labels"
    predicted = f"in {counted(len(summary.classes), 'class', 'classes')}{several}" if summary.classes else without
    rows = f"{summary.rows} {ITEMS[summary.kind]} {predicted}"
    found = summary.annotated
    if found is not None:
        rows = found.title(summary.rows, ITEMS[summary.kind], len(summary.classes))
    facts = [("Rows", f"{rows}{looked}"), *([] if found is None else found.facts())]
    for name, spread in () if found is not None else summary.targets.items():
        values = f"{spread.least:g} to {spread.greatest:g} (mean {spread.mean:g}, half up to {spread.median:g})"
        facts.append(("Target", f"{name}: {values}"))
    if summary.columns:
        more = f" and {len(summary.columns) - MOST_LINES} more" if len(summary.columns) > MOST_LINES else ""
        facts.append(("Numbers", f"{len(summary.columns)} columns: {', '.join(summary.columns[:MOST_LINES])}{more}"))
    if summary.multi_label and found is None:
        facts.append(("No class", counted(summary.without_class, "row")))
    if summary.width and summary.height:
        first, images = next(iter(summary.sizes.items()))
        alike = f"{first}, all" if len(summary.sizes) == 1 else ""
        sizes = f"{len(summary.sizes)} sizes, most often {first} ({images}); width {summary.width}, height "
        facts.append(("Sizes", alike or f"{sizes}{summary.height}"))
        facts.append(("Stored as", _counts(summary.modes)))
    if summary.characters and summary.words and found is None:
        facts.append(("Lengths", f"{summary.words} words, {summary.characters} characters"))
    if summary.seconds:
        facts.append(("Lengths", f"in seconds: {summary.seconds}"))
        facts.append(("Rates", _counts({f"{rate} Hz": rows for rate, rows in summary.rates.items()})))
    if summary.groups:
        facts.append(("Groups", f"{summary.groups}; the largest has {counted(summary.largest_group, 'row')}"))
    if summary.sites:
        facts.append(("Sites", _counts(summary.sites)))
    if summary.splits:
        facts.append(("Splits", _counts(summary.splits)))
    facts.append(("Duplicates", _repeated(summary.duplicates) if summary.duplicates else "none"))
    return facts


def _repeated(rows: int) -> str:
    return f"{counted(rows, 'row')} {'repeats' if rows == 1 else 'repeat'} another"


def _counts(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {rows}" for name, rows in list(counts.items())[:8])
    return shown if len(counts) <= 8 else f"{len(counts)}: {shown} and {len(counts) - 8} more"
