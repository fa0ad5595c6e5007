"""`fedhead backbones`: list the backbones, describe one, and write its weights to a file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from fedhead.cli import options
from fedhead.cli.application import app, errors, in_sentences, output
from fedhead.errors import UserError
from fedhead.wording import size

if TYPE_CHECKING:
    from collections.abc import Callable

    import click

    from fedhead.backbones.catalogue import Description, Entry
    from fedhead.backbones.split import Block


class _ListsByDefault(TyperGroup):
    """A group that treats an unknown command as the pattern of `list`."""

    def parse_args(self, ctx: "click.Context", args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["list", *args])


backbones = typer.Typer(
    cls=_ListsByDefault,
    help="List and describe backbones, and fetch their weights. \\[PATTERN] is short for list \\[PATTERN].",
    epilog="Example: [bold]fedhead backbones 'timm:*xception*'[/bold]",
    rich_markup_mode="rich",
)
app.add_typer(backbones, name="backbones")

Spec = Annotated[str, typer.Argument(help="Backbone as source:name, for example torchvision:resnet18.", metavar="SPEC")]
Layer = Annotated[
    str, typer.Option(help="Layer: 'penultimate' or a name; LAYER:POOLING for a pooling other than the mean.")
]


@backbones.command("list", epilog="Example: [bold]fedhead backbones 'torchvision:*res*'[/bold]")
@in_sentences
def list_(
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a name, or a whole spec with wildcards; by default lists the sources.")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the backbones whose name matches a pattern."""
    if pattern is None:
        _list_sources(as_json)
        return
    from fedhead.backbones.catalogue import search

    found = list(search(pattern))
    if not found:
        raise UserError(f"No backbone's name fits {pattern!r}. 'fedhead backbones' lists what can be searched.")
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in found], default=str))
    else:
        _print_entries(found, output())


@backbones.command(epilog="Example: [bold]fedhead backbones show torchvision:resnet18 --layers[/bold]")
@in_sentences
def show(
    spec: Spec,
    layer: Layer = "penultimate",
    layers: Annotated[bool, typer.Option("--layers", help="List the layers too, and the blocks for --tune.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Describe a backbone: features, parameters, size, input, licence, and where its weights are."""
    from fedhead.backbones.catalogue import blocks, describe, layers_of
    from fedhead.backbones.weights import installed_weights

    with errors.status(f"Building {spec}"):
        described = describe(spec, layer, installed_weights(spec))
        names = list(layers_of(spec)) if layers else []
        cut, reason = _or_reason(lambda: blocks(spec, layer)) if layers else ([], "")
    if as_json:
        more = {"layers": names, "blocks": [asdict(block) for block in cut]} if layers else {}
        typer.echo(json.dumps({**asdict(described), **more}, default=str))
        return
    _print_description(described, names, output())
    if cut:
        _print_blocks(cut, output())
    elif reason:
        output().print(reason, soft_wrap=True, highlight=False)


@backbones.command(
    epilog="Example: [bold]fedhead backbones fetch torchvision:resnet18 --out resnet18.safetensors[/bold]"
)
@in_sentences
def fetch(
    spec: Spec,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; it must not exist.")],
    layer: Layer = "penultimate",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Save a backbone's weights to a file, for --weights FILE on a machine without network."""
    from fedhead.backbones import load_backbone

    if out.exists():
        raise UserError(f"{out} exists. Name a file that does not, with --out.")
    with errors.status(f"Fetching {spec}"):
        backbone = load_backbone(spec, layer=layer)
        backbone.save(out)
    written = {"file": str(out), "bytes": out.stat().st_size, "weights_digest": backbone.weights_digest}
    if as_json:
        typer.echo(json.dumps(written))
        return
    flags = f"--backbone {spec} --weights {out}{'' if layer == 'penultimate' else f' --layer {layer}'}"
    output().print(
        f"{out} holds the weights of {spec}, {size(out.stat().st_size)}. Use them with {flags}.",
        soft_wrap=True,
        highlight=False,
    )


def _list_sources(as_json: bool) -> None:
    from fedhead.backbones import backbone_sources
    from fedhead.backbones.catalogue import catalogues

    counts: dict[str, int | None] = {}
    hints = {"hf": "hf:NAME", "python": "python:MODULE:FUNCTION", "vectors": "vectors:FILE"}
    notes = []
    for source in backbone_sources:
        counts[source] = None
        try:
            if source in list(catalogues):
                counts[source] = len(catalogues[source].names())
                hints[source] = f"fedhead backbones '{source}:*'"
        except UserError as error:
            notes.append(str(error))
    if as_json:
        typer.echo(json.dumps([{"source": source, "backbones": count} for source, count in counts.items()]))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("source", no_wrap=True)
    table.add_column("listed", justify="right", no_wrap=True)
    table.add_column("search with, or name as", overflow="fold")
    for source, count in counts.items():
        table.add_row(source, "-" if count is None else str(count), hints.get(source, f"{source}:NAME"))
    console = output()
    console.print(table, highlight=False)
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)


def _print_entries(found: "list[Entry]", console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("backbone", no_wrap=True)
    table.add_column("input", no_wrap=True)
    counted = any(entry.parameters is not None for entry in found)
    if counted:
        table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("licence", overflow="fold")
    table.add_column("weights", no_wrap=True)
    for entry in found:
        millions = "" if entry.parameters is None else f"{entry.parameters / 1e6:.1f} M"
        here = "here" if entry.weights else "to fetch" if entry.origin else "none"
        table.add_row(entry.spec, entry.input, *([millions] if counted else []), entry.licence or "", here)
    console.print(table, highlight=False)


def _or_reason(find: "Callable[[], list[Block]]") -> "tuple[list[Block], str]":
    try:
        return find(), ""
    except UserError as error:
        return [], str(error)


def _print_blocks(cut: "list[Block]", console: Console) -> None:
    """Print a table of the blocks, with the size of the stored activations before each."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("--tune", no_wrap=True)
    table.add_column("block", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("stored of a row", justify="right", no_wrap=True)
    for number, block in enumerate(cut):
        shape = " x ".join("tokens" if length is None else f"{length:,}" for length in block.boundary)
        table.add_row(f"last:{len(cut) - number}", block.name, f"{block.parameters:,}", shape)
    console.print(table, highlight=False)


def _print_description(described: "Description", layers: list[str], console: Console) -> None:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    lines.add_row("Backbone", described.spec)
    lines.add_row("Takes", f"{described.kind}s{f' of {described.input}' if described.input else ''}")
    lines.add_row("Features", f"{described.num_features}, of layer {described.layer}")
    lines.add_row("Parameters", f"{described.num_parameters:,} ({size(described.num_bytes)})")
    lines.add_row("Licence", described.licence or "not known")
    if described.weights:
        lines.add_row("Weights", "here: " + "\n".join(map(str, described.weights)))
    elif described.origin:
        lines.add_row("Weights", f"not here; to fetch from {described.origin}")
    else:
        lines.add_row("Weights", "none but those that it is built with")
    if layers:
        lines.add_row("Layers", "\n".join(layers))
    console.print(lines, highlight=False)
