"""Pooled L-BFGS: logistic regression in few exchanges, by full gradients summed over all sites.

A Flower strategy whose sites return gradients instead of trained heads. Their sum is the gradient on all rows pooled,
so the head does not depend on how rows are split over sites.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedhead.protocol.actions import GRADIENT
from fedhead.sums.features import FeatureStatistics

FloatArray = npt.NDArray[np.float64]

NAME = "pooled-lbfgs"

_ARMIJO = 1e-4
_CURVATURE = 0.5
"""Bound on the second derivatives of softmax cross entropy by the logits (Böhning, 1992)."""
_NOISE = 1e-7
"""Relative differences between losses that rounding a head to float32 causes."""


@dataclass(frozen=True, eq=False)
class GramPreconditioner:
    """The inverse of an upper bound on the Hessian of a linear head's mean loss on standardised features.

    The Hessian of softmax cross entropy, `sum_i (diag(p_i) - p_i p_i^T) (x) x_i x_i^T / N`, is at most `1/2 I (x) G`
    (Böhning, 1992), with `G` the correlation matrix. So a step is never too long, and features that correlate do not
    slow it down.

    Attributes:
        factor: `[d, d]`, the Cholesky factor of `1/2 G + ridge I`.
    """

    factor: Tensor

    @classmethod
    def from_statistics(cls, stats: FeatureStatistics, scale: Tensor, penalty: float) -> "GramPreconditioner":
        """Factorise the pooled scatter.

        Args:
            stats: of `d` features.
            scale: `[d]`, by which features are divided in training.
            penalty: of the sum of squared weights.
        """
        hessian = stats.scatter() * (_CURVATURE / stats.rows) / scale / scale[:, None]
        # Constant features have a scale of 1 and gradients of 0; the ridge keeps the matrix definite.
        hessian.diagonal().add_(penalty / stats.rows + 1e-6 * _CURVATURE)
        return cls(torch.linalg.cholesky(hessian))

    def apply(self, weight: FloatArray) -> FloatArray:
        """Return the inverse times a gradient `[C, d]`."""
        solved: FloatArray = torch.cholesky_solve(torch.from_numpy(weight.T.copy()), self.factor).T.numpy()
        return solved


class PooledLBFGS(Strategy):
    """L-BFGS (Liu & Nocedal, 1989) on the mean loss of all rows, plus `penalty / (2 N) |W|^2`.

    Each round is one exchange: the sites return loss and gradient at the head that they receive. If the loss has
    decreased enough (Armijo's rule), the next head is a quasi-Newton step away; otherwise the step is shortened by
    interpolation. With `penalty = 1`, the minimum is that of `sklearn.linear_model.LogisticRegression(C=1)` on
    standardised features. Biases are not penalised.

    Losses of different sites cannot be compared: if the number of rows changes, the memory is cleared.

    Args:
        penalty: of the squared weights, at least 0.
        memory: the number of pairs of steps and changes of the gradient, at least 1.

    Raises:
        ValueError: if a parameter is out of range.
    """

    def __init__(self, penalty: float = 1.0, memory: int = 10) -> None:
        if not 0 <= penalty < np.inf:
            raise ValueError(f"penalty must be 0 or more, not {penalty}")
        if memory < 1:
            raise ValueError(f"memory must be 1 or more, not {memory}")
        self.penalty = float(penalty)
        self.memory = memory
        self.preconditioner: GramPreconditioner | None = None
        self.asked: FloatArray | None = None
        self.rows = 0
        self.loss = np.inf
        self.point: FloatArray | None = None
        self.gradient: FloatArray | None = None
        self.direction: FloatArray | None = None
        self.length = 1.0
        self.steps: list[FloatArray] = []
        self.changes: list[FloatArray] = []

    def summary(self) -> None:
        """Log nothing: the run logs its own settings."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every site for the gradient at `arrays`."""
        record = RecordDict({"arrays": arrays, "config": config})
        self.asked = _flat(arrays)
        return [Message(record, node, GRADIENT) for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next head, from the mean gradients of groups of rows."""
        gradients, losses, counts = [], [], []
        form: ArrayRecord | None = None
        for reply in replies:
            form, metrics = reply.content.array_records["arrays"], reply.content.metric_records["metrics"]
            gradients.append(_flat(form))
            losses.append(float(str(metrics["train_loss"])))
            counts.append(int(str(metrics["num-examples"])))
        if form is None or self.asked is None or not sum(counts):
            return None, None
        shares = np.array(counts, np.float64) / sum(counts)
        weights = form["weight"].numpy().shape
        made = self._next(self.asked, float(shares @ losses), shares @ np.array(gradients), sum(counts), weights)
        return _unflat(made, form), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nothing: gradients come with an evaluation."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregate nothing."""
        return None

    def _next(
        self, asked: FloatArray, loss: float, gradient: FloatArray, rows: int, shape: tuple[int, ...]
    ) -> FloatArray:
        """Return the next head to ask for, all parameters in one vector, weights before biases.

        Args:
            asked: the head that loss and gradient are of.
            loss: the mean over rows.
            gradient: its gradient.
            rows: the number of rows.
            shape: of the weights.
        """
        weights = np.where(np.arange(len(asked)) < shape[0] * shape[1], asked, 0.0)
        loss += self.penalty / (2 * rows) * float(weights @ weights)
        gradient = gradient + self.penalty / rows * weights
        if rows != self.rows:
            self._forget()
            self.rows, self.point = rows, None
        if self.point is not None and self.gradient is not None and self.direction is not None:
            step = asked - self.point
            slope = float(self.gradient @ step)
            rise = loss - self.loss
            if rise > _ARMIJO * slope + _NOISE * abs(self.loss):
                # The minimum of the parabola through both losses and the slope.
                self.length *= float(np.clip(-slope / (2 * (rise - slope)), 0.1, 0.5))
                return self.point + self.length * self.direction
            self._remember(step, gradient - self.gradient)
        self.point, self.loss, self.gradient, self.length = asked, loss, gradient, 1.0
        self.direction = -self._inverse(gradient, shape)
        if float(self.direction @ gradient) > 0:
            self._forget()
            self.direction = -self._inverse(gradient, shape)
        return self.point + self.direction

    def _forget(self) -> None:
        self.steps, self.changes = [], []

    def _remember(self, step: FloatArray, change: FloatArray) -> None:
        if float(step @ change) > 1e-10 * float(np.linalg.norm(step) * np.linalg.norm(change)):
            self.steps = [*self.steps, step][-self.memory :]
            self.changes = [*self.changes, change][-self.memory :]

    def _inverse(self, gradient: FloatArray, shape: tuple[int, ...]) -> FloatArray:
        """Return the approximate inverse Hessian times a vector (two-loop recursion; Nocedal, 1980)."""
        vector, factors = gradient.copy(), []
        for step, change in zip(reversed(self.steps), reversed(self.changes), strict=True):
            factors.append(float(step @ vector) / float(step @ change))
            vector -= factors[-1] * change
        made = self._precondition(vector, shape)
        if self.steps:
            step, change = self.steps[-1], self.changes[-1]
            made *= float(step @ change) / float(change @ self._precondition(change, shape))
        for step, change, factor in zip(self.steps, self.changes, reversed(factors), strict=True):
            made += (factor - float(change @ made) / float(step @ change)) * step
        return made

    def _precondition(self, vector: FloatArray, shape: tuple[int, ...]) -> FloatArray:
        """Return the inverse of the bound on the Hessian times a vector; of standardised features, without a Gram."""
        size = shape[0] * shape[1]
        weight, bias = vector[:size].reshape(shape), vector[size:]
        bound = _CURVATURE if self.preconditioner is not None else _CURVATURE * (shape[1] + 1)
        solved = weight / bound if self.preconditioner is None else self.preconditioner.apply(weight)
        return np.concatenate([solved.ravel(), bias / bound])


def _flat(arrays: ArrayRecord) -> FloatArray:
    parts: list[FloatArray] = [arrays[name].numpy().astype(np.float64).ravel() for name in ("weight", "bias")]
    return np.concatenate(parts)


def _unflat(vector: FloatArray, like: ArrayRecord) -> ArrayRecord:
    parts, start = {}, 0
    for name in ("weight", "bias"):
        shape = like[name].numpy().shape
        stop = start + int(np.prod(shape))
        parts[name] = Array(vector[start:stop].reshape(shape))
        start = stop
    return ArrayRecord(parts)
