"""Sums over conversations of the losses of their answers, for perplexity with an interval."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.paired import MOST_LOSS
from fedhead.sums.sums import Arrays, added, check_form

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]

_LARGEST = 1e30
_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class GenerationSums:
    """Sums of one language model over conversations; they add across sites.

    Attributes:
        rows: the number of conversations.
        tokens: of their answers.
        cut: the number of conversations that were longer than the model takes.
        loss_sum: the negative log-likelihood of all answers in nats.
        loss_squares: the sum over conversations of its square.
        token_squares: the same of the number of tokens.
        products: the sum over conversations of loss times tokens.
    """

    rows: int
    tokens: int
    cut: int
    loss_sum: float
    loss_squares: float
    token_squares: float
    products: float

    @classmethod
    def zeros(cls) -> Self:
        """Return the sums over no conversations."""
        return cls(0, 0, 0, 0.0, 0.0, 0.0, 0.0)

    def __add__(self, other: Self) -> Self:
        return added(self, other)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sums by name, for the wire."""
        return {
            "counts": np.array([self.rows, self.tokens, self.cut], np.int64),
            "sums": np.array([self.loss_sum, self.loss_squares, self.token_squares, self.products]),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no conversations can have these sums.
        """
        check_form(arrays, like.to_arrays(), _LARGEST)
        rows, tokens, cut = map(int, arrays["counts"])
        loss, loss_squares, token_squares, products = map(float, arrays["sums"])
        if not 0 <= rows <= tokens < 2**53 or not 0 <= cut <= rows:
            raise ValueError("it counts an impossible number of conversations or tokens")
        slack = 1 + _SLACK
        bounded = 0 <= loss <= MOST_LOSS * tokens * slack and 0 <= products <= MOST_LOSS * token_squares * slack
        # Cauchy-Schwarz: of the sums with their squares, and of each other.
        possible = (
            loss**2 <= rows * loss_squares * slack + _SLACK
            and tokens**2 <= rows * token_squares * slack
            and products**2 <= loss_squares * token_squares * slack + _SLACK
        )
        if min(loss_squares, token_squares) < 0 or not bounded or not possible:
            raise ValueError("its sums contradict each other")
        return cls(rows, tokens, cut, loss, loss_squares, token_squares, products)


def generation_sums(outputs: "Tensor", owners: IntArray, num_sites: int) -> Iterator[GenerationSums]:
    """Sum the conversations of many sites.

    Args:
        outputs: `[n, 3]`, the loss of each conversation's answers, their tokens, and whether it was cut.
        owners: `[n]`, the site of each conversation, below `num_sites`.
        num_sites: `S`.

    Yields:
        The sums of sites `0` to `S - 1`.
    """
    loss, tokens, cut = outputs.detach().cpu().double().numpy().T
    loss = np.nan_to_num(loss, nan=np.inf).clip(0, MOST_LOSS * tokens)
    columns = [np.ones_like(loss), tokens, cut, loss, loss**2, tokens**2, loss * tokens]
    by_site = np.array([np.bincount(owners, weights=one, minlength=num_sites) for one in columns])
    for rows, count, short, *sums in by_site.T.tolist():
        yield GenerationSums(round(rows), round(count), round(short), *sums)
