"""`fedhead ledger`: the releases of a site."""

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
    """List a site's releases: when, for which run and backbone, from which rows, and the payload's digest.

    Releases with the same digest of rows rest on the same rows. With --json, entries are complete. Of differentially
    private runs, the accounts show mu, and epsilon spent and left.
    """
    from fedhead.client.release.accounts import accounts_path, read_charges, statements
    from fedhead.client.release.ledger import ledger_path, read_ledger

    path = Path(site) if site.endswith(".jsonl") else ledger_path(site)
    if not path.is_file():
        raise UserError(f"There is no ledger {path}: nothing was released by a site of this name on this machine.")
    entries = read_ledger(path)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries]))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("when", "run", "action", "backbone", "rows", "classes", "row set", "size", "digest"):
        table.add_column(column, justify="right" if column in ("rows", "classes", "size") else "left")
    for entry in entries:
        when = entry.when.strftime("%Y-%m-%d %H:%M")
        rows, classes, row_set = str(entry.rows), str(len(entry.classes)), entry.row_set[:8]
        figures = (rows, classes, row_set, size(entry.bytes), entry.digest[:8])
        backbone = f"{entry.backbone}, {entry.features}" if entry.features else entry.backbone
        if entry.tuned:
            backbone = f"{backbone}, {entry.tuned_parameters:,} parameters of {entry.tuned}"
        table.add_row(when, entry.run, entry.action, backbone, *figures)
    output().print(table)
    if any(entry.tuned for entry in entries):
        output().print("Trained parameters of a backbone say more of rows than a head alone.")
    if accounts := statements(read_charges(accounts_path(path))):
        budget = Table(box=SIMPLE_HEAD, pad_edge=False, title="Privacy accounts", title_justify="left")
        for column in ("account", "releases", "mu", "epsilon spent", "epsilon left", "of epsilon", "delta"):
            budget.add_column(column, justify="left" if column == "account" else "right")
        for one in accounts:
            figures = (f"{one.mu:.3f}", f"{one.spent:.2f}", f"{one.left:.2f}", f"{one.epsilon:g}", f"{one.delta:g}")
            budget.add_row(one.name, str(one.releases), *figures)
        output().print(budget)
