"""The tables of a run's settings."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedhead.config.fields import MOST_DECAY, Epsilon, NonNegative, Positive, Scalar, require_tunable
from fedhead.errors import UserError
from fedhead.tuning import ObjectiveName, Schedule, parse_schedule


class Table(BaseModel):
    """Settings that do not change, without unknown keys."""

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
        """The arguments of the strategy's constructor."""
        return dict(self.__pydantic_extra__)


class LocalConfig(Table):
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


class TuneConfig(Table):
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
    objective: ObjectiveName = Field(
        "task",
        description="Objective of the layers: the loss of the 'task'; 'supcon', supervised contrast of the rows of a "
        "batch; or, without labels, 'simsiam', agreement of two views of a row, and 'mlm', masked words of texts.",
    )
    schedule: dict[Annotated[int, Field(ge=1)], str] = Field(
        {},
        max_length=100,
        description='Progressive unfreezing: what trains from a round on, as in { 1 = "head", 5 = "last:1", '
        '10 = "last:2" }; instead of layers.',
    )
    decay: float = Field(
        1.0,
        ge=1,
        le=MOST_DECAY,
        description="How much slower each block learns than the block above it; 2.6 in ULMFiT.",
    )

    @model_validator(mode="before")
    @classmethod
    def _the_last_stage_names_the_layers(cls, values: Any) -> Any:
        stages = values.get("schedule") if isinstance(values, dict) else None
        if not isinstance(stages, dict) or not stages or values.get("layers"):
            return values
        numbers = {int(start): name for start, name in stages.items() if str(start).isascii() and str(start).isdigit()}
        return {**values, "layers": numbers[max(numbers)]} if numbers else values

    @model_validator(mode="after")
    def _stages_are_well_formed(self) -> Self:
        if not self.schedule:
            return self
        try:
            self.stages()
        except UserError as error:
            raise ValueError(str(error).rstrip(".")) from None
        if self.layers != (last := self.schedule[max(self.schedule)]):
            raise ValueError(
                f"layers are {self.layers!r}, and the last stage of the schedule is {last!r}: leave layers out"
            )
        return self

    def stages(self) -> Schedule | None:
        """Return the stages of progressive unfreezing; None without a schedule."""
        return parse_schedule(self.schedule) if self.schedule else None

    @property
    def on(self) -> bool:
        """Whether parameters of the backbone train."""
        return bool(self.layers) and self.layers != "head"

    @field_validator("layers")
    @classmethod
    def _layers_are_well_formed(cls, layers: str) -> str:
        return require_tunable(layers)


class SimulationConfig(Table):
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
        "float32",
        description="Precision of extraction: 'float32', or 'mixed', which is faster on GPUs and on CPUs that multiply "
        "bfloat16 and used if the backbone's features of two fixed inputs stay within 2 %.",
    )
    activations: Literal["auto", "store", "recompute"] = Field(
        "auto",
        description="Activations below tuned layers: 'store' them once, 'recompute' them for each batch, or 'auto' to "
        "store what takes at most half of the free disk.",
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
    examples: int = Field(
        0,
        ge=0,
        le=24,
        description="Held-out images to draw into the report of a segmentation or detection, with the truth beside the "
        "prediction.",
    )

    @model_validator(mode="after")
    def _a_cluster_is_rays(self) -> Self:
        if self.cluster and self.engine == "process":
            raise ValueError("a cluster needs engine 'ray'")
        return self


class PrivacyConfig(Table):
    """Protection of sums and heads against the coordinator, and of rows against the result."""

    secure_sum: bool = Field(
        False, description="Mask each site's replies, so that the coordinator learns only the sum over all sites."
    )
    epsilon: Epsilon = Field(
        0.0, description="Differential privacy: the run's epsilon for each row or group of a site; by default none."
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
