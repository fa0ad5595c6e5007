"""Metrics of language models from sums: the loss of a token of an answer, and perplexity, with intervals."""

import math
from dataclasses import dataclass
from typing import Any

from fedhead.evaluation.metrics import Estimate, as_json
from fedhead.sums.generation import GenerationSums

_Z = 1.959963984540054
_NONE = "There are no held-out conversations."


@dataclass(frozen=True)
class GenerationReport:
    """Metrics of a language model on the conversations of one site, or of all sites pooled.

    Attributes:
        rows: the number of conversations.
        tokens: of their answers.
        cut: the number of conversations that were longer than the model takes.
        loss: the mean negative log-likelihood of a token in nats; None without tokens.
        perplexity: its exponential.
    """

    rows: int
    tokens: int
    cut: int
    loss: float | None
    perplexity: Estimate

    @property
    def score(self) -> Estimate:
        """Perplexity; less is better."""
        return self.perplexity

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: the estimate as `[value, low, high]`, with a reason if it is null."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "cut": self.cut,
            "loss": self.loss,
            **as_json({"perplexity": self.perplexity}),
        }


def generation_report(sums: GenerationSums) -> GenerationReport:
    """Compute metrics from the sums of one site, or of several added."""
    loss = sums.loss_sum / sums.tokens if sums.tokens else None
    return GenerationReport(sums.rows, sums.tokens, sums.cut, loss, perplexity(sums))


def perplexity(sums: GenerationSums) -> Estimate:
    """Return the exponential of the mean loss of a token.

    Conversations and not tokens are independent: the interval is that of a ratio of two means over conversations
    (Cochran, Sampling Techniques, 1977, chapter 6).
    """
    if not sums.tokens:
        return Estimate.undefined(_NONE)
    mean = sums.loss_sum / sums.tokens
    value = math.exp(mean)
    if sums.rows < 2:
        return Estimate(value, None, None)
    squares = sums.loss_squares - 2 * mean * sums.products + mean**2 * sums.token_squares
    error = math.sqrt(max(squares, 0.0) * sums.rows / (sums.rows - 1)) / sums.tokens
    return Estimate(value, math.exp(max(mean - _Z * error, 0.0)), math.exp(min(mean + _Z * error, 700.0)))
