"""RunConfig: the one description of a run, from a TOML file, from flags over it, or from Python."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedhead.errors import UserError
from fedhead.registry import suggest
from fedhead.tuning import parse_tune

MOST_LIFTED = 4096
"""Largest width of a lift: the sums of wider features would be projected."""

DENSE_LAYERS = {"detection": "maps/8@416", "segmentation": "maps"}
"""Tasks about places of items, such as pixels, with the layers that each takes by default."""

Scalar = bool | int | float | str
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MOST_EPSILON = 100.0
"""Bar on epsilon: beyond it the bound, a factor of exp(epsilon), says nothing."""
Epsilon = Annotated[float, Field(ge=0, le=MOST_EPSILON, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StrategyConfig(BaseModel):
    """A Flower strategy by its Flower name; every other key is one of its parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    name: str = Field(
        "FedAvg",
        description="Flower name of the strategy, or 'pooled-lbfgs' for logistic regression by full gradients; other "
        "keys are its parameters.",
    )

    @property
    def parameters(self) -> dict[str, Scalar]:
        """What goes to the strategy's constructor."""
        return dict(self.__pydantic_extra__)


class LocalConfig(_Table):
    """How a site trains its head in one round."""

    epochs: int = Field(1, ge=1, description="Passes over a site's training rows in one round.")
    batch_size: int = Field(32, ge=1, description="Rows per step.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="'sgd' or 'adamw'.")
    lr: Positive = Field(0.1, description="Learning rate.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of 'sgd'.")
    weight_decay: NonNegative = Field(0.0, description="Weight decay.")
    proximal_mu: NonNegative = Field(0.0, description="Weight of the proximal term of FedProx.")

    @model_validator(mode="after")
    def _momentum_is_for_sgd(self) -> Self:
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError("momentum belongs to optimizer 'sgd'; adamw has its own")
        return self


def require_tunable(layers: str) -> str:
    """Return a choice of what to tune, or none.

    Raises:
        ValueError: if it is malformed.
    """
    if layers:
        try:
            parse_tune(layers)
        except UserError as error:
            raise ValueError(str(error).rstrip(".")) from None
    return layers


class TuneConfig(_Table):
    """Fine-tuning beyond the head: which parameters of the backbone train, and how a site trains them in one round."""

    layers: str = Field(
        "",
        description="Train more than the head: 'last:2' for the last two blocks, 'lora:8', 'bitfit', 'norm', or names "
        "of layers; kept only if held-out rows prove it better.",
    )
    lr: NonNegative = Field(0.0, description="Learning rate; 0 takes one that fits the layers and the method.")
    epochs: int = Field(1, ge=1, description="Passes over a site's training rows in one round.")
    batch_size: int = Field(32, ge=1, description="Rows per step.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="'adamw' or 'sgd'.")
    weight_decay: NonNegative = Field(0.0, description="Weight decay.")
    adjust: bool = Field(
        True,
        description="During training, add to each class's logit the logarithm of its share at the site divided by its "
        "share at all sites.",
    )
    precision: Literal["float32", "mixed"] = Field(
        "float32", description="Precision of training: 'float32', or 'mixed' for bfloat16."
    )

    @property
    def on(self) -> bool:
        """Whether parameters of the backbone train."""
        return bool(self.layers) and self.layers != "head"

    @field_validator("layers")
    @classmethod
    def _layers_are_well_formed(cls, layers: str) -> str:
        return require_tunable(layers)


class SimulationConfig(_Table):
    """Settings of `fedhead simulate` beyond the run itself: the data, and its split over sites."""

    data: str = Field("digits", description="Data spec: 'digits', folder:PATH, csv:FILE or another.")
    test_data: str = Field("", description="Data spec of a pooled test set.")
    sites: int = Field(10, ge=1, description="Number of sites.")
    partition: str = Field(
        "dirichlet:0.3",
        description="Split of the rows over sites: iid, dirichlet:ALPHA, shards:K, quantity:ALPHA, sample:ROWS or "
        "folder.",
    )
    engine: Literal["process", "ray", "flower"] = Field(
        "process",
        description="Engine: 'process'; 'ray' for all cores, or a cluster; or 'flower' for Flower's own, to compare.",
    )
    cluster: str = Field("", description="Address of a Ray cluster; by default a local one is started.")
    blocks: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Blocks of sites; on a cluster, each is one worker's. Decides the last bits of a result. 0 chooses "
        "by the data.",
    )
    device: str = Field("auto", description="Device: 'auto', 'cpu', 'cuda' or 'mps'.")
    precision: Literal["float32", "mixed"] = Field(
        "float32", description="Precision: 'float32', or 'mixed' for faster extraction on a GPU."
    )
    strict_data: bool = Field(False, description="Stop at unreadable rows instead of skipping them.")
    min_class_count: int = Field(
        5,
        ge=0,
        description="Minimum training rows of a class, or groups where the data has these; a site withholds classes "
        "with fewer. 0 for no limit.",
    )
    min_rows: int = Field(
        20, ge=0, description="Minimum rows of a site; a site with fewer takes no part. 0 for no limit."
    )

    @model_validator(mode="after")
    def _a_cluster_is_rays(self) -> Self:
        if self.cluster and self.engine == "process":
            raise ValueError("a cluster needs engine 'ray'")
        return self


class PrivacyConfig(_Table):
    """Protection of sums and heads against the coordinator, and of rows against the result."""

    secure_sum: bool = Field(
        False, description="Mask each site's replies, so that the coordinator learns only the sum over all sites."
    )
    epsilon: Epsilon = Field(
        0.0, description="Differential privacy: the run's epsilon for each row or group of a site. 0 for none."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta of differential privacy; below 1 / rows.")
    unit: Literal["row", "group"] = Field(
        "row", description="What differential privacy protects: a 'row', or a 'group' of rows such as a patient."
    )
    noise: Literal["shared", "own"] = Field(
        "shared",
        description="Noise: 'shared' by all sites, which needs secure_sum at real sites, or each site's 'own'.",
    )
    max_colluding: int = Field(
        1,
        ge=0,
        le=100_000,
        description="Sites that may collude with the coordinator: secure sums hide the others' values from them, and "
        "shared noise is enough without theirs.",
    )
    clip: Literal["unit"] = Field("unit", description="Bound of a row's features: 'unit', every row has norm 1.")
    evaluate: float = Field(
        0.2, ge=0, le=1, description="Share of the held-out rows' privacy budget that the evaluation spends."
    )

    @property
    def on(self) -> bool:
        """Whether the run is differentially private."""
        return self.epsilon > 0


def lifted_width(text: str) -> int | None:
    """Return the width of `landmarks:WIDTH` or `relu:WIDTH`; None for other texts and widths above `MOST_LIFTED`."""
    found = re.fullmatch("(?:landmarks|relu):([1-9][0-9]{0,5})", text)
    return int(found[1]) if found is not None and int(found[1]) <= MOST_LIFTED else None


class RunConfig(_Table):
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
        "or by default 'maps', the layers at strides 4, 8 and 16, or 8, 16 and 32 for detection ('maps/8').",
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
        "'segmentation', 'detection', 'clusters' for rows without labels, or one of your own.",
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
        description="Let the model tell inputs that are unlike the sites' rows, by distances from their sums; this "
        "needs two more exchanges.",
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

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in classes if classes.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is named twice")
        return classes

    @model_validator(mode="after")
    def _a_classifier_has_classes(self) -> Self:
        if self.task in ("classification", "multi-label") and len(self.classes) == 1:
            raise ValueError(f"a classifier needs two classes or more, not only {self.classes[0]!r}")
        return self

    @field_validator("lift")
    @classmethod
    def _a_lift_is_known(cls, lift: str) -> str:
        if lift not in ("none", "auto") and lifted_width(lift) is None:
            raise ValueError(f"expected 'none', 'auto', 'landmarks:WIDTH' or 'relu:WIDTH', up to {MOST_LIFTED} wide")
        return lift

    @model_validator(mode="after")
    def _full_gradients_are_of_linear_heads(self) -> Self:
        if self.strategy.name == "pooled-lbfgs":
            if self.head != "linear":
                raise ValueError(f"pooled-lbfgs trains a 'linear' head, not {self.head!r}")
            if self.task in ("regression", "ordinal", "survival", "tagging"):
                raise ValueError(f"pooled-lbfgs is for classes; one exchange already solves the task {self.task!r}")
        return self

    @model_validator(mode="after")
    def _worth_needs_each_sites_sums(self) -> Self:
        if self.worth and "keep_sums" in self.model_fields_set and self.keep_sums != "folder":
            raise ValueError("worth compares the sites' own sums, so it needs keep_sums = 'folder'")
        return self

    @model_validator(mode="after")
    def _personal_heads_are_of_classes(self) -> Self:
        if self.personal != "none" and self.task != "classification":
            raise ValueError(f"personal heads are for task 'classification', not {self.task!r}")
        if self.personal == "closed" and self.init in ("zeros", "random"):
            raise ValueError("personal = 'closed' needs pooled sums: choose an init that is solved, such as 'lda'")
        return self

    @model_validator(mode="after")
    def _adapted_heads_are_solved(self) -> Self:
        if not self.adapt:
            return self
        if self.task != "classification" or self.head != "linear" or self.init in ("zeros", "random"):
            raise ValueError("adapt is for task 'classification' with a solved 'linear' head")
        if "rounds" in self.model_fields_set and self.rounds:
            raise ValueError("adapt solves heads from sums: set rounds to 0")
        if self.privacy.on:
            raise ValueError("adapt needs exact sums, which differential privacy does not give: leave epsilon at 0")
        return self

    @model_validator(mode="after")
    def _masks_and_noise_need_float64(self) -> Self:
        if self.wire == "float32" and (self.privacy.secure_sum or self.privacy.on):
            raise ValueError("wire 'float32' is for plain sums: leave it at 'float64' under secure_sum or with epsilon")
        return self

    @model_validator(mode="after")
    def _robust_pooling_needs_sums(self) -> Self:
        if self.pooling == "robust" and self.keep_sums != "folder":
            raise ValueError("pooling 'robust' compares single sites' sums: leave keep_sums at 'folder'")
        if self.pooling == "robust" and self.privacy.secure_sum:
            raise ValueError("pooling 'robust' compares single sites' sums, which secure_sum hides")
        return self

    @model_validator(mode="after")
    def _clusters_have_no_labels(self) -> Self:
        if self.task != "clusters":
            if self.clusters:
                raise ValueError("clusters is the number of clusters for task 'clusters' (--task clusters)")
            return self
        if self.clusters == 1:
            raise ValueError("clusters must be 2 or more, or 0 to choose the number")
        needless = {
            "head": "linear",
            "lift": "none",
            "pooling": "sum",
            "classes_from": "",
            "foreign": False,
            "worth": False,
        }
        if wrong := [name for name, value in needless.items() if getattr(self, name) != value]:
            raise ValueError(f"task 'clusters' takes no {wrong[0]}: rows have no labels before clusters are found")
        if "rounds" in self.model_fields_set and self.rounds:
            raise ValueError("task 'clusters' solves its head from sums: set rounds to 0")
        if self.simulation.test_data:
            raise ValueError("task 'clusters' takes no test_data: name the clusters, then use fedhead evaluate")
        return self

    @model_validator(mode="after")
    def _places_are_learned_from_sums(self) -> Self:
        if self.task not in DENSE_LAYERS:
            return self
        plain = {
            "basis": "none",
            "lift": "none",
            "head": "linear",
            "pooling": "sum",
            "worth": False,
            "foreign": False,
        }
        if wrong := [name for name, value in plain.items() if getattr(self, name) != value]:
            raise ValueError(f"task {self.task!r} takes no {wrong[0]} but {plain[wrong[0]]!r}: its rows are places")
        if "rounds" in self.model_fields_set and self.rounds:
            raise ValueError(
                f"task {self.task!r} solves its head from sums: set rounds to 0. Places of one item are alike, and "
                "rounds overfit them"
            )
        if self.simulation.engine != "process":
            raise ValueError(f"task {self.task!r} is simulated in this process: leave simulation.engine at 'process'")
        return self

    @model_validator(mode="after")
    def _words_have_no_foreign_test(self) -> Self:
        if self.task == "tagging" and self.foreign:
            raise ValueError("foreign is about whole inputs, and task 'tagging' is about words: leave it out")
        return self

    @model_validator(mode="after")
    def _one_source_of_classes(self) -> Self:
        if self.classes and self.classes_from:
            raise ValueError("give classes or classes_from, not both")
        return self

    @model_validator(mode="after")
    def _private_runs_solve_sums(self) -> Self:
        if not self.privacy.on:
            return self
        if self.task != "classification":
            raise ValueError(f"differential privacy (epsilon) needs the task 'classification', not {self.task!r}")
        if self.head not in ("linear", "unit"):
            raise ValueError(f"differential privacy (epsilon) needs a linear head, not {self.head!r}")
        if self.basis != "none" or self.lift != "none":
            raise ValueError("differential privacy (epsilon) has a basis of its own: set basis and lift to 'none'")
        return self

    @property
    def adjusts_shares(self) -> bool:
        """Whether sites adjust logits by their class shares while they tune."""
        return self.tune.on and self.tune.adjust and self.task == "classification"

    @model_validator(mode="after")
    def _tuned_runs_start_from_a_solved_head(self) -> Self:
        if not self.tune.on:
            return self
        if self.rounds == 0:
            raise ValueError(f"tune = {self.tune.layers!r} trains in rounds: set rounds to 1 or more")
        if self.privacy.on:
            raise ValueError(
                "differential privacy (epsilon) covers the head of one exchange only, not tuned layers: leave tune out"
            )
        if self.task not in ("classification", "multi-label"):
            raise ValueError(f"tune is for the tasks 'classification' and 'multi-label', not {self.task!r}")
        if self.head != "linear" or self.init in ("zeros", "random"):
            raise ValueError("tune starts from a solved head: set head to 'linear', and init to 'lda' or leave it out")
        plain: dict[str, Any] = {"basis": "none", "lift": "none", "personal": "none", "foreign": False}
        if wrong := [name for name, value in plain.items() if getattr(self, name) != value]:
            raise ValueError(f"{wrong[0]} is computed from the features of the frozen backbone: leave it or tune out")
        if self.strategy.name == "pooled-lbfgs":
            raise ValueError("pooled-lbfgs trains a linear head alone: leave tune out, or take 'FedAvg'")
        if self.simulation.engine != "process":
            raise ValueError("tune is simulated in this process: leave simulation.engine at 'process'")
        if self.local != LocalConfig(proximal_mu=self.local.proximal_mu):
            raise ValueError("a tuned run trains by the settings of its table tune, as in tune.lr: leave local out")
        return self

    @property
    def _dense_layer(self) -> str:
        default = DENSE_LAYERS[self.task]
        name, at, size = self.layer.partition("@")
        if name == "maps":
            return default.partition("@")[0] + at + size
        return default if self.layer == "penultimate" else self.layer

    def settled(self) -> Self:
        """Return the configuration with what the task, tuning, adaptation or differential privacy decides."""
        if self.tune.on and "rounds" not in self.model_fields_set:
            return self.changed({"rounds": 10})
        if self.task == "clusters":
            return self.changed({"rounds": 0, "diagnose": False})
        if self.task in DENSE_LAYERS:
            return self.changed({"rounds": 0, "diagnose": False, "layer": self._dense_layer})
        if self.adapt:
            return self.changed({"rounds": 0})
        if not self.privacy.on:
            return self
        rounds = self.rounds if "rounds" in self.model_fields_set else 0
        decided = {"head": "unit", "init": "zeros", "rounds": rounds, "keep_sums": "total", "diagnose": False}
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
        tables: dict[str, type[BaseModel]] = {
            "local": LocalConfig,
            "tune": TuneConfig,
            "privacy": PrivacyConfig,
            "simulation": SimulationConfig,
        }
        table = tables[detail["loc"][0]] if len(detail["loc"]) > 1 else RunConfig
        return f"There is no setting {where!r}. {suggest(str(detail['loc'][-1]), list(table.model_fields))}"
    message = detail["msg"].removeprefix("Value error, ")
    if not where:
        return f"{message[0].upper()}{message[1:]}."
    return f"Setting {where!r}: {message[0].lower()}{message[1:]} (it was {detail['input']!r})."
