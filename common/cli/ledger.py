"""`fedhead ledger`: what left a site."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output
from fedhead.errors import UserError
from fedhead.wording import size


@app.command(epilog="Example: [bold]fedhead ledger hospital-a[/bold]")
@in_sentences
def ledger(
    site: Annotated[str, typer.Argument(help="The site's name, or the path of its ledger.")],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what left a site: when, for which run, from how many rows, and the digest of what left."""
    from fedhead.client import guard

    path = Path(site) if site.endswith(".jsonl") else guard.ledger_path(site)
    if not path.is_file():
        raise UserError(f"There is no ledger {path}: nothing was released by a site of this name on this machine.")
    entries = guard.read_ledger(path)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries]))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("when", "run", "action", "rows", "classes", "size", "digest"):
        table.add_column(column, justify="right" if column in ("rows", "classes", "size") else "left")
    for entry in entries:
        when = entry.when.strftime("%Y-%m-%d %H:%M")
        classes = str(len(entry.classes))
        table.add_row(when, entry.run, entry.action, str(entry.rows), classes, size(entry.bytes), entry.digest[:8])
    output().print(table)
