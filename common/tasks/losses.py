"""Losses of outputs against targets: (binary) cross entropy, squared error, ranked probability and hazards."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from fedhead.sums.paired import MOST_LOSS


class Loss(ABC):
    """A loss of outputs against targets, per row, with the per-row term of the task's score."""

    @abstractmethod
    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `[..., n]`, each row's loss at outputs `[..., n, C]`."""

    @abstractmethod
    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return values `[..., n]` and gradients `[..., C, n]` at outputs `[..., C, n]`: columns before rows."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `[..., n]`, each row's term of the score at outputs `[..., n, C]`, such as 1 for a correct row."""

    def at(self, sites: Tensor) -> "Loss":
        """Return the loss at some of the sites that it was made for, given by their positions."""
        return self


LEAST_ROWS = 0.5
"""Rows that count for a class without any, so that its share has a logarithm."""


class AnswerLoss(Loss):
    """The loss of a language model on the answers of a conversation: outputs are `[..., n, 3]`, and have no targets.

    The first is their summed negative log-likelihood, limited to `MOST_LOSS` for a token, and the score is the second,
    the number of tokens.

    Args:
        tokens: the number of tokens of an answer that a loss is divided by, the same for all conversations of a site;
            `[S, 1]` for several sites.
    """

    def __init__(self, tokens: Tensor | float = 1.0) -> None:
        self.tokens = tokens

    def at(self, sites: Tensor) -> Loss:
        return AnswerLoss(self.tokens[sites]) if isinstance(self.tokens, Tensor) else self

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        most = MOST_LOSS * outputs[..., 1]
        # A version that diverged is a bad one, and not a broken reply.
        return torch.where(outputs[..., 0].isnan(), most, outputs[..., 0].minimum(most)) / self.tokens

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        slopes = torch.zeros_like(outputs)
        slopes[..., 0, :] = 1 / self.tokens
        return self.values(outputs.mT, targets), slopes

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[..., 1]


class Adjusted(Loss):
    """A loss of outputs plus offsets `[C]`, for training under label skew (Menon et al., ICLR 2021).

    With the logarithms of a site's class shares over the pooled shares as offsets, a site does not learn its own class
    shares, and outputs keep their meaning under the pooled ones.

    Args:
        loss: of classes.
        offsets: `[S, 1, C]`, for each site.
    """

    def __init__(self, loss: Loss, offsets: Tensor) -> None:
        self.loss = loss
        self.offsets = offsets

    def at(self, sites: Tensor) -> Loss:
        return Adjusted(self.loss, self.offsets[sites])

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss.values(outputs + self.offsets.to(outputs), targets)

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss.slopes(outputs + self.offsets.to(outputs).mT, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss.score(outputs, targets)


class CrossEntropy(Loss):
    """Softmax cross entropy, for rows with exactly one class: targets are class numbers `[..., n]`, int64."""

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # Softmax minus one-hot; torch's softmax over a short dimension is fast only if it is the first.
        logs = torch.log_softmax(outputs.movedim(-2, 0), 0)
        targets = targets.unsqueeze(0)
        values = logs.gather(0, targets).squeeze(0).neg_()
        slopes = logs.exp_().scatter_add_(0, targets, logs.new_full((1,), -1.0).expand_as(targets))
        return values, slopes.movedim(0, -2)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(-1) == targets


class TagCrossEntropy(CrossEntropy):
    """Softmax cross entropy of rows in sequences: targets are `[..., n, 3]`, first the class number."""

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().values(outputs, targets[..., 0])

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return super().slopes(outputs, targets[..., 0])

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().score(outputs, targets[..., 0])


class BinaryCrossEntropy(Loss):
    """Binary cross entropy with a sigmoid per class, averaged over classes: targets are `[..., n, C]`, 0 and 1.

    A row is correct if all its labels are: if exactly the outputs of its classes are above 0.
    """

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="none").mean(-1)

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wanted = targets.mT.to(outputs)
        values = functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(-2)
        return values, outputs.sigmoid().sub_(wanted).div_(outputs.shape[-2])

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs > 0) == (targets == 1)).all(-1)


class SquaredError(Loss):
    """Half the squared error, averaged over targets: targets are `[..., n, C]`, real.

    The score is the loss of predicting 0, the mean of standardised targets: `1 - loss / score` is R2.
    """

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean(-1) / 2

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        residuals = outputs - targets.mT
        return residuals.square().mean(-2) / 2, residuals.div_(outputs.shape[-2])

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets.square().mean(-1) / 2


class RankedProbability(Loss):
    """The ranked probability score of ordered classes (Epstein, Journal of Applied Meteorology, 1969).

    The squared error of the cumulative probabilities `P(y > k)`, averaged over `k`; outputs `[..., n, C]` estimate the
    classes' probabilities, and targets are class numbers `[..., n]`, int64. A row is correct if its median class is.
    """

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._errors(outputs, targets).square().mean(-1)

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        errors = self._errors(outputs.mT, targets)
        steps = (2 / errors.shape[-1]) * errors.cumsum(-1)
        # The lowest class is in no cumulative probability.
        return errors.square().mean(-1), torch.cat([torch.zeros_like(steps[..., :1]), steps], -1).mT

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (self._above(outputs) > 0.5).sum(-1) == targets

    def _errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `[..., n, C - 1]`, the cumulative probabilities minus their targets."""
        above = self._above(outputs)
        return above - (targets.unsqueeze(-1) > torch.arange(above.shape[-1], device=targets.device)).to(above)

    def _above(self, outputs: Tensor) -> Tensor:
        return outputs.flip(-1).cumsum(-1).flip(-1)[..., 1:]


class HazardLikelihood(Loss):
    """The negative log-likelihood of hazards in `B` time bins, averaged over bins.

    The first `B` of `2 B` outputs are logits of the hazards; the others have no effect. Targets are `[..., n, 2 B]` of
    0 and 1: the bin of the event, then the bins at risk. The score is the loss of hazards of one half.
    """

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, event, risk = self._parts(outputs, targets)
        losses = functional.binary_cross_entropy_with_logits(logits, event, reduction="none") * risk
        return losses.mean(-1)

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, event, risk = self._parts(outputs.mT, targets)
        values = functional.binary_cross_entropy_with_logits(logits, event, reduction="none") * risk
        slopes = (logits.sigmoid() - event) * risk / logits.shape[-1]
        return values.mean(-1), torch.cat([slopes, torch.zeros_like(slopes)], -1).mT

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        bins = outputs.shape[-1] // 2
        return targets[..., bins:].to(outputs).mean(-1) * math.log(2)

    def _parts(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bins = outputs.shape[-1] // 2
        marks = targets.to(outputs)
        return outputs[..., :bins], marks[..., :bins], marks[..., bins:]


class ShareCrossEntropy(Loss):
    """Softmax cross entropy against shares of classes: targets are `[..., n, C]` and sum to 1.

    A row is correct if the class with the largest share has the largest output.
    """

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -(functional.log_softmax(outputs, -1) * targets.to(outputs)).sum(-1)

    def slopes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logs = functional.log_softmax(outputs, dim=-2)
        wanted = targets.mT.to(outputs)
        return -(logs * wanted).sum(-2), logs.exp() - wanted

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(-1) == targets.argmax(-1)
