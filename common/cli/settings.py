"""Flags generated from the fields of `RunConfig`: type, default, choices and help are written there, once."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click
from typer.core import TyperCommand, TyperOption

from fedhead.cli.options import OUTPUT, PRIVACY, RUN, SIMULATION

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_PANELS = {"keep_sums": OUTPUT, "with_backbone": OUTPUT}
_TYPES: dict[Any, Any] = {int: click.INT, float: click.FLOAT, bool: click.BOOL}


@dataclass(frozen=True)
class _Chosen:
    """Settings that are flags of a command.

    Attributes:
        run: fields of `RunConfig`; None for all that are no tables, and those of its table `privacy`.
        simulation: fields of its table `simulation`; None for all.
    """

    run: Sequence[str] | None
    simulation: Sequence[str] | None

    def fields(self) -> list[tuple[str, str, "FieldInfo"]]:
        """Return panel, name and field of each setting."""
        from fedhead.config import PrivacyConfig, RunConfig, SimulationConfig, TuneConfig

        tables = {"strategy", "local", "tune", "privacy", "simulation"}
        run = [name for name in RunConfig.model_fields if name not in tables] if self.run is None else self.run
        simulation = SimulationConfig.model_fields if self.simulation is None else self.simulation
        found = [(_PANELS.get(name, RUN), name, RunConfig.model_fields[name]) for name in run]
        if self.run is None:
            found.append((RUN, "tune", TuneConfig.model_fields["layers"]))
            found.append((RUN, "objective", TuneConfig.model_fields["objective"]))
            found += [(PRIVACY, name, field) for name, field in PrivacyConfig.model_fields.items()]
        return [*found, *((SIMULATION, name, SimulationConfig.model_fields[name]) for name in simulation)]

    def options(self) -> list[click.Parameter]:
        """Return the flags."""
        options: list[click.Parameter] = []
        for panel, name, field in self.fields():
            options.append(_option(panel, name, field))
            if name == "task":
                options.append(
                    TyperOption(
                        param_decls=["multi_label", "--multi-label"],
                        type=click.BOOL,
                        default=None,
                        is_flag=True,
                        help="The same as --task multi-label.",
                        rich_help_panel=RUN,
                    )
                )
        return options

    def changes(self, values: dict[str, Any]) -> dict[str, Any]:
        """Take the flags' values out of a command's, and return those that were given as changes to a `RunConfig`."""
        changes: dict[str, Any] = {}
        tables: dict[str, dict[str, Any]] = {SIMULATION: {}, PRIVACY: {}}
        for panel, name, field in self.fields():
            value = values.pop(name)
            if value is not None and get_origin(field.annotation) is tuple:
                value = [one.strip() for one in value.split(",")]
            if value is not None:
                tables.get(panel, changes)[name] = value
        named = {"layers": changes.pop("tune", None), "objective": changes.pop("objective", None)}
        if tune := {name: value for name, value in named.items() if value is not None}:
            changes["tune"] = tune
        if (multi_label := values.pop("multi_label", None)) is not None:
            changes["multi_label"] = multi_label
        privacy = {"privacy": tables[PRIVACY]} if tables[PRIVACY] else {}
        return {**changes, **privacy, "simulation": tables[SIMULATION]}


def with_settings(
    run: Sequence[str] | None = None, simulation: Sequence[str] | None = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command flags for settings; it receives those that were given as `settings`, changes to a `RunConfig`.

    The command is of the class `SettingsCommand`.

    Args:
        run: fields of `RunConfig`; None for all that are no tables.
        simulation: fields of its table `simulation`; None for all.
    """
    chosen = _Chosen(run, simulation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            settings = chosen.changes(values)
            command(**values, settings=settings)

        own = inspect.signature(command, eval_str=True)
        kept = [parameter for name, parameter in own.parameters.items() if name != "settings"]
        wrapped.__signature__ = own.replace(parameters=kept)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {one.name: one.annotation for one in kept}
        wrapped.chosen_settings = chosen  # type: ignore[attr-defined]
        return wrapped

    return decorate


class SettingsCommand(TyperCommand):
    """A command whose settings become flags when it is called, so that other commands need not import the settings."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the arguments, the flags of settings, and the other flags."""
        own = super().get_params(ctx)
        arguments = [one for one in own if isinstance(one, click.Argument)]
        others = [one for one in own if not isinstance(one, click.Argument)]
        return [*arguments, *self._generated, *others]

    @functools.cached_property
    def _generated(self) -> list[click.Parameter]:
        chosen: _Chosen = self.callback.chosen_settings  # type: ignore[union-attr]
        return chosen.options()


def _option(panel: str, name: str, field: "FieldInfo") -> TyperOption:
    """Return the flag of a field; its value is None if it is not given."""
    flag, kind = f"--{name.replace('_', '-')}", _plain(field.annotation)
    switch, choices = kind is bool, get_args(kind) if get_origin(kind) is Literal else ()
    description = field.description or ""
    metavar = f"[{'|'.join(choices)}]" if choices else "NAME,NAME" if get_origin(kind) is tuple else None
    if not switch and field.default not in ("", ()) and "by default" not in description:
        description = f"{description} Default: {field.default}."
    return TyperOption(
        param_decls=[name, f"{flag}/--no{flag[1:]}" if switch and field.default else flag],
        type=_TYPES.get(kind, click.STRING),
        default=None,
        is_flag=switch or None,
        help=description,
        metavar=metavar,
        rich_help_panel=panel,
    )


def _plain(annotation: Any) -> Any:
    """Return a type without None and without constraints."""
    if get_origin(annotation) in (Union, UnionType):
        return next(one for one in get_args(annotation) if one is not type(None))
    return annotation
