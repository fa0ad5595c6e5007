"""`fedhead status`: the state of a run on a network, and whether a process serves."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output
from fedhead.wording import percent, score_words, size

MOST_ROUNDS = 10
MOST_SITES = 40
_FAILED = ("failed", "interrupted", "dead")


@app.command(epilog="Example: [bold]fedhead status runs/xray[/bold]")
@in_sentences
def status(
    run_dir: Annotated[Path | None, typer.Argument(help="Folder of a run.", show_default=False)] = None,
    health: Annotated[
        str | None,
        typer.Option(help="Address of a coordinator's or site's health service to ask.", metavar="HOST:PORT"),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the state of a run over a network; exit 1 if it failed, was stopped, or its process is dead."""
    from fedhead.errors import UserError

    if (run_dir is None) == (health is None):
        raise UserError("Give either the folder of a run or --health HOST:PORT.")
    if health is not None:
        _health(health, as_json)
        return
    from fedhead.server.status import read_status

    assert run_dir is not None
    values = read_status(run_dir)
    if as_json:
        typer.echo(json.dumps(values))
    else:
        output().print(run_tables(values), highlight=False)
    if values["state"] in _FAILED:
        sys.exit(1)


def _health(address: str, as_json: bool) -> None:
    from fedhead.health import ask

    answer = ask(address)
    typer.echo(json.dumps({"health": answer}) if as_json else answer)
    if answer != "SERVING":
        sys.exit(1)


def run_tables(values: Mapping[str, Any]) -> RenderableType:
    """Return tables of a run's state: its sites, then its rounds."""
    shown: list[RenderableType] = [_headline(values), _site_table(values)]
    if values["history"]:
        shown.append(_round_table(values))
    return Group(*shown)


def _headline(values: Mapping[str, Any]) -> Text:
    headline = Text(values["run"] or "run", style="bold")
    headline.append(f"  {values['state']}", style="bold red" if values["state"] in _FAILED else "bold")
    if values["state"] == "running" and values["step"]:
        step = f"round {values['round']} of {values['rounds']}" if values["step"] == "train" else values["step"]
        phase = values.get("phase", "")
        headline.append(f": {step}{f', secure sum: {phase}' if phase else ''}", style="not bold")
    headline.append(f"  at {values['address']}", style="dim")
    if values["message"]:
        headline.append(f"\n{values['message']}", style="not bold")
    return headline


def _site_table(values: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "connected", "weights"):
        table.add_column(column)
    table.add_column("rows", justify="right")
    for column in ("last seen", "state"):
        table.add_column(column)
    sites = values["sites"]
    for name, site in list(sites.items())[:MOST_SITES]:
        weights = site.get("weights", 0.0)
        state = site["standing"] + (f": {site['reason']}" if site.get("reason") else "")
        if extracted := site.get("extracted"):
            done, rows = extracted
            state += f", features of {done:,} of {rows:,} rows ({percent(done / rows if rows else 1)})"
        table.add_row(
            Text(name),
            "yes" if site["connected"] else Text("no", style="red" if site["seen"] else "dim"),
            "" if not site["standing"] else "installed" if weights >= 1 else percent(weights),
            "" if site["rows"] is None else str(site["rows"]),
            _ago(time.time() - site["seen"]) if site["seen"] else "",
            Text(state or ("" if site["seen"] else "never came")),
        )
    if len(sites) > MOST_SITES:
        table.caption = f"and {len(sites) - MOST_SITES} more"
    return table


def _round_table(values: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("round", "sites", "loss", "score", "down", "up", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("left out")
    for line in values["history"][-MOST_ROUNDS:]:
        score = line["score"]
        if score is None and line["number"] == values.get("kept_round"):
            # Of some tasks the score is known from the evaluation at the end only.
            score = values.get("score")
        table.add_row(
            str(line["number"]),
            str(line["sites"] or ""),
            "" if line["loss"] is None else f"{line['loss']:.4f}",
            score_words(score, str(values.get("score_name", "accuracy"))),
            size(line["bytes_down"]),
            size(line["bytes_up"]),
            f"{line['seconds']:.2f}",
            Text(", ".join(line["dropped"])),
        )
    return table


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 5400 else f"{seconds / 3600:.0f} h ago"


class LiveTables:
    """A renderable for `rich.live.Live` that shows the latest state of a run."""

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        self._snapshot = snapshot

    def __rich__(self) -> RenderableType:
        return run_tables(self._snapshot())
