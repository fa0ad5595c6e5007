"""MkDocs hooks: generate the reference of settings and commands, typeset formulas, and document this checkout."""

import re
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import click
import latex2mathml.converter
import mkdocs.plugins
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedhead.cli import app
from fedhead.client.settings import SiteSettings
from fedhead.config import RunConfig
from fedhead.server.network.limits import ConnectionLimits

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_INLINE = re.compile(r"\$([^$\n]+)\$")


@mkdocs.plugins.event_priority(100)  # Before mkdocstrings reads its configuration.
def on_config(config: Any) -> Any:
    """Give mkdocstrings a folder in which the checkout's packages are laid out as they are installed."""
    laid_out = Path(tempfile.mkdtemp(prefix="fedhead-docs-"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        shutil.copytree(ROOT / folder, laid_out / package.replace(".", "/"), dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(laid_out)]
    config.extra["laid_out"] = laid_out
    return config


def on_post_build(config: Any) -> None:
    """Remove that folder."""
    shutil.rmtree(config.extra["laid_out"], ignore_errors=True)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of `GENERATED`, as `{{ settings }}`, and typeset formulas."""
    for marker, generate in GENERATED.items():
        line = f"{{{{ {marker} }}}}"
        if line in markdown:
            markdown = markdown.replace(line, generate())
    return "".join(part if part.startswith("```") else _typeset(part) for part in _FENCE.split(markdown))


def _typeset(markdown: str) -> str:
    """Replace formulas by MathML, which browsers show without any script."""
    markdown = _DISPLAYED.sub(lambda match: _mathml(match[1], "block"), markdown)
    return _INLINE.sub(lambda match: _mathml(match[1], "inline"), markdown)


def _mathml(formula: str, display: str) -> str:
    return latex2mathml.converter.convert(" ".join(formula.split()), display=display)


def settings_of(model: type[BaseModel], prefix: str = "", flags: dict[str, click.Option] | None = None) -> str:
    """Return a table of a model's fields, followed by one for each table inside it."""
    lines: list[str] = []
    below: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below.append(settings_of(field.annotation, f"{prefix}{name}.", flags))
            continue
        option = (flags or {}).get(name)
        meaning = field.description or (option.help if option else "") or ""
        flag = f"`{option.opts[-1]}`" if option else ""
        default = "" if field.default is PydanticUndefined else f"`{field.get_default()!r}`"
        lines.append(f"| `{name}` | {flag} | {default} | {_cell(meaning)} |")
    title = f"`[{prefix.rstrip('.')}]`" if prefix else "Top level"
    head = f"### {title}\n\n{_first_paragraph(model)}\n\n| setting | flag | default | meaning |\n|---|---|---|---|\n"
    return "\n\n".join([head + "\n".join(lines), *below])


def run_settings() -> str:
    """Return the settings of a run, with their flags."""
    return settings_of(RunConfig, flags=_options("simulate"))


def site_settings() -> str:
    """Return the settings of a site, with their flags."""
    return settings_of(SiteSettings, flags=_options("client"))


def connection_limits() -> str:
    """Return the limits on connections to a coordinator."""
    return settings_of(ConnectionLimits, "connections.")


def commands() -> str:
    """Return every command with its arguments and options, from its own help."""
    context = click.Context(typer.main.get_command(app), info_name="fedhead")
    return "\n\n".join(_command(name, command, context) for name, command in sorted(_all(context.command, context)))


def _options(command: str) -> dict[str, click.Option]:
    group = typer.main.get_command(app)
    context = click.Context(group, info_name="fedhead")
    assert isinstance(group, click.Group)
    found = group.get_command(context, command)
    assert found is not None
    parameters = found.get_params(click.Context(found))
    return {option.name or "": option for option in parameters if isinstance(option, click.Option)}


def _all(group: click.Command, context: click.Context, prefix: str = "") -> list[tuple[str, click.Command]]:
    found = []
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += _all(command, context, f"{prefix}{name} ")
        else:
            found.append((f"{prefix}{name}", command))
    return found


def _command(name: str, command: click.Command, parent: click.Context) -> str:
    context = click.Context(command, info_name=f"fedhead {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    text = [f"## fedhead {name}", f"```text\nfedhead {name} {usage}\n```", command.help or ""]
    rows = []
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and not parameter.hidden and parameter.name != "help":
            names = ", ".join(f"`{one}`" for one in [*parameter.opts, *parameter.secondary_opts])
            value = "" if parameter.is_flag else f"`{parameter.make_metavar(context)}`"
            rows.append(f"| {names} | {_cell(value)} | {_cell(parameter.help or '')} |")
    if rows:
        text.append("| option | value | meaning |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(part for part in text if part)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


GENERATED = {
    "settings": run_settings,
    "site settings": site_settings,
    "connection limits": connection_limits,
    "commands": commands,
}
