"""Rows of sites as a tail sees them: activations at the boundary instead of features."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fedhead.backbones.objectives import Cut
from fedhead.backbones.split import Tail
from fedhead.client.agreement import Agreement, head_of
from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.data import IntArray, Samples
from fedhead.errors import FedheadError
from fedhead.features.activations import Activations, open_activations
from fedhead.features.boundary import BoundaryStore
from fedhead.features.tokens import TokenStore
from fedhead.heads import ObjectiveHead, TunedHead
from fedhead.heads.objectives import Objective
from fedhead.heads.tail import OBJECTIVE, TAIL
from fedhead.protocol.messages import check_arrays
from fedhead.sums.sums import Arrays
from fedhead.tasks.losses import LEAST_ROWS, Adjusted, AnswerLoss, Loss
from fedhead.tuning import ActivationsFrom


@dataclass(frozen=True)
class Tuning:
    """What a site needs for tuning: the tail on its device, its activations, and an objective other than the task's."""

    tail: Tail
    store: Activations
    objective: Objective | None = None

    @classmethod
    def open(cls, made: Cut, samples: Samples, rows: IntArray, how: ActivationsFrom = "auto") -> Self:
        """Return the activations of some rows that can be read, extracting missing ones first if they are stored.

        Args:
            made: the backbone cut for tuning.
            samples: the data set.
            rows: `[k]`, ascending.
            how: see `open_activations`.

        Raises:
            FedheadError: if the disk is too small, or the objective needs stored activations.
        """
        trunk, tail = made.split
        if made.objective is None or not made.objective.takes_tokens:
            return cls(tail, open_activations(trunk, tail, samples, rows, how), made.objective)
        if how == "recompute":
            raise FedheadError("The objective 'mlm' needs stored activations: set activations to 'auto' or 'store'.")
        store = TokenStore.open(BoundaryStore.open(trunk, tail, samples, rows), trunk, samples)
        return cls(tail, store, made.objective)

    @cached_property
    def form(self) -> Arrays:
        """The names, shapes and dtype of the tail's parameters on the wire, as arrays without memory of their own."""
        return _form(TAIL, self.tail.shared())

    @cached_property
    def own_form(self) -> Arrays:
        """The same of the tail's parameters that stay at the site."""
        shared = self.tail.shared()
        return _form(TAIL, {name: one for name, one in self.tail.trainable().items() if name not in shared})

    @cached_property
    def objective_form(self) -> Arrays:
        """The same of the objective's own parameters."""
        return _form(OBJECTIVE, self.objective.trainable()) if self.objective is not None else {}


def _form(prefix: str, parameters: Mapping[str, Tensor]) -> Arrays:
    return {f"{prefix}{name}": np.broadcast_to(np.float32(0), value.shape) for name, value in parameters.items()}


@dataclass(frozen=True)
class FeatureRows:
    """Features of the frozen backbone in place of activations, for a head that trains alone."""

    values: Tensor
    sequences: ClassVar[bool] = False

    @property
    def device(self) -> torch.device:
        """The device of the features."""
        return self.values.device

    def take(self, rows: IntArray) -> Tensor:
        """Return the features `[n, d]` of rows `[n]`."""
        return self.values.index_select(0, torch.from_numpy(rows).to(self.values.device))


@dataclass(frozen=True)
class LabelledActivations(LabelledFeatures):
    """Activations and labels; `gather` returns activations, and `exact` the features that a tail gives.

    Attributes:
        store: the activations of all rows.
        shares: `[C]`, each class's share of all sites' rows, for adjusting logits; None for no adjustment.
        head: gives features by `parameters`; None if only activations are wanted.
        parameters: of the tail.
    """

    store: Activations = field(kw_only=True)
    shares: Tensor | None = None
    head: TunedHead | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def gather(self, rows: IntArray, like: Tensor) -> tuple[Tensor, Tensor]:
        activations = self.store.take(rows.ravel()).to(like)
        labels = self.targets(torch.from_numpy(rows.ravel()), like)
        return activations.view(*rows.shape, *activations.shape[1:]), labels.view(*rows.shape, *labels.shape[1:])

    def exact(self, rows: Tensor) -> Tensor:
        assert self.head is not None
        with torch.inference_mode():
            parts = [
                self.head.features(self.parameters, self.store.take(some.numpy())).cpu()
                for some in torch.split(rows, self.head.most_rows)
            ]
        return torch.cat(parts) if parts else torch.empty(0, self.head.num_features)

    def loss_at(self, sites: Sequence[SiteRows]) -> Loss:
        if isinstance(self.loss, AnswerLoss):
            device = self.features.device
            tokens = [self.features[torch.from_numpy(site.rows).to(device), 1] for site in sites]
            return AnswerLoss(torch.stack([one.mean().nan_to_num().clamp(min=1) for one in tokens])[:, None])
        if self.shares is None:
            return self.loss
        return Adjusted(self.loss, torch.stack([self._offsets(site, self.shares) for site in sites])[:, None])

    def _offsets(self, site: SiteRows, shares: Tensor) -> Tensor:
        """Return `[C]`, the logarithms of a site's class shares over those of all sites."""
        labels = self.labels[torch.from_numpy(site.rows).to(self.labels.device)]
        counts = torch.bincount(labels, minlength=len(shares)).clamp(min=LEAST_ROWS).double().cpu()
        offsets = (counts / max(len(labels), 1)).log() - shares.double().log()
        return offsets.float().to(self.labels.device)


class NoLayers:
    """A tail without layers: it returns features as they are."""

    depths: ClassVar[Mapping[str, int]] = {}
    takes_sites: ClassVar[bool] = False

    def trainable(self) -> dict[str, Tensor]:
        """Return no parameters."""
        return {}

    def run(self, parameters: Mapping[str, Tensor], values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features."""
        return values


def tuned_head(agreed: Agreement, tuning: Tuning, names: Collection[str] | None = None) -> TunedHead:
    """Build the run's head on its tail, of which the named parameters train; all by default."""
    make = TunedHead if tuning.objective is None else partial(ObjectiveHead, tuning.objective)
    head = make(
        tuning.tail,
        head_of(agreed),
        agreed.standardisation,
        sequences=tuning.store.sequences,
        mixed=agreed.manifest.mixed,
        names=names,
        decay=agreed.manifest.decay,
    )
    head.curved = agreed.curved
    return head


def lone_head(data: LabelledFeatures, agreed: Agreement) -> tuple[TunedHead, LabelledActivations]:
    """Build the run's head for a stage in which it trains alone, with the features of some rows."""
    made = TunedHead(NoLayers(), head_of(agreed), agreed.standardisation, mixed=agreed.manifest.mixed)
    return made, _labelled(data, agreed, FeatureRows(data.features))


def activations_of(data: LabelledFeatures, agreed: Agreement, tuning: Tuning) -> LabelledActivations:
    """Return the activations in place of the features of some rows."""
    return _labelled(data, agreed, tuning.store)


def _labelled(data: LabelledFeatures, agreed: Agreement, store: Activations) -> LabelledActivations:
    return LabelledActivations(
        data.features,
        data.labels,
        loss=data.loss,
        target_standardisation=agreed.target_standardisation,
        store=store,
        shares=agreed.shares,
    )


def tuned_rows(data: LabelledFeatures, agreed: Agreement, tuning: Tuning, arrays: Arrays) -> LabelledActivations:
    """Return rows whose features are those of a tail with the parameters that arrived.

    Raises:
        MessageError: if they are not of the run's tail.
    """
    check_arrays(arrays, tuning.form)
    head = tuned_head(agreed, tuning)
    device = tuning.store.device
    parameters = {name: torch.from_numpy(np.array(value)).to(device) for name, value in arrays.items()}
    return replace(activations_of(data, agreed, tuning), head=head, parameters=parameters)
