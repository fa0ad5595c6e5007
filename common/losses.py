"""What heads are trained to make small: cross entropy, or for multi-label rows binary cross entropy."""

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional


class Loss(ABC):
    """A loss of logits against labels, row by row, and when a row counts as predicted rightly."""

    @abstractmethod
    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `[..., n]`, each row's loss at logits `[..., n, C]`."""

    @abstractmethod
    def slopes(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return values `[..., n]` and gradients `[..., C, n]` at logits `[..., C, n]`: classes before rows."""

    @abstractmethod
    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `[..., n]`, which rows are predicted rightly at logits `[..., n, C]`."""


class CrossEntropy(Loss):
    """Of a softmax, for rows of one class each: labels are class numbers `[..., n]`, int64."""

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")

    def slopes(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # Softmax minus one-hot. torch's softmax over a short last dimension is slow.
        logs = functional.log_softmax(logits, dim=-2)
        labels = labels.unsqueeze(-2)
        values = -logs.gather(-2, labels).squeeze(-2)
        return values, logs.exp_().scatter_add_(-2, labels, logs.new_full((1,), -1.0).expand_as(labels))

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(-1) == labels


class BinaryCrossEntropy(Loss):
    """Of a sigmoid per class, the mean over classes: labels are `[..., n, C]`, int64 of 0 and 1.

    A row is right if all its labels are: if just the logits of the classes it has are above 0.
    """

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(-1)

    def slopes(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        targets = labels.mT.to(logits)
        values = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-2)
        return values, logits.sigmoid().sub_(targets).div_(logits.shape[-2])

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits > 0) == (labels == 1)).all(-1)


_CROSS_ENTROPY, _BINARY_CROSS_ENTROPY = CrossEntropy(), BinaryCrossEntropy()


def loss_for(logits: Tensor, labels: Tensor) -> Loss:
    """Return the loss of rows labelled so: binary where labels have a dimension of classes, as logits do."""
    return _BINARY_CROSS_ENTROPY if labels.ndim == logits.ndim else _CROSS_ENTROPY
