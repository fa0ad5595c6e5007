"""RunConfig: the one description of a run, from a TOML file, from flags over it, or from Python."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from fedhead.config.changes import merge
from fedhead.config.fields import (
    DENSE_LAYERS,
    GENERATION,
    LONGEST_SUBGROUP,
    MOST_LIFTED,
    MOST_SUBGROUPS,
    Positive,
    lifted_width,
)
from fedhead.config.rules import RULES
from fedhead.config.tables import LocalConfig, PrivacyConfig, SimulationConfig, StrategyConfig, Table, TuneConfig
from fedhead.config.unknown import unknown_setting
from fedhead.errors import UserError
from fedhead.tuning import NEXT_TOKEN
from fedhead.wording import MOST_CHARACTERS, one_line


class RunConfig(Table):
    """A federated transfer-learning run.

    Example:
        >>> RunConfig(backbone="bundled:pixels", local={"lr": 0.05}).local.lr
        0.05

    Raises:
        UserError: for unknown keys and values out of range, one sentence for each.
    """

    backbone: str = Field("bundled:glyphnet", description="Backbone as source:name, for example torchvision:resnet18.")
    weights: str = Field(
        "default",
        description="Weights of the backbone: 'default', 'random', or a safetensors or state-dict file.",
    )
    layer: str = Field(
        "penultimate",
        description="Layer that gives the features: 'penultimate' or a name, with an optional pooling, as in "
        "'hidden:6:cls'. Tasks about places keep whole maps: 'layer2+layer3:map', ':map@320' for images of 320 x 320, "
        "or by default 'maps', the layers at strides 4, 8 and 16, or 8, 16 and 32 for detection ('maps/8'); "
        "of a detector 'proposals', or 'proposals:150@320' for 150 in images of 320 x 320.",
    )
    basis: Literal["none", "unit", "root", "auto"] = Field(
        "none",
        description="Rows of features: 'unit' divides each by its length, 'root' after a signed square root; 'auto' is "
        "'root' if no feature is negative, as after a ReLU, else 'unit'.",
    )
    lift: str = Field(
        "none",
        description="More features, for heads that are less linear: 'landmarks:1024', 'relu:2048', or 'auto' to "
        "compare heads on held-out rows. Wider sums protect rows less.",
    )
    head: str = Field("linear", description="Head to train: 'linear', 'mlp:256' or 'cosine'.")
    init: str = Field(
        "",
        description="Initial head: lda, lda-gcv, ridge, nearest-mean, zeros or random; by default one that fits head "
        "and task.",
    )
    classes: tuple[str, ...] = Field((), description="Class names; by default those of the data.")
    classes_from: str = Field("", description="Data spec that supplies the class names.")
    task: str = Field(
        "classification",
        description="Task: 'classification', 'multi-label', 'ordinal', 'regression', 'survival', 'tagging', "
        "'segmentation', 'detection', 'clusters' for rows without labels, 'generation' for language models, or one of "
        "your own.",
    )
    clusters: int = Field(
        0, ge=0, le=200, description="Number of clusters for task 'clusters'; 0 chooses from 2 to 20 on held-out rows."
    )
    rounds: int = Field(20, ge=0, description="Training rounds; 0 solves the head from one exchange and stops.")
    holdout: float = Field(
        0.2, ge=0, lt=1, description="Share of rows that sites hold out for evaluation; real sites use their own."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed; the same seed gives the same result.")
    keep_sums: Literal["folder", "none", "total"] = Field(
        "folder",
        description="Keep the sums of each site ('folder'), their total and digests ('none'), or the total only "
        "('total').",
    )
    wire: Literal["float64", "float32"] = Field(
        "float64",
        description="Sums of features on the wire: 'float64', exact to 1e-8, or 'float32' for half the bytes.",
    )
    pooling: Literal["sum", "robust"] = Field(
        "sum",
        description="Pooling of the sites' sums: all of them ('sum'), or without sites whose sums make the head worse "
        "at the others ('robust').",
    )
    with_backbone: bool = Field(
        False, description="Save the backbone beside the model, so that the model needs no other weights."
    )
    diagnose: bool = Field(True, description="Compare each site with the pool of all sites.")
    worth: bool = Field(
        False,
        description="Compute each site's value for the head, from sums; this also sums the held-out rows if a trained "
        "head is delivered.",
    )
    personal: Literal["none", "closed", "head", "ditto"] = Field(
        "none",
        description="A head of its own for each site, kept there: 'closed' weighs pooled and own sums, 'head' trains "
        "the shared head further, 'ditto' does so near the shared head; 'none' makes none.",
    )
    adapt: bool = Field(
        False,
        description="Compare adaptations of the head to rows without labels, with each site in turn treated as one "
        "without, so that 'fedhead adapt' can use a proven one; this needs two more exchanges and sends each site the "
        "pooled sums.",
    )
    foreign: bool = Field(
        False,
        description="Let the model recognise inputs unlike the sites' rows, by distances from their sums; this "
        "needs two more exchanges.",
    )
    subgroups: tuple[str, ...] = Field(
        (),
        description="Subgroups of rows, such as ['f', 'm'], in each of which the head is evaluated; sites name their "
        "column in the data spec, as in ?group_by=sex. In simulation by default those of the data.",
    )
    sensitivity: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="For two classes: report each subgroup's own threshold that reaches this sensitivity to the last "
        "class; 0 reports none.",
    )
    min_sites: int = Field(
        1,
        ge=1,
        description="Minimum number of sites, by default all in the kit; with fewer, the run waits up to the round "
        "deadline.",
    )
    round_deadline: Positive = Field(3600.0, description="Seconds to wait for replies, and for enough sites.")
    strategy: StrategyConfig = StrategyConfig()
    local: LocalConfig = LocalConfig()
    tune: TuneConfig = TuneConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    simulation: SimulationConfig = SimulationConfig()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(" ".join(_sentence(detail) for detail in error.errors())) from None

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, values: Any) -> Any:
        """Take `multi_label = true`, the key of earlier versions, for the task, and `targets` for `classes`."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if isinstance(values.get("tune"), str):
            values["tune"] = {"layers": values["tune"]}
        if "targets" in values:
            if values.get("classes"):
                raise ValueError("give classes or targets, not both; a regression's targets are its classes")
            values["classes"] = values.pop("targets")
        if "multi_label" not in values:
            return values
        if (given := values.pop("multi_label")) not in (True, False):
            raise ValueError(f"multi_label must be true or false, not {given!r}")
        if given and values.setdefault("task", "multi-label") != "multi-label":
            raise ValueError(f"multi_label asks for task 'multi-label', but task is {values['task']!r}")
        return values

    @field_validator("subgroups")
    @classmethod
    def _subgroups_are_few_short_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) > MOST_SUBGROUPS:
            raise ValueError(f"expected {MOST_SUBGROUPS} subgroups or fewer, not {len(names)}")
        for name in names:
            if not name or one_line(name, LONGEST_SUBGROUP) != name:
                raise ValueError(f"expected names of one line and {LONGEST_SUBGROUP} characters or fewer")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is named twice")
        return names

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in classes if classes.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is named twice")
        return classes

    @field_validator("lift")
    @classmethod
    def _a_lift_is_known(cls, lift: str) -> str:
        if lift not in ("none", "auto") and lifted_width(lift) is None:
            raise ValueError(f"expected 'none', 'auto', 'landmarks:WIDTH' or 'relu:WIDTH', up to {MOST_LIFTED} wide")
        return lift

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in RULES:
            rule(self)
        return self

    @property
    def adjusts_shares(self) -> bool:
        """Whether sites adjust logits by their class shares while they tune."""
        return self.tune.on and self.tune.adjust and self.task == "classification"

    @property
    def _dense_layer(self) -> str:
        name, at, size = self.layer.partition("@")
        if self.task == "detection" and name == "maps":
            return f"maps/8{at}{size}"
        return DENSE_LAYERS[self.task] if self.layer == "penultimate" else self.layer

    def settled(self) -> Self:
        """Return the configuration with settings decided by its task, tuning, adaptation or differential privacy."""
        if self.task == GENERATION:
            return self._settled_generation()
        if self.tune.on and "rounds" not in self.model_fields_set:
            return self.changed({"rounds": 10})
        if self.task == "clusters":
            return self.changed({"rounds": 0, "diagnose": False})
        if self.task in DENSE_LAYERS:
            rounds = self.rounds if "rounds" in self.model_fields_set or self.init == "zeros" else 0
            return self.changed({"rounds": rounds, "diagnose": False, "layer": self._dense_layer})
        if self.adapt:
            return self.changed({"rounds": 0})
        if not self.privacy.on:
            return self
        return self.changed({"head": "unit", "init": "zeros", "keep_sums": "total", "diagnose": False})

    def _settled_generation(self) -> Self:
        decided: dict[str, Any] = {
            "layer": NEXT_TOKEN,
            "head": "none",
            "init": "zeros",
            "diagnose": False,
            "rounds": self.rounds if "rounds" in self.model_fields_set else 5,
            "tune": {"layers": self.tune.layers or "lora:8", "adjust": False},
        }
        if "partition" not in self.simulation.model_fields_set:
            decided["simulation"] = {"partition": "iid"}
        return self.changed(decided)

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


def _sentence(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if unknown := unknown_setting(detail, RunConfig):
        return unknown
    message = detail["msg"].removeprefix("Value error, ")
    if not where:
        return f"{message[0].upper()}{message[1:]}."
    given = repr(detail["input"])
    if len(given) > MOST_CHARACTERS:
        given = f"{given[:MOST_CHARACTERS]}..."
    return f"Setting {where!r}: {message[0].lower()}{message[1:]} (it was {given})."
