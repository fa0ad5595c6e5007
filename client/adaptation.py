"""The proof of adaptations: heads adapted to a site's rows as if these had no labels, compared on its held-out rows."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self

import numpy as np
import torch
from flwr.app import Context
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedhead.backbones.identity import flags_of
from fedhead.client.agreement import Agreement, agreement
from fedhead.client.answers import Answer, of_several, shared
from fedhead.client.personal import own_statistics
from fedhead.client.site_data import Holding, Site
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.fields import wrong_fields
from fedhead.protocol.messages import MessageError, Payload
from fedhead.solvers.adaptation import METHODS, Solver, SolverName, adapted_heads
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import FloatArray
from fedhead.sums.projection import projection_for
from fedhead.sums.rivals import RivalSums

logger = logging.getLogger(__name__)

MOST_FEATURES = 2048
"""Widest features with adaptations, which decompose their covariance at every site."""

Temperature = Annotated[float, Field(gt=1e-6, lt=1e6)]


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    solver: SolverName
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=len(METHODS), max_length=len(METHODS))]


@dataclass(frozen=True, eq=False)
class AdaptationRequest:
    """The pooled training sums, from which a site subtracts its own.

    Attributes:
        pooled: sums over all sites' training rows.
        solver: of the heads.
        temperatures: one for each of `METHODS`, by which logits are divided before their losses are multiplied.
    """

    pooled: FeatureStatistics
    solver: SolverName
    temperatures: FloatArray

    @classmethod
    def from_payload(cls, payload: Payload, agreed: Agreement) -> Self:
        """Read and validate a received request.

        Raises:
            MessageError: if it has another form, or the run's heads are not adapted.
        """
        width = len(agreed.origin)
        if not agreed.task.compares_classes or width > MOST_FEATURES:
            raise MessageError(f"only classifiers on {MOST_FEATURES} features or fewer are adapted")
        try:
            values = _Values.model_validate(payload.values)
            pooled = FeatureStatistics.from_arrays(payload.arrays, agreed.task.statistics(width, agreed.origin))
        except ValidationError as error:
            raise MessageError(f"its values are invalid ({wrong_fields(error)})") from None
        except ValueError as error:
            raise MessageError(str(error)) from None
        return cls(pooled, values.solver, np.array(values.temperatures))


def adapt(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Adapt heads solved without a site's rows to its training rows, without their labels, and compare them there."""
    agreed = agreement(context)
    request = AdaptationRequest.from_payload(payload, agreed)
    for positions in shared(sites, merged):
        sums = RivalSums.zeros(len(METHODS))
        for position in positions:
            sums += compare_adapted(sites[position].open(agreed.manifest), agreed, request)
        yield Answer(positions, of_several(sums.to_arrays(), len(positions)), agreed.manifest, ("train", "held_out"))


def compare_adapted(holding: Holding, agreed: Agreement, request: AdaptationRequest) -> RivalSums:
    """Return the losses of all adapted heads on a site's held-out rows; over no rows if it has too few.

    Raises:
        FedheadError: if the pooled sums cannot include the site's.
    """
    data = replace(holding.data, mapping=agreed.mapping)
    own, features, _ = own_statistics(holding, data, agreed)
    held = torch.from_numpy(holding.held_out.rows)
    nothing = RivalSums.zeros(len(METHODS))
    if not own.rows or not len(held):
        return nothing
    project = projection_for(agreed.num_features, agreed.manifest.seed)
    try:
        others = request.pooled - own
        solver = Solver(request.solver, flags_of(agreed.manifest.backbone) if agreed.mapping is None else ())
        heads = adapted_heads(others, features, solver, float(request.temperatures[0]))
    except UserError as error:
        logger.warning("No head is adapted here, because the other sites' rows determine none: %s", error)
        return nothing
    except ValueError:
        raise FedheadError("The pooled sums have fewer rows than this site alone.") from None
    rows = data.exact(held).double()
    rows = rows if project is None else project(rows)
    targets = data.labels[held].cpu()
    with torch.inference_mode():
        logits = [head(rows) for head in heads.values()]
    right = np.stack([(one.argmax(1) == targets).numpy() for one in logits])
    return RivalSums.from_logits(logits, targets, right, request.temperatures)
