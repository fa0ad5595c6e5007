"""Screens by magnitude: a reply that outweighs the others by orders of magnitude is left out before it is used.

The bars are wide, since honest sites differ: in rows, classes, scanners and units. They stop a reply that alone would
decide the result, or make it overflow; a lie within them is not noticed. References are medians over sites, the lower
one of an even number, so that they hold as long as fewer than half of the sites lie. Fewer than `LEAST_SITES` sites
have no median: there only absolute bars apply.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from fedhead.sums.evaluation import LARGEST_LOSS
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import EXAMPLES, HELD_OUT, LOSS_SUM, SCORE, TRAIN_LOSS, FloatArray
from fedhead.sums.moments import FeatureMoments
from fedhead.sums.paired import MOST_LOSS as MOST_TOKEN_LOSS
from fedhead.sums.sums import Arrays, Sums

S = TypeVar("S", bound=Sums)

LEAST_SITES = 3
MOST_SQUARES = 1e8
"""Bar on the mean square of a site's features (or targets), as a multiple of the median site's: 10,000 in scale."""
MOST_ROWS, FEW_ROWS = 1e5, 100
"""Bar on a site's rows, as a multiple of the median site's, which counts as `FEW_ROWS` at least."""
MOST_UPDATE = 1e4
"""Bar on the norm of a site's update, as a multiple of the median site's or the head's own, whichever is larger."""
OUTWEIGHS = 100.0
"""An update so many times as large as any other and the head is left out of an aggregate that overflows."""
LARGEST_PARAMETER = 1e9
"""Bar on the parameters that a site sends; features are standardised, and beyond it losses overflow in float32."""
MOST_LOSS = 1e8
"""Bar on a site's loss per row, as a multiple of the median site's, which counts as 1 at least."""
HELD_BYTES = 2**30
"""Sums to hold in memory until most sites have answered; beyond, those at hand are judged by the answers so far."""

_SLACK = 1e-5
"""Least eigenvalue of a correlation matrix that counts as rounding."""


class SumsScreen(Generic[S]):
    """Holds the sums of sites until they can be compared, and then gives those that can be used, in order of arrival.

    Args:
        held_bytes: of sums to hold at once.

    Attributes:
        dropped: the reasons why sites were left out, by name.
    """

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        self.dropped: dict[str, str] = {}
        self._most_bytes = held_bytes
        self._held: list[tuple[str, S]] = []
        self._bytes = 0
        self._rows: dict[str, int] = {}
        self._squares: dict[str, FloatArray] = {}

    def take(self, site: str, sums: S) -> Iterator[tuple[str, S]]:
        """Hold a site's sums; yield those that can be used by now."""
        squares = mean_squares(sums)
        if squares is None:
            yield site, sums
            return
        if sums.rows:
            self._rows[site], self._squares[site] = sums.rows, squares
        self._held.append((site, sums))
        self._bytes += sums.upper.nbytes if isinstance(sums, FeatureStatistics) else 0
        if self._bytes > self._most_bytes and len(self._rows) >= LEAST_SITES:
            yield from self.release()

    def release(self) -> Iterator[tuple[str, S]]:
        """Judge the sums that are held by all that came so far, and yield those that can be used."""
        held, self._held, self._bytes = self._held, [], 0
        outliers = outlying_sums(self._rows, self._squares)
        outliers |= impossible_grams({site: sums for site, sums in held if site not in outliers})
        for site, sums in held:
            if site in outliers:
                self.dropped[site] = outliers[site]
            else:
                yield site, sums


def mean_squares(sums: object) -> FloatArray | None:
    """Return the largest mean square of any feature and of any real target; None of sums that have no such."""
    if isinstance(sums, FeatureStatistics):
        parts = [sums.upper.diagonal(), sums.squares]
    elif isinstance(sums, FeatureMoments):
        parts = [sums.squares]
    else:
        return None
    return np.array([float(part.max()) / max(sums.rows, 1) if len(part) else 0.0 for part in parts])


def outlying_sums(rows: Mapping[str, int], squares: Mapping[str, FloatArray]) -> dict[str, str]:
    """Return the sites whose sums outweigh the others', with the reason.

    Args:
        rows: of each site, at least 1.
        squares: of each site, as `mean_squares` gives them.
    """
    if len(rows) < LEAST_SITES:
        return {}
    found: dict[str, str] = {}
    typical = np.array([_lower_median(column) for column in zip(*squares.values(), strict=True)])
    typical_rows = max(_lower_median(rows.values()), FEW_ROWS)
    for site, values in squares.items():
        for value, usual, name in zip(values, typical, ("features", "targets"), strict=False):
            if 0 < usual * MOST_SQUARES < value:
                times = (value / usual) ** 0.5
                found[site] = (
                    f"its {name} are {times:.0e} times as large as those of the median site; check their units"
                )
        if rows[site] > MOST_ROWS * typical_rows:
            found[site] = f"it sums {rows[site]} rows, and the median site {typical_rows:.0f}"
    return found


def most_rows(claimed: Iterable[int]) -> float:
    """Return the bar on the rows that any reply of a site may count.

    Args:
        claimed: the rows that each site says it has.
    """
    known = [rows for rows in claimed if rows]
    return MOST_ROWS * max(_lower_median(known), FEW_ROWS) if len(known) >= LEAST_SITES else np.inf


def impossible_grams(sums: Mapping[str, object]) -> dict[str, str]:
    """Return the sites whose Gram matrices no rows can have, with the reason, if the sum of all is impossible too.

    So one matrix is factorised where all is well, and that of each site only where not.
    """
    found = [(site, one) for site, one in sums.items() if isinstance(one, FeatureStatistics) and one.rows]
    if not found:
        return {}
    total = found[0][1].copy()
    for _, one in found[1:]:
        total += one
    if _is_possible(total):
        return {}
    reason = "its Gram matrix and its sums contradict each other: some features would have a negative variance"
    return {site: reason for site, one in found if not _is_possible(one)}


def _is_possible(stats: FeatureStatistics) -> bool:
    """Return whether no combination of features has a negative variance, within classes where each row has one."""
    scatter = stats.within_scatter() if stats.kind.exclusive else stats.scatter()
    diagonal = stats.upper.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    correlation = scatter.div_(scale).div_(scale[:, None])
    correlation.diagonal().add_(_SLACK)
    return not int(torch.linalg.cholesky_ex(correlation).info)


def outlying_updates(head: Arrays, replies: Mapping[str, Arrays]) -> dict[str, str]:
    """Return the sites whose trained heads outweigh the others', with the reason.

    Args:
        head: that they trained.
        replies: the trained heads, finite and of its form.
    """
    found: dict[str, str] = {}
    norms: dict[str, float] = {}
    for site, arrays in replies.items():
        largest = max(float(np.abs(array).max(initial=0.0)) for array in arrays.values())
        if largest > LARGEST_PARAMETER:
            found[site] = f"its head has a parameter of {largest:.0e}; a smaller learning rate may help"
        norms[site] = _norm(_update(head, arrays))
    if len(norms) < LEAST_SITES:
        return found
    usual = max(_lower_median(norms.values()), _norm(head))
    for site, norm in norms.items():
        if site not in found and 0 < usual * MOST_UPDATE < norm:
            found[site] = f"its update is {norm / usual:.0e} times as large as the head or the median site's update"
    return found


def heaviest(head: Arrays, replies: Sequence[Arrays]) -> int | None:
    """Return which of the trained heads outweighs all others `OUTWEIGHS` times; None if none does.

    Args:
        head: that they trained.
        replies: the trained heads, at least one.
    """
    norms = [_norm(_update(head, arrays)) for arrays in replies]
    largest = int(np.argmax(norms))
    others = norms[:largest] + norms[largest + 1 :]
    return largest if others and norms[largest] > OUTWEIGHS * max(*others, _norm(head), 0.0) else None


def outlying_losses(metrics: Mapping[str, FloatArray]) -> dict[str, str]:
    """Return the sites that report losses beyond all others', with the reason.

    Args:
        metrics: `[len(METRICS)]` of each site.
    """
    found: dict[str, str] = {}
    for name, loss_of in _LOSSES.items():
        losses = {site: loss for site, row in metrics.items() if (loss := loss_of(row)) is not None}
        usual = max(_lower_median(losses.values()), 1.0) if len(losses) >= LEAST_SITES else np.inf
        bar = min(LARGEST_LOSS, MOST_LOSS * usual)
        found |= {site: f"its {name} loss is {loss:.0e} a row" for site, loss in losses.items() if loss > bar}
    return found


def impossible_answers(answers: Mapping[str, tuple[float, float, float]], longest: int) -> dict[str, str]:
    """Return the sites that claim answers which no conversations can have, with the reason.

    A site weighs in perplexity by its tokens, which these bounds limit by its conversations.

    Args:
        answers: of each site the conversations, the tokens of their answers, and the loss of these.
        longest: the limit of tokens of a conversation.
    """
    found: dict[str, str] = {}
    for site, (rows, tokens, loss) in answers.items():
        if not rows <= tokens <= rows * longest:
            found[site] = f"it claims {tokens:.0f} tokens of answers in {rows:.0f} conversations of at most {longest}"
        elif loss > MOST_TOKEN_LOSS * tokens * (1 + _SLACK):
            found[site] = f"its held-out loss is above {MOST_TOKEN_LOSS:.0f} for a token"
    return found


_LOSSES: Mapping[str, Callable[[FloatArray], float | None]] = {
    "training": lambda row: float(row[TRAIN_LOSS]) if row[EXAMPLES] else None,
    "held-out": lambda row: float(row[LOSS_SUM] / row[HELD_OUT]) if row[HELD_OUT] else None,
    # A regression's score is a loss, too; a number of rows is below every bar.
    "reference": lambda row: float(row[SCORE] / row[HELD_OUT]) if row[HELD_OUT] else None,
}


def _lower_median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return float(ordered[(len(ordered) - 1) // 2])


def _update(head: Arrays, arrays: Arrays) -> Arrays:
    return {name: np.subtract(arrays[name], head[name], dtype=np.float64) for name in head}


def _norm(arrays: Arrays) -> float:
    return float(np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values())))
