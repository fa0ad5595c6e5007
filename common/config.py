"""RunConfig: the one description of a run, from a TOML file, from flags over it, or from Python."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedhead.errors import UserError
from fedhead.registry import suggest

Scalar = bool | int | float | str
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StrategyConfig(BaseModel):
    """A Flower strategy by its Flower name; every other key is one of its parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    name: str = "FedAvg"

    @property
    def parameters(self) -> dict[str, Scalar]:
        """What goes to the strategy's constructor."""
        return dict(self.__pydantic_extra__)


class LocalConfig(_Table):
    """How a site trains its head in one round."""

    epochs: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: NonNegative = 0.0
    proximal_mu: NonNegative = 0.0

    @model_validator(mode="after")
    def _momentum_is_for_sgd(self) -> Self:
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError("momentum belongs to optimizer 'sgd'; adamw has its own")
        return self


class SimulationConfig(_Table):
    """What `fedhead simulate` needs beyond the run itself: the data, and who holds it."""

    data: str = "digits"
    test_data: str = ""
    sites: int = Field(10, ge=1)
    partition: str = "dirichlet:0.3"
    engine: Literal["process", "ray"] = "process"
    cluster: str = ""
    device: str = "auto"
    precision: Literal["float32", "mixed"] = "float32"
    strict_data: bool = False
    min_class_count: int = Field(5, ge=0)
    min_rows: int = Field(20, ge=0)

    @model_validator(mode="after")
    def _a_cluster_is_rays(self) -> Self:
        if self.cluster and self.engine != "ray":
            raise ValueError("a cluster needs engine 'ray'")
        return self


class RunConfig(_Table):
    """A federated transfer-learning run.

    Example:
        >>> RunConfig(backbone="bundled:pixels", local={"lr": 0.05}).local.lr
        0.05

    Raises:
        UserError: for unknown keys and values out of range, one sentence for each.
    """

    backbone: str = "bundled:glyphnet"
    weights: str = "default"
    layer: str = "penultimate"
    head: str = "linear"
    init: str = ""
    classes: tuple[str, ...] = ()
    classes_from: str = ""
    multi_label: bool = False
    rounds: int = Field(20, ge=0)
    holdout: float = Field(0.2, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63)
    keep_sums: Literal["folder", "none", "total"] = "folder"
    with_backbone: bool = False
    diagnose: bool = True
    min_sites: int = Field(1, ge=1)
    round_deadline: Positive = 3600.0
    strategy: StrategyConfig = StrategyConfig()
    local: LocalConfig = LocalConfig()
    simulation: SimulationConfig = SimulationConfig()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(" ".join(_sentence(detail) for detail in error.errors())) from None

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in classes if classes.count(name) > 1}):
            raise ValueError(f"the class {twice[0]!r} is named twice")
        if len(classes) == 1:
            raise ValueError(f"a classifier needs two classes or more, not only {classes[0]!r}")
        return classes

    @model_validator(mode="after")
    def _one_source_of_classes(self) -> Self:
        if self.classes and self.classes_from:
            raise ValueError("give classes or classes_from, not both")
        return self

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Validate plain nested values, as a TOML file holds them."""
        return cls(**values)

    @classmethod
    def from_toml(cls, path: Path, changes: Mapping[str, Any] | None = None) -> Self:
        """Read a TOML file, with `changes` (nested as the file is) over it.

        Raises:
            UserError: if the file is missing, is not TOML, or does not describe a run.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"The configuration {path} cannot be read: {error.strerror}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"The configuration {path} is not valid TOML: {error}.") from None
        try:
            return cls(**merge(values, changes or {}))
        except UserError as error:
            raise UserError(f"In {path}: {error}") from None

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return this configuration with `changes` (nested) over it, validated again."""
        return type(self)(**merge(self.model_dump(exclude_unset=True), changes))

    def to_toml(self) -> str:
        """Return a TOML text that `from_toml` reads back to an equal configuration."""
        return tomli_w.dumps(self.model_dump(mode="json"))


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes` over them, table by table."""
    merged = dict(values)
    for key, change in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, change) if isinstance(below, dict) and isinstance(change, dict) else change
    return merged


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn `TABLE.KEY=VALUE` texts into nested changes; a value is TOML, or else text.

    Raises:
        UserError: if one has no `=` or no key.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            raise UserError(f"Expected TABLE.KEY=VALUE, as in local.lr=0.05, not {assignment!r}.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        for key in reversed(keys):
            value = {key: value}
        changes = merge(changes, value)
    return changes


def _sentence(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {"local": LocalConfig, "simulation": SimulationConfig}
        table = tables[detail["loc"][0]] if len(detail["loc"]) > 1 else RunConfig
        return f"There is no setting {where!r}. {suggest(str(detail['loc'][-1]), list(table.model_fields))}"
    message = detail["msg"].removeprefix("Value error, ")
    if not where:
        return f"{message[0].upper()}{message[1:]}."
    return f"Setting {where!r}: {message[0].lower()}{message[1:]} (it was {detail['input']!r})."
