"""`fedhead approvals`: what people at a site agreed to release."""

import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output


@app.command(epilog="Example: [bold]fedhead approvals hospital-a --revoke 2[/bold]")
@in_sentences
def approvals(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    revoke: Annotated[
        list[int] | None, typer.Option(help="Number of an approval to take back; repeatable.", metavar="NUMBER")
    ] = None,
    revoke_all: Annotated[bool, typer.Option("--revoke-all", help="Take all of them back.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List what was approved at a site under `fedhead client --approve`, or revoke it; a running client asks again."""
    from fedhead.client.release.approval import approvals_path, read_approvals
    from fedhead.client.release.approval import revoke as take_back

    path = approvals_path(site)
    agreed = read_approvals(path)
    if numbers := list(range(1, len(agreed) + 1)) if revoke_all else list(revoke or []):
        agreed = take_back(path, numbers)
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in agreed]))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("number", "when", "run", "action", "backbone", "digest"):
        table.add_column(column, justify="right" if column == "number" else "left")
    for number, one in zip(numbers or range(1, len(agreed) + 1), agreed, strict=True):
        when = one.when.strftime("%Y-%m-%d %H:%M")
        table.add_row(str(number), when, one.run, one.action, one.backbone, one.digest[:8])
    if numbers:
        output().print("Revoked:")
    output().print(table if agreed else "Nothing is approved.")
