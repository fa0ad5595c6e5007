"""Objectives on which a tail trains in place of the task's loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fedhead.heads.views import view_of

if TYPE_CHECKING:
    from fedhead.heads.tail import TunedHead

CONTRAST_TEMPERATURE = 0.1
"""Divisor of cosines in supervised contrast, as in its paper."""


class Judged(NamedTuple):
    """An objective on a minibatch.

    Attributes:
        loss: a scalar.
        features: `[n, d]`, the standardised features of the rows as they are, detached, for the head.
    """

    loss: Tensor
    features: Tensor


class Objective(ABC):
    """An objective of a tail. Its own parameters train with the tail and travel with it, and are not delivered."""

    takes_tokens: ClassVar[bool] = False
    """Whether activations have the texts' token ids as one more last column, after the mask."""

    def trainable(self) -> dict[str, Tensor]:
        """Return its own parameters, with their initial values."""
        return {}

    @abstractmethod
    def judge(
        self,
        head: "TunedHead",
        parameters: Mapping[str, Tensor],
        activations: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Judged:
        """Return the mean loss of a minibatch at one site.

        Args:
            head: gives features of activations.
            parameters: of head, tail and objective, under their names on the wire.
            activations: `[n, *shape]`.
            targets: `[n]` or `[n, C]`.
            generator: on the CPU, for random draws.
        """


class SupervisedContrast(Objective):
    """Rows of a class attract each other, and repel all others (Khosla et al., NeurIPS 2020).

    The standardised features of the rows themselves are compared, without a projection: the head is solved from them.
    """

    def judge(
        self,
        head: "TunedHead",
        parameters: Mapping[str, Tensor],
        activations: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Judged:
        rows = head.embed(parameters, activations)
        return Judged(supervised_contrast(rows, targets), rows.detach())


class ViewAgreement(Objective):
    """Two views of a row predict each other (SimSiam; Chen & He, CVPR 2021). It uses no labels.

    Views are of stored activations. Features and the hidden layer of the predictor are standardised in each minibatch,
    as the paper's batch norms do, without their scales and shifts; there is no projection before the predictor.

    Args:
        width: `d`.
        seed: of the predictor.
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        hidden = max(1, width // 4)
        generator = torch.Generator().manual_seed(seed)
        self._own = {
            "predictor.first.weight": torch.randn(hidden, width, generator=generator) * width**-0.5,
            "predictor.second.weight": torch.randn(width, hidden, generator=generator) * hidden**-0.5,
            "predictor.second.bias": torch.zeros(width),
        }

    def trainable(self) -> dict[str, Tensor]:
        return dict(self._own)

    def judge(
        self,
        head: "TunedHead",
        parameters: Mapping[str, Tensor],
        activations: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Judged:
        views = [view_of(activations, generator, sequences=head.sequences) for _ in range(2)]
        with torch.no_grad():
            plain = head.embed(parameters, activations)
        if len(activations) == 1:
            # A single row cannot be standardised among others.
            return Judged(plain.new_zeros(()).requires_grad_(), plain)
        first, second = (batch_standardised(head.features(parameters, view)) for view in views)
        predicted = [predict(parameters, rows) for rows in (first, second)]
        return Judged(view_disagreement(first, second, *predicted), plain)


def batch_standardised(rows: Tensor) -> Tensor:
    """Return rows `[n, d]` with mean 0 and variance 1 in each column, as a batch norm without scale and shift."""
    return functional.batch_norm(rows, None, None, training=True)


def predict(parameters: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Return the prediction of another view of rows `[n, d]`."""
    weights = {name.removeprefix("objective.predictor."): value for name, value in parameters.items()}
    hidden = functional.relu(batch_standardised(rows @ weights["first.weight"].mT))
    return functional.linear(hidden, weights["second.weight"], weights["second.bias"])


def view_disagreement(first: Tensor, second: Tensor, from_first: Tensor, from_second: Tensor) -> Tensor:
    """Return one minus the mean cosine between predictions and the views that they predict, which have no gradient.

    Args:
        first: `[n, d]`, features of one view.
        second: of another one.
        from_first: prediction of `second`.
        from_second: prediction of `first`.
    """
    cosines = [
        functional.cosine_similarity(from_first, second.detach(), dim=-1),
        functional.cosine_similarity(from_second, first.detach(), dim=-1),
    ]
    return 1 - torch.stack(cosines).mean()


def supervised_contrast(rows: Tensor, labels: Tensor, temperature: float = CONTRAST_TEMPERATURE) -> Tensor:
    """Return the supervised contrastive loss of a batch, the mean over rows that share their class with another one.

    The loss of a row is the mean, over the other rows of its class, of their negative log-probability in a softmax of
    cosines over all other rows (`L_out` of Khosla et al., 2020). It is 0 if no two rows share a class.

    Args:
        rows: `[n, d]`, of any length.
        labels: `[n]`.
        temperature: divides cosines.
    """
    unit = functional.normalize(rows, dim=-1)
    self_pairs = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logs = functional.log_softmax((unit @ unit.mT / temperature).masked_fill(self_pairs, -torch.inf), dim=-1)
    alike = (labels[:, None] == labels) & ~self_pairs
    counts = alike.sum(-1)
    if not bool(counts.any()):
        return rows.sum() * 0
    losses = -logs.masked_fill(~alike, 0).sum(-1) / counts.clamp(min=1)
    return losses[counts > 0].mean()
