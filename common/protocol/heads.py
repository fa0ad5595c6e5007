"""Messages about a head: requests to train, evaluate or calibrate it, and the replies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict
from pydantic import BaseModel, ConfigDict, ValidationError

from fedhead.protocol.fields import Coefficient, Flag, RoundNumber, SubgroupNames, wrong_fields
from fedhead.protocol.messages import MessageError, Payload, check_arrays, payload_bytes
from fedhead.sums.heads import TABLE, FloatArray, HeadSums, check_metrics, mean_metrics
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.sums import Arrays, check_form


class _HeadValues(BaseModel):
    """Values that accompany a head for training or evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    server_round: RoundNumber
    proximal_mu: Coefficient | None = None
    everyone: Flag = False


class _CalibrateValues(_HeadValues):
    """Values that accompany a head for calibration."""

    temperature: Coefficient


@dataclass(frozen=True)
class HeadRequest:
    """A head for training or evaluation.

    Attributes:
        arrays: the head.
        server_round: from 1; seeds the minibatches.
        proximal_mu: overrides the manifest's if the strategy sets it.
        everyone: whether all sites of the run are asked, as in every round, so that intermediate results may be cached.
    """

    arrays: Arrays
    server_round: int
    proximal_mu: float | None = None
    everyone: bool = False

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        values = {"server_round": self.server_round, "proximal_mu": self.proximal_mu, "everyone": self.everyone}
        return Payload(values, self.arrays).to_content()

    @classmethod
    def from_payload(cls, payload: Payload, expected: Arrays) -> Self:
        """Read and validate a received request.

        Raises:
            MessageError: if it is not a head of the manifest's form.
        """
        check_arrays(payload.arrays, expected)
        return cls(payload.arrays, **_read_values(_HeadValues, payload.values))


@dataclass(frozen=True)
class ReportRequest:
    """A head for detailed evaluation, and the bins of scores, the same at every site.

    Attributes:
        head: the head.
        bins: see `fedhead.evaluation.metrics.ScoreBins`.
    """

    head: HeadRequest
    bins: ScoreBins

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        values = {"server_round": self.head.server_round}
        return Payload(values, {**self.head.arrays, **_bins_arrays(self.bins)}).to_content()

    @classmethod
    def from_payload(cls, payload: Payload, expected: Arrays) -> Self:
        """Read and validate a received request.

        Raises:
            MessageError: if it is not a head of the manifest's form, with bins.
        """
        arrays = dict(payload.arrays)
        bins = _take_bins(arrays)
        check_arrays(arrays, expected)
        return cls(HeadRequest(arrays, **_read_values(_HeadValues, payload.values)), bins)


@dataclass(frozen=True)
class CalibrateRequest:
    """A head to calibrate on one half of the held-out rows, or a temperature to evaluate on the other half.

    Attributes:
        head: the head.
        temperature: the temperature to evaluate; 0 requests the sums for choosing one.
        bins: the bins of residuals, if the task needs bins.
    """

    head: HeadRequest
    temperature: float = 0.0
    bins: ScoreBins | None = None

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        values = {"server_round": self.head.server_round, "temperature": self.temperature}
        bins = _bins_arrays(self.bins) if self.bins else {}
        return Payload(values, {**self.head.arrays, **bins}).to_content()

    @classmethod
    def from_payload(cls, payload: Payload, expected: Arrays) -> Self:
        """Read and validate a received request.

        Raises:
            MessageError: if it is not a head of the manifest's form, with a temperature.
        """
        arrays = dict(payload.arrays)
        bins = _take_bins(arrays) if "bins.centre" in arrays else None
        check_arrays(arrays, expected)
        values = _read_values(_CalibrateValues, payload.values)
        temperature = values.pop("temperature")
        return cls(HeadRequest(arrays, **values), temperature, bins)


class _SubgroupValues(_CalibrateValues):
    """Values that accompany a head for evaluation by subgroup."""

    names: SubgroupNames


@dataclass(frozen=True)
class SubgroupsRequest:
    """A head for detailed evaluation in each of several subgroups of rows.

    Attributes:
        head: the head.
        names: the subgroups to count, in the order of the reply; a site counts rows of others in none.
        temperature: the divisor of logits, above 0.
    """

    head: HeadRequest
    names: tuple[str, ...]
    temperature: float = 1.0

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        values = {
            "server_round": self.head.server_round,
            "temperature": self.temperature,
            "names": list(self.names),
        }
        return Payload(values, self.head.arrays).to_content()

    @classmethod
    def from_payload(cls, payload: Payload, expected: Arrays) -> Self:
        """Read and validate a received request.

        Raises:
            MessageError: if it is not a head of the manifest's form, with names and a positive temperature.
        """
        check_arrays(payload.arrays, expected)
        values = _read_values(_SubgroupValues, payload.values)
        names, temperature = values.pop("names"), values.pop("temperature")
        if not temperature:
            raise MessageError("its temperature is 0")
        return cls(HeadRequest(payload.arrays, **values), tuple(names), temperature)


def _read_values(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the validated values of a message.

    Raises:
        MessageError: with the names of invalid values.
    """
    try:
        return kind(**values).model_dump()
    except ValidationError as error:
        raise MessageError(f"its values are invalid ({wrong_fields(error)})") from None


def _bins_arrays(bins: ScoreBins) -> dict[str, npt.NDArray[Any]]:
    return {"bins.centre": bins.centre, "bins.spread": bins.spread}


def _take_bins(arrays: dict[str, npt.NDArray[Any]]) -> ScoreBins:
    """Remove the bins from the arrays of a message and return them.

    Raises:
        MessageError: if there are none or they are invalid.
    """
    try:
        return ScoreBins(arrays.pop("bins.centre"), arrays.pop("bins.spread"))
    except (KeyError, ValueError, TypeError) as error:
        raise MessageError(f"its bins are invalid ({error})") from None


@dataclass(frozen=True)
class HeadReply:
    """A reply to a head: from one site, or merged from several by a Grid in this process.

    Attributes:
        sums: the results, added over the sites.
        metrics: `[k, len(METRICS)]` float64, one row per site.
        sites: the `k` names, for a merged reply; empty otherwise.
        dropped: excluded sites with the reason, for a merged reply.
    """

    sums: HeadSums
    metrics: FloatArray
    sites: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)

    def payload(self) -> Payload:
        """Return the values and arrays for the wire; a merged reply has the size of its sites' single replies."""
        arrays = {**self.sums.to_arrays(), TABLE: self.metrics}
        if not (self.sites or self.dropped):
            return Payload({}, arrays)
        single = payload_bytes(Payload({}, self.sums.to_arrays()).to_content())
        num_bytes = single * (len(self.sites) + len(self.dropped))
        return Payload({"sites": self.sites, "dropped": dict(self.dropped), "num_bytes": num_bytes}, arrays)

    @classmethod
    def from_payload(cls, payload: Payload, like: HeadSums, *, merged: bool = False) -> Self:
        """Read and validate a reply to `TRAIN` or `EVALUATE`.

        Args:
            payload: the received payload.
            like: results with a head of the expected form.
            merged: whether the reply may cover several sites.

        Raises:
            MessageError: for other keys, shapes or types, for values that are not finite, and for impossible counts.
        """
        arrays = dict(payload.arrays)
        values = payload.values if merged else {}
        sites, dropped = tuple(values.get("sites", ())), dict(values.get("dropped", {}))
        try:
            if not (sites or dropped):
                sums = HeadSums.from_arrays(arrays, like)
                return cls(sums, sums.metrics[None])
            table = arrays.pop(TABLE, np.empty(0))
            check_metrics(table, len(sites), counted=like.counted, width=len(like.metrics))
            check_form(arrays, like.heads)
        except ValueError as error:
            raise MessageError(str(error)) from None
        return cls(HeadSums(arrays, mean_metrics(table), like.counted), table, sites, dropped)
