"""The wire contract: action names, record keys, and packing and checking in both directions.

A message carries one `Payload`: plain values and named arrays as one safetensors blob in one record, because an
`ArrayRecord` costs a request per array on Flower's network. Nothing in it can run.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedhead.config import LocalConfig
from fedhead.errors import FedheadError
from fedhead.metrics import ScoreBins

PROTOCOL = 1

DESCRIBE = "query.describe"
INSTALL = "query.install"
STATISTICS = "query.statistics"
STANDARDISE = "query.standardise"
COMPARE = "query.compare"
TRAIN = "train"
EVALUATE = "evaluate"
REPORT = "evaluate.report"
CALIBRATE = "evaluate.calibrate"

UNDESCRIBED = "This site has no manifest of the run"
"""Begins what a site says that does not know of the run it is asked about; it must be described again."""

RECORD = "fedhead"
PAYLOAD = "payload"

SITE_COUNTS = "site_counts"
"""Where a Grid in this process sums for several sites: each one's rows by class, `[S, C]`."""

METRICS = ("examples", "train_loss", "held_out", "loss_sum", "correct")
"""What a site reports with a head, a row of float64: training rows and their mean loss, then held-out rows and, of
the head it received, the summed loss and the correct ones among them."""

Arrays = Mapping[str, npt.NDArray[Any]]
FloatArray = npt.NDArray[np.float64]


class MessageError(FedheadError):
    """A message is not what the contract says; this says in what, about `it`."""


@dataclass(frozen=True)
class Payload:
    """Plain values (as JSON has them) and arrays by name."""

    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    def to_content(self) -> RecordDict:
        """Return what a Flower message carries."""
        blob = save(
            {name: np.ascontiguousarray(array) for name, array in self.arrays.items()},
            {"values": json.dumps(self.values)},
        )
        return RecordDict({RECORD: ConfigRecord({PAYLOAD: blob})})

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read what `to_content` packed.

        Raises:
            MessageError: if it is anything else.
        """
        blob = _blob(content)
        try:
            arrays = load(blob)
            length = int.from_bytes(blob[:8], "little")
            values = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["values"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise MessageError(f"its payload cannot be read ({error})") from None
        if not isinstance(values, dict):
            raise MessageError("its values are not named")
        return cls(values, arrays)


def payload_bytes(content: RecordDict) -> int:
    """Return how many bytes of payload a message carries; Flower adds its envelope."""
    return len(_blob(content))


def single_bytes(content: RecordDict) -> int:
    """Return the same; where a Grid in this process answers for several sites, of the replies that they would send."""
    told = Payload.from_content(content).values.get("num_bytes")
    return told if isinstance(told, int) and told >= 0 else payload_bytes(content)


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


class Manifest(BaseModel):
    """What both sides must agree on before a run; the coordinator sends it, a site keeps it.

    A site refuses keys that it does not know: it would not do what they ask. So a release that adds one speaks another
    protocol, unless it leaves the key out where it asks for nothing new.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: int = PROTOCOL
    run: str
    backbone: str
    kind: Literal["image", "text"] = "image"
    layer: str
    backbone_digest: str
    weights_digest: str
    num_features: int
    classes: tuple[str, ...]
    multi_label: bool = False
    head: str
    holdout: float
    seed: int
    local: LocalConfig


@dataclass(frozen=True)
class WeightsChunk:
    """A part of a file of weights.

    Attributes:
        file: SHA-256 of the whole file.
        size: of the whole file, in bytes.
        offset: where the part begins.
        data: the part, uint8; none of it asks only how much the site has.
    """

    file: str
    size: int
    offset: int
    data: npt.NDArray[np.uint8]

    def to_content(self) -> RecordDict:
        """Return what a Flower message carries."""
        return Payload({"file": self.file, "size": self.size, "offset": self.offset}, {"data": self.data}).to_content()

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read and check what a site receives.

        Raises:
            MessageError: if it is anything else.
        """
        payload = Payload.from_content(content)
        try:
            file, size, offset = payload.values["file"], int(payload.values["size"]), int(payload.values["offset"])
            data = payload.arrays["data"]
        except (KeyError, TypeError, ValueError) as error:
            raise MessageError(f"it is no part of a file of weights ({error})") from None
        if not isinstance(file, str) or not re.fullmatch("[0-9a-f]{64}", file) or data.dtype != np.uint8:
            raise MessageError("it is no part of a file of weights")
        if not 0 <= offset <= size or data.ndim != 1 or offset + len(data) > size:
            raise MessageError(f"its {len(data)} bytes at {offset} are not part of a file of {size}")
        return cls(file, size, offset, data)


class StatisticsRequest(BaseModel):
    """Which sums a site is asked for: of the rows it trains on or of those held out, with a Gram matrix or without."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Literal["gram", "moments"] = "gram"
    rows: Literal["train", "held_out"] = "train"


class Description(BaseModel):
    """A site's answer: whether it can take part, and if not, why, in words its engineer can act on.

    Keys that a later release of the same protocol adds are ignored.

    Attributes:
        protocol: that it speaks.
        site: its name.
        rows: how many it has.
        has_weights: whether the backbone's are there.
        received: how many bytes of them are, while they are sent.
        refusal: why it cannot take part.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    protocol: int = PROTOCOL
    site: str
    rows: int = 0
    has_weights: bool = False
    received: int = 0
    refusal: str = ""

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read and check a reply to `DESCRIBE` or `INSTALL`.

        Raises:
            MessageError: if it is anything else.
        """
        return cls._checked(Payload.from_content(content).values)

    @classmethod
    def several_from_content(cls, content: RecordDict, count: int) -> list[Self]:
        """Read and check what a Grid in this process answers for `count` sites, or one site for itself.

        Raises:
            MessageError: if it is anything else.
        """
        values = Payload.from_content(content).values
        described = values.get("sites", [values])
        if not isinstance(described, list) or len(described) != count:
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
            raise MessageError(f"it does not describe a site ({error})") from None
        if not description.site or description.rows < 0 or description.received < 0:
            raise MessageError("it names no site, or a negative number of rows")
        return description


@dataclass(frozen=True)
class HeadRequest:
    """A head to train or to evaluate.

    Attributes:
        arrays: the head.
        server_round: from 1; seeds the minibatches.
        proximal_mu: overrides the manifest's, where a strategy sets it.
        everyone: whether all sites of the run are asked, as they will be again: what serves every round may be kept.
    """

    arrays: Arrays
    server_round: int
    proximal_mu: float | None = None
    everyone: bool = False

    def to_content(self) -> RecordDict:
        """Return what a Flower message carries."""
        values = {"server_round": self.server_round, "proximal_mu": self.proximal_mu, "everyone": self.everyone}
        return Payload(values, self.arrays).to_content()

    @classmethod
    def from_content(cls, content: RecordDict, expected: Arrays) -> Self:
        """Read and check what a site receives.

        Raises:
            MessageError: if it is not a head of the manifest's form.
        """
        payload = Payload.from_content(content)
        check_arrays(payload.arrays, expected)
        try:
            return cls(payload.arrays, **payload.values)
        except TypeError as error:
            raise MessageError(f"it asks for something else ({error})") from None


@dataclass(frozen=True)
class ReportRequest:
    """A head to evaluate in detail, and the bins in which its scores are counted at every site.

    Attributes:
        head: what is evaluated.
        bins: see `fedhead.metrics.ScoreBins`.
    """

    head: HeadRequest
    bins: ScoreBins

    def to_content(self) -> RecordDict:
        """Return what a Flower message carries."""
        bins = {"bins.centre": self.bins.centre, "bins.spread": self.bins.spread}
        return Payload({"server_round": self.head.server_round}, {**self.head.arrays, **bins}).to_content()

    @classmethod
    def from_content(cls, content: RecordDict, expected: Arrays) -> Self:
        """Read and check what a site receives.

        Raises:
            MessageError: if it is not a head of the manifest's form, with bins.
        """
        payload = Payload.from_content(content)
        arrays = dict(payload.arrays)
        try:
            bins = ScoreBins(arrays.pop("bins.centre"), arrays.pop("bins.spread"))
            head = HeadRequest(arrays, **payload.values)
        except (KeyError, ValueError, TypeError) as error:
            raise MessageError(f"it asks for something else ({error})") from None
        check_arrays(arrays, expected)
        return cls(head, bins)


@dataclass(frozen=True)
class CalibrateRequest:
    """A head whose temperature is to be chosen on one half of the held-out rows, or to be judged on the other.

    Attributes:
        head: what is evaluated.
        temperature: what is to be judged; 0 asks for the losses that choose one.
    """

    head: HeadRequest
    temperature: float = 0.0

    def to_content(self) -> RecordDict:
        """Return what a Flower message carries."""
        values = {"server_round": self.head.server_round, "temperature": self.temperature}
        return Payload(values, self.head.arrays).to_content()

    @classmethod
    def from_content(cls, content: RecordDict, expected: Arrays) -> Self:
        """Read and check what a site receives.

        Raises:
            MessageError: if it is not a head of the manifest's form, with a temperature.
        """
        payload = Payload.from_content(content)
        check_arrays(payload.arrays, expected)
        values = dict(payload.values)
        temperature = values.pop("temperature", None)
        if not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
            raise MessageError(f"its temperature is {temperature!r}, not a number of 0 or more")
        try:
            return cls(HeadRequest(payload.arrays, **values), float(temperature))
        except TypeError as error:
            raise MessageError(f"it asks for something else ({error})") from None


@dataclass(frozen=True)
class HeadReply:
    """What came back for a head: from one site, or merged from several by a Grid in this process.

    Attributes:
        metrics: `[k, len(METRICS)]` float64, a row per site.
        arrays: the trained head, the mean over the sites weighted by examples; empty after evaluation.
        sites: the `k` names, for a merged reply; empty otherwise.
        dropped: sites that are left out, with the reason, for a merged reply.
        num_bytes: what the sites' single replies take on the wire.
    """

    metrics: FloatArray
    arrays: Arrays = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    num_bytes: int = 0

    def single_bytes(self) -> int:
        """Return the payload's size as one site's reply."""
        return payload_bytes(Payload({}, {**self.arrays, "metrics": self.metrics}).to_content())

    def to_content(self) -> RecordDict:
        """Return what a Flower message carries."""
        merged = {"sites": self.sites, "dropped": dict(self.dropped), "num_bytes": self.num_bytes}
        values = merged if self.sites or self.dropped else {}
        return Payload(values, {**self.arrays, "metrics": self.metrics}).to_content()

    @classmethod
    def from_content(cls, content: RecordDict, expected: Arrays, *, merged: bool = False) -> Self:
        """Read a reply to `TRAIN` or `EVALUATE`, and check all of it.

        Args:
            content: what the message carries.
            expected: arrays with the names, shapes and dtype that must come back.
            merged: whether it may speak for several sites.

        Raises:
            MessageError: for other keys, shapes or types, for values that are not finite, and for impossible counts.
        """
        payload = Payload.from_content(content)
        arrays = dict(payload.arrays)
        metrics = arrays.pop("metrics", np.empty(0))
        check_arrays(arrays, expected)
        values = payload.values if merged else {}
        sites = tuple(values.get("sites", ()))
        dropped = dict(values.get("dropped", {}))
        check_metrics(metrics, len(sites) if sites or dropped else 1)
        return cls(metrics, arrays, sites, dropped, int(values.get("num_bytes", payload_bytes(content))))


def check_arrays(arrays: Arrays, expected: Arrays) -> None:
    """Check names, dtypes, shapes and finiteness.

    Raises:
        MessageError: if anything differs.
    """
    if arrays.keys() != expected.keys():
        raise MessageError(f"it holds the arrays {sorted(arrays)} instead of {sorted(expected)}")
    for name, like in expected.items():
        array = arrays[name]
        if array.dtype != like.dtype or array.shape != like.shape:
            raise MessageError(
                f"{name!r} is {array.dtype}{list(array.shape)} instead of {like.dtype}{list(like.shape)}"
            )
        if not np.isfinite(array).all():
            raise MessageError(f"{name!r} holds values that are not finite")


def check_metrics(metrics: FloatArray, sites: int) -> None:
    """Check a table of `METRICS`, a row per site.

    Raises:
        MessageError: if it has another form, or numbers that no site can have counted.
    """
    if metrics.dtype != np.float64 or metrics.shape != (sites, len(METRICS)):
        raise MessageError(
            f"its metrics are {metrics.dtype}{list(metrics.shape)}, not float64[{sites}, {len(METRICS)}]"
        )
    if not np.isfinite(metrics).all() or (metrics < 0).any():
        raise MessageError("its metrics are not finite, or negative")
    counts = metrics[:, [METRICS.index(name) for name in ("examples", "held_out", "correct")]]
    if (counts != np.rint(counts)).any() or (counts[:, 2] > counts[:, 1]).any():
        raise MessageError("its counts are not whole, or more rows are correct than held out")
