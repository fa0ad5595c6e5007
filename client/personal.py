"""Personal heads: a head that one site makes for itself, keeps, and compares with the shared head."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from flwr.app import Context
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedhead.client.agreement import Agreement, agreement, empty_head, head_of
from fedhead.client.answers import Answer, of_several, shared
from fedhead.client.head_handlers import outputs_of, prepare, tail_form
from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.client.personal_tails import is_personal, own_outputs, personal_model
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.client.site_data import Holding, Site
from fedhead.client.training import evaluate_head, train_in_chunks
from fedhead.config import LocalConfig
from fedhead.data import held_out
from fedhead.errors import FedheadError
from fedhead.evaluation.comparison import head_under, joint_counts
from fedhead.heads import Head, LinearHead, behind
from fedhead.heads.tail import HEAD, TAIL
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import MessageError, Payload
from fedhead.solvers.personal import choose_personal
from fedhead.sums.comparison import ComparisonSums
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import projection_for

POOL = "pool."
"""Prefix of the arrays of pooled statistics."""

EPOCHS = (1, 2, 5, 10, 20)
"""Candidates for the passes over the rows by which a personal head is trained."""

DITTO = 0.1
"""Weight of the distance from the shared head if the run sets no `proximal_mu`."""

_VALIDATION = 0.2


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["closed", "head", "ditto", "adapters"]


@dataclass(frozen=True)
class PersonalRequest:
    """The shared head, with pooled training statistics for `closed`, or the shared part of the tail for `adapters`.

    Attributes:
        mode: how the head is made.
        head: the shared head, in the coordinates of training.
        pooled: the statistics of all sites' training rows; None for trained heads.
        family: the tail's shared parameters with the head that they were trained with; None for other modes.
    """

    mode: Literal["closed", "head", "ditto", "adapters"]
    head: HeadRequest
    pooled: FeatureStatistics | None
    family: HeadRequest | None = None

    @classmethod
    def from_payload(cls, payload: Payload, agreed: Agreement, sites: Sequence[Site]) -> "PersonalRequest":
        """Read and validate a received request.

        Raises:
            MessageError: if it has another form, or the task has no personal heads.
        """
        if not agreed.task.compares_classes:
            raise MessageError(f"personal heads are not for the task {agreed.task.name!r}")
        values = _read_mode(payload)
        rest = {name: value for name, value in payload.values.items() if name != "mode"}
        arrays = {name: array for name, array in payload.arrays.items() if not name.startswith((POOL, HEAD, TAIL))}
        head = HeadRequest.from_payload(Payload(rest, arrays), empty_head(agreed))
        sums = {name.removeprefix(POOL): array for name, array in payload.arrays.items() if name.startswith(POOL)}
        if bool(sums) != (values.mode == "closed"):
            raise MessageError("pooled statistics belong to the mode 'closed'")
        tail = {name: array for name, array in payload.arrays.items() if name.startswith((HEAD, TAIL))}
        if bool(tail) != (values.mode == "adapters") or (tail and not is_personal(agreed.manifest)):
            raise MessageError("parts of a tail belong to the mode 'adapters' of a run whose adapters stay at sites")
        family = HeadRequest.from_payload(Payload(rest, tail), tail_form(sites, agreed)) if tail else None
        try:
            pooled = FeatureStatistics.from_arrays(sums, _no_rows(agreed)) if sums else None
        except ValueError as error:
            raise MessageError(str(error)) from None
        return cls(values.mode, head, pooled, family)


def _read_mode(payload: Payload) -> _Values:
    try:
        return _Values.model_validate({"mode": payload.values.get("mode")})
    except ValidationError:
        raise MessageError("it asks for an unknown kind of personal head") from None


def _no_rows(agreed: Agreement) -> FeatureStatistics:
    return agreed.task.statistics(len(agreed.origin), agreed.origin)


@dataclass(frozen=True)
class MadeHead:
    """A personal head for mapped features.

    Attributes:
        head: the head.
        temperature: the divisor of its outputs.
        about: how it was chosen, for the site's log.
    """

    head: Head
    temperature: float
    about: str


def own_statistics(
    holding: Holding, data: LabelledFeatures, agreed: Agreement
) -> tuple[FeatureStatistics, Tensor, Tensor]:
    """Return the sums of the site's training rows, and these rows as summed: features `[n, d]` and labels `[n]`."""
    project = projection_for(agreed.num_features, agreed.manifest.seed)
    rows = torch.from_numpy(holding.train.rows)
    features = data.exact(rows)
    features = features if project is None else project(features)
    labels = holding.data.labels[rows].cpu()
    total = _no_rows(agreed)
    total.update(features, labels)
    return total, features, labels


def make_personal(
    holding: Holding,
    data: LabelledFeatures,
    agreed: Agreement,
    request: PersonalRequest,
    limits: TrainingLimits,
    own: tuple[FeatureStatistics, Tensor, Tensor],
) -> MadeHead:
    """Make the site's head.

    Args:
        holding: the site's rows.
        data: its features, standardised as the run says.
        agreed: the run's agreement with the site.
        request: the coordinator's request.
        limits: on training.
        own: from `own_statistics`.

    Raises:
        FedheadError: if the pooled statistics cannot include the site's.
        MessageError: if training exceeds the site's limits.
        UserError: if the sums cover fewer than two classes.
    """
    if request.pooled is None:
        return _trained(holding, data, agreed, request, limits)
    stats, features, labels = own
    if request.pooled.rows < stats.rows or bool((request.pooled.counts < stats.counts).any()):
        raise FedheadError("The pooled statistics have fewer rows than this site alone.")
    chosen = choose_personal(request.pooled, stats, features, labels)
    project = projection_for(agreed.num_features, agreed.manifest.seed)
    head = chosen.head if project is None else project.widen(chosen.head)
    counted = (
        "from its own rows alone" if math.isinf(chosen.kappa) else f"its own rows count {1 + chosen.kappa:g} times"
    )
    about = f"{counted}, by a leave-one-out loss of {chosen.loss:.3g} a row"
    return MadeHead(head, chosen.temperature, about)


def _trained(
    holding: Holding, data: LabelledFeatures, agreed: Agreement, request: PersonalRequest, limits: TrainingLimits
) -> MadeHead:
    """Train the shared head further on part of the training rows, as long as the others' loss falls."""
    rows = holding.train.rows
    share = holding.share or agreed.manifest.holdout
    kept = held_out(holding.keys[rows], share + (1 - share) * _VALIDATION)
    fit, check = SiteRows(holding.train.name, rows[~kept]), SiteRows(holding.train.name, rows[kept])
    head = head_of(agreed).to(data.features.device)
    device = data.features.device
    incoming = {name: torch.from_numpy(value.copy()).to(device) for name, value in request.head.arrays.items()}
    best, least, epochs = incoming, _loss(head, incoming, data, check), 0
    local = agreed.manifest.local
    mu = 0.0 if request.mode == "head" else local.proximal_mu or DITTO
    for count in EPOCHS:
        asked = local.model_copy(update={"epochs": count, "proximal_mu": mu})
        limits.check(asked)
        made = _train_alone(head, incoming, data, fit, agreed.task.local(asked, head), agreed, limits.min_batch)
        loss = _loss(head, made, data, check)
        if loss < least:
            best, least, epochs = made, loss, count
    made_head = head_of(agreed).double()
    made_head.assign({name: value.cpu() for name, value in best.items()})
    if agreed.standardisation is not None:
        made_head.fold(*(part.double() for part in agreed.standardisation))
    about = f"trained for {epochs} epochs" if epochs else "the shared head, which training did not improve"
    return MadeHead(made_head, 1.0, f"{about}, by a loss of {least:.3g} a row")


def _train_alone(
    head: Head,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    rows: SiteRows,
    local: LocalConfig,
    agreed: Agreement,
    min_batch: int,
) -> dict[str, Tensor]:
    ((_, trained),) = train_in_chunks(
        head, incoming, data, [rows], local, seed=agreed.manifest.seed, round_number=0, min_batch=min_batch
    )
    return {name: value[0] for name, value in trained.parameters.items()}


def _loss(head: Head, parameters: Mapping[str, Tensor], data: LabelledFeatures, rows: SiteRows) -> float:
    evaluation = evaluate_head(head, parameters, data, [rows])
    loss = float(evaluation.losses[0]) / max(int(evaluation.rows[0]), 1)
    return loss if np.isfinite(loss) else float("inf")


def compare_heads(
    personal: Tensor,
    predicted: Tensor,
    rows: Tensor,
    data: LabelledFeatures,
    agreed: Agreement,
    stats: FeatureStatistics,
) -> Tensor:
    """Count the held-out rows that personal, shared and own heads predict correctly, `[2, 2, 2]`.

    Args:
        personal: `[n]`, the personal model's predictions.
        predicted: `[n]`, the shared head's predictions.
        rows: `[n]`, the held-out rows.
        data: the site's features.
        agreed: the run's agreement with the site.
        stats: the site's training sums, from which its own head is solved.
    """
    priors = stats.counts + torch.full((stats.num_classes,), 1.0 / stats.num_classes, dtype=torch.float64)
    own = head_under(stats, priors) if stats.rows else LinearHead(stats.num_features, stats.num_classes).double()
    project = projection_for(agreed.num_features, agreed.manifest.seed)
    own = own if project is None else project.widen(own)
    features = data.exact(rows).double()
    labels = data.labels[rows].cpu()
    with torch.inference_mode():
        return joint_counts([personal, predicted, own(features).argmax(1)], labels)


def personalise(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Make each site's personal head, keep it there, and compare it on the site's held-out rows."""
    agreed = agreement(context)
    request = PersonalRequest.from_payload(payload, agreed, sites)
    ready = prepare(sites, agreed, request.head)
    for positions in shared(sites, merged):
        sums = ComparisonSums.zeros()
        for position in positions:
            site, holding = sites[position], ready.holdings[position]
            own = own_statistics(holding, ready.data, agreed)
            rows = torch.from_numpy(holding.held_out.rows)
            if request.family is not None:
                personal = own_outputs([site], agreed, request.family)[0].argmax(1)
                tuned, tail = personal_model(site, agreed, request.family)
                site.keep_head(agreed.manifest, tuned, 1.0, "with adapters of its own", tail)
            else:
                made = make_personal(holding, ready.data, agreed, request, site.training, own)
                with torch.inference_mode():
                    personal = made.head.double()(ready.data.exact(rows).double()).argmax(1)
                head = behind(agreed.mapping, made.head.float())
                site.keep_head(agreed.manifest, head, made.temperature, made.about)
            outputs, _ = outputs_of(holding.held_out.rows, ready, agreed)
            joint = compare_heads(personal, outputs.argmax(1), rows, ready.data, agreed, own[0])
            sums += ComparisonSums(joint.numpy())
        yield Answer(positions, of_several(sums.to_arrays(), len(positions)), agreed.manifest, ("train", "held_out"))
