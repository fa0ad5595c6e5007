"""The wire contract: action names, record keys, and packing and validation in both directions.

A message carries one `Payload`: plain values and named arrays as one safetensors blob in one record, because an
`ArrayRecord` costs a request per array on Flower's network. No part of it is executable.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, RecordDict
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedhead.config import MOST_DECAY, LocalConfig, RunConfig, require_tunable
from fedhead.errors import FedheadError
from fedhead.protocol.fields import (
    BackboneSpec,
    Count,
    Digest,
    FileSize,
    Flag,
    Names,
    Seed,
    Sentence,
    Share,
    Text,
    Width,
    wrong_fields,
)
from fedhead.protocol.private import PrivacyTerms, terms_of
from fedhead.sums.sums import Arrays, check_form
from fedhead.tuning import ObjectiveName, parse_tune

if TYPE_CHECKING:
    from fedhead.backbones import Backbone

PROTOCOL = 2

UNDESCRIBED = "This site has no manifest of the run"
"""Prefix of a site's error if it does not know the run; the coordinator then describes the run again."""

RECORD = "fedhead"
PAYLOAD = "payload"

MOST_STEPS = 12
"""Limit on the release steps that a site may describe."""

SITE_COUNTS = "site_counts"
"""Key of the rows by site and class `[S, C]`, if a Grid in this process sums for several sites."""


class MessageError(FedheadError):
    """A message that violates the contract; the error text refers to the message as `it`."""


@dataclass(frozen=True)
class Payload:
    """Plain values (JSON types) and arrays by name."""

    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    @cached_property
    def blob(self) -> bytes:
        """The serialised bytes."""
        return save(
            {name: np.ascontiguousarray(array) for name, array in self.arrays.items()},
            {"values": json.dumps(self.values)},
        )

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        return RecordDict({RECORD: ConfigRecord({PAYLOAD: self.blob})})

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read the content of a Flower message.

        Raises:
            MessageError: if the content is invalid.
        """
        blob = _blob(content)
        try:
            arrays = load(blob)
            length = int.from_bytes(blob[:8], "little")
            values = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["values"])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MessageError(f"its payload cannot be read ({error})") from None
        if not isinstance(values, dict):
            raise MessageError("its values are not named")
        return cls(values, arrays)


def payload_bytes(content: RecordDict) -> int:
    """Return the payload size of a message in bytes; Flower adds its envelope."""
    return len(_blob(content))


def _blob(content: RecordDict) -> bytes:
    if set(content) != {RECORD}:
        raise MessageError(f"it has the records {sorted(content)} instead of {RECORD!r}")
    record = content[RECORD]
    if not isinstance(record, ConfigRecord) or set(record) != {PAYLOAD}:
        raise MessageError(f"its record has the keys {sorted(record)} instead of {PAYLOAD!r}")
    blob = record[PAYLOAD]
    if not isinstance(blob, bytes):
        raise MessageError("its payload is not bytes")
    return blob


TuneText = Annotated[Text, AfterValidator(require_tunable)]


class Manifest(BaseModel):
    """The settings that both sides must agree on before a run; sent by the coordinator and kept by each site.

    A site rejects unknown keys, because it would not act on them. A release that adds a key therefore needs a new
    protocol version, unless it omits the key when the key has no effect.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: int = PROTOCOL
    run: Text
    backbone: BackboneSpec
    kind: Literal["image", "text", "table", "audio"] = "image"
    layer: Text
    backbone_digest: Digest
    weights_digest: Digest
    num_features: Width
    classes: Names
    task: Text = "classification"
    head: Text
    holdout: Share
    seed: Seed
    local: LocalConfig
    tune: TuneText = ""
    adjust: Flag = False
    mixed: Flag = False
    decay: Annotated[float, Field(ge=1, le=MOST_DECAY)] = 1.0
    objective: ObjectiveName = "task"
    secure_sum: Flag = False
    privacy: PrivacyTerms | None = None

    @classmethod
    def of(cls, run: str, config: RunConfig, backbone: "Backbone", classes: Sequence[str]) -> Self:
        """Return the manifest of a run on a loaded backbone."""
        return cls(
            run=run,
            backbone=backbone.spec,
            kind=backbone.kind,
            layer=backbone.layer,
            backbone_digest=backbone.digest,
            weights_digest=backbone.weights_digest,
            num_features=backbone.num_features,
            classes=tuple(classes),
            task=config.task,
            head=config.head,
            holdout=config.holdout,
            seed=config.seed,
            local=local_settings(config, backbone),
            tune=config.tune.layers if config.tune.on else "",
            adjust=config.adjusts_shares,
            mixed=config.tune.on and config.tune.precision == "mixed",
            decay=config.tune.decay if config.tune.on else 1.0,
            objective=config.tune.objective if config.tune.on else "task",
            secure_sum=config.privacy.secure_sum,
            privacy=terms_of(config.privacy),
        )

    def wire(self) -> dict[str, Any]:
        """Return plain values for the wire, without settings that have no effect and that earlier releases reject."""
        off = {name for name in ("secure_sum", "privacy", "tune", "adjust", "mixed") if not getattr(self, name)}
        usual = {name for name, value in (("decay", 1), ("objective", "task")) if getattr(self, name) == value}
        return self.model_dump(mode="json", exclude=off | usual)


LORA_LR, NORMALISED_LR, LR = 2e-3, 1e-4, 3e-4
"""Default learning rates of adapters, of Transformers and of other networks."""


def local_settings(config: RunConfig, backbone: "Backbone") -> LocalConfig:
    """Return how sites train in a run on this backbone."""
    tune = config.tune
    if not tune.on:
        return config.local
    names = {type(module).__name__ for module in backbone.module.modules()}
    usual = NORMALISED_LR if any(name.endswith(("LayerNorm", "RMSNorm", "LayerNorm2d")) for name in names) else LR
    return LocalConfig(
        epochs=tune.epochs,
        batch_size=tune.batch_size,
        optimizer=tune.optimizer,
        lr=tune.lr or (LORA_LR if parse_tune(tune.layers).method == "lora" else usual),
        weight_decay=tune.weight_decay,
        proximal_mu=config.local.proximal_mu,
    )


class _ChunkValues(BaseModel):
    """Values that accompany a chunk of a weights file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Digest
    size: FileSize
    offset: FileSize


@dataclass(frozen=True)
class WeightsChunk:
    """A chunk of a weights file.

    Attributes:
        file: SHA-256 of the whole file.
        size: size of the whole file in bytes.
        offset: position of the chunk.
        data: the chunk, uint8; if empty, the message only asks how much the site has.
    """

    file: str
    size: int
    offset: int
    data: npt.NDArray[np.uint8]

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        return Payload({"file": self.file, "size": self.size, "offset": self.offset}, {"data": self.data}).to_content()

    @classmethod
    def from_payload(cls, payload: Payload) -> Self:
        """Read and validate a received chunk.

        Raises:
            MessageError: if the payload is invalid.
        """
        try:
            values = _ChunkValues(**payload.values)
        except ValidationError as error:
            raise MessageError(f"it is not a chunk of a weights file ({wrong_fields(error)})") from None
        data = payload.arrays.get("data", np.empty(0))
        if payload.arrays.keys() != {"data"} or data.dtype != np.uint8 or data.ndim != 1:
            raise MessageError("it is not a chunk of a weights file")
        if values.offset + len(data) > values.size:
            raise MessageError(f"its {len(data)} bytes at {values.offset} do not fit a file of {values.size} bytes")
        return cls(values.file, values.size, values.offset, data)


class StatisticsRequest(BaseModel):
    """The sums requested of a site: over its training rows or its held-out rows, with or without a Gram matrix.

    Attributes:
        what: `gram` for feature statistics, or `moments`.
        rows: the rows to sum.
        map: the digest of the map of features that the coordinator takes the site to have; empty for any.
        wire: the number type of the sums of features in the reply of one site.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Literal["gram", "moments"] = "gram"
    rows: Literal["train", "held_out"] = "train"
    map: Digest | Literal[""] = ""
    wire: Literal["float64", "float32"] = "float64"

    def payload(self) -> Payload:
        """Return the values for the wire, without defaults that earlier versions do not know."""
        unset = {name for name in ("map", "wire") if getattr(self, name) == type(self).model_fields[name].default}
        return Payload(self.model_dump(exclude=unset))


class Description(BaseModel):
    """A site's description: whether it can take part, and if not, a reason that its engineer can act on.

    Keys added by later releases of the same protocol are ignored.

    Attributes:
        protocol: the site's protocol version.
        site: the site's name.
        rows: the number of rows.
        has_weights: whether the site has the backbone's weights.
        received: the number of bytes of the weights received so far.
        refusal: the reason why the site cannot take part.
        steps: a sentence for each step that the site's replies pass, as it describes them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    protocol: int = PROTOCOL
    site: Text
    rows: Count = 0
    has_weights: Flag = False
    received: Count = 0
    refusal: Sentence = ""
    steps: Annotated[tuple[Sentence, ...], Field(max_length=MOST_STEPS)] = ()

    def wire(self) -> dict[str, Any]:
        """Return the values for the wire, without `steps` if there are none."""
        return self.model_dump(exclude=None if self.steps else {"steps"})

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read and validate a reply to `DESCRIBE` or `INSTALL`.

        Raises:
            MessageError: if the content is invalid.
        """
        return cls._checked(Payload.from_content(content).values)

    @classmethod
    def several_from_values(cls, values: Mapping[str, Any], count: int) -> list[Self]:
        """Read and validate descriptions of `count` sites from a Grid in this process, or of one real site.

        Raises:
            MessageError: if the values are invalid.
        """
        described = values.get("sites", [values])
        valid = isinstance(described, list) and all(isinstance(one, dict) for one in described)
        if not valid or len(described) != count:
            raise MessageError(f"it does not describe {count} sites")
        return [cls._checked(one) for one in described]

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> Self:
        if values.get("protocol", PROTOCOL) != PROTOCOL:
            raise MessageError(
                f"it speaks protocol {values['protocol']}, and this coordinator speaks {PROTOCOL}; install one version "
                "of fedhead on both sides"
            )
        try:
            description = cls(**values)
        except (ValidationError, TypeError) as error:
            wrong = wrong_fields(error) if isinstance(error, ValidationError) else "its keys"
            raise MessageError(f"it does not describe a site ({wrong})") from None
        if not description.site:
            raise MessageError("its site name is empty")
        return description


def check_arrays(arrays: Arrays, expected: Arrays) -> None:
    """Validate names, dtypes, shapes and finiteness.

    Raises:
        MessageError: if anything differs.
    """
    try:
        check_form(arrays, expected)
    except ValueError as error:
        raise MessageError(str(error)) from None
