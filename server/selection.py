"""Selection of a head by proof: rivals are compared on the sites' held-out rows, each at its own temperature."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from fedhead.protocol.actions import RIVALS
from fedhead.protocol.messages import Payload
from fedhead.protocol.rivals import Level, RivalsRequest
from fedhead.server.collect import Each, Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.sums.heads import FloatArray
from fedhead.sums.rivals import RivalSums
from fedhead.sums.sums import Arrays
from fedhead.wording import listed

logger = logging.getLogger(__name__)

LIFT_RATIO = 0.98
"""A lift is taken if its held-out loss is below this share of the best head's without it."""
FEWEST_ERRORS = 10
"""Held-out errors that a lifted discriminant head needs for a trustworthy comparison."""

BAR = 2.0
"""Standard errors that a version must gain to be proven better."""
CHANCE = 1 - NormalDist().cdf(BAR)
"""Probability that a version which is no better gains as much."""


@dataclass(frozen=True, eq=False)
class Rival:
    """A head in a comparison.

    Attributes:
        name: for readers.
        arrays: its parameters.
        level: its features.
        lifted: whether these are lifted.
        counts_errors: whether it is left out with few held-out errors.
        trained: whether it is trained in rounds, and not solved.
    """

    name: str
    arrays: Arrays
    level: Level = "map"
    lifted: bool = False
    counts_errors: bool = False
    trained: bool = False


@dataclass(frozen=True)
class Choice:
    """A comparison of heads, and the one that was taken.

    Attributes:
        question: the subject of the choice, as a heading.
        taken: the name of the head.
        reason: why, in a sentence.
        rows: the held-out rows that decided.
        rivals: for each head its name, loss, score and temperature.
    """

    question: str
    taken: str
    reason: str
    rows: int
    rivals: Sequence[Mapping[str, Any]]

    def log(self) -> None:
        """Log the choice and its reason."""
        logger.info("%s: %s. %s", self.question, self.taken, self.reason)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "question": self.question,
            "taken": self.taken,
            "reason": self.reason,
            "rows": self.rows,
            "rivals": [dict(one) for one in self.rivals],
        }


def in_two_exchanges(
    messenger: Messenger,
    nodes: Mapping[str, int],
    rows: Mapping[str, int],
    action: str,
    payload_at: Callable[[FloatArray], Payload],
    count: int,
    *,
    scaled: bool = True,
    each: Each[RivalSums] | None = None,
) -> tuple[RivalSums, Exchange]:
    """Compare heads on held-out rows in two exchanges: the first chooses temperatures, the second uses them.

    Args:
        messenger: reaches the sites.
        nodes: the sites to ask, by name.
        rows: the number of rows of each.
        action: the request for their losses.
        payload_at: returns the content of the request, given a temperature for each head.
        count: the number of heads.
        scaled: whether losses depend on temperatures; otherwise one exchange is enough.
        each: receives the sums of each site in each exchange.

    Returns:
        The sums of the last exchange, and the traffic.
    """
    exchange, temperatures, sums = Exchange(), np.ones(count), RivalSums.zeros(count)
    for _ in range(2 if scaled else 1):
        content, nothing = payload_at(temperatures).to_content(), RivalSums.zeros(count)
        question = Question(action, content, nothing, together=each is None)
        collected = collect(messenger, nodes, question, rows, each)
        exchange.include(collected.exchange)
        sums = collected.total
        temperatures = sums.temperatures()
    return sums, exchange


def compare_rivals(
    messenger: Messenger,
    nodes: Mapping[str, int],
    rows: Mapping[str, int],
    rivals: Sequence[Rival],
    *,
    scaled: bool = True,
    each: Each[RivalSums] | None = None,
) -> tuple[RivalSums, Exchange]:
    """Compare heads on held-out rows; see `in_two_exchanges`."""
    heads, levels = [one.arrays for one in rivals], [one.level for one in rivals]

    def payload_at(temperatures: FloatArray) -> Payload:
        return RivalsRequest(heads, levels, temperatures).payload()

    return in_two_exchanges(messenger, nodes, rows, RIVALS, payload_at, len(rivals), scaled=scaled, each=each)


def figures(rivals: Sequence[Rival], sums: RivalSums) -> list[dict[str, Any]]:
    """Return each head's name, mean loss, score and temperature."""
    rows = max(sums.rows, 1)
    return [
        {"name": one.name, "loss": loss / rows, "score": right / rows, "temperature": temperature}
        for one, loss, right, temperature in zip(
            rivals, sums.losses.tolist(), sums.right.tolist(), sums.temperatures().tolist(), strict=True
        )
    ]


def choose_map(rivals: Sequence[Rival], sums: RivalSums, left_out: str = "") -> tuple[int, Choice]:
    """Choose among heads on plain features, in a basis and lifted; return the position of the one that is taken.

    Args:
        rivals: the heads; the first is on plain features.
        sums: their comparison.
        left_out: why lifted heads are missing; empty if they are not.
    """
    question = "Features"
    if not sums.rows:
        reason = "No rows are held out, so nothing is proven better than the head on plain features."
        return 0, Choice(question, rivals[0].name, reason, 0, figures(rivals, sums))
    losses = sums.losses / sums.rows
    errors = sums.rows - sums.right
    trusted = [not one.counts_errors or errors[at] >= FEWEST_ERRORS for at, one in enumerate(rivals)]
    linear = min((at for at, one in enumerate(rivals) if not one.lifted), key=lambda at: float(losses[at]))
    lifted = min(
        (at for at, one in enumerate(rivals) if one.lifted and trusted[at]),
        key=lambda at: float(losses[at]),
        default=None,
    )
    few = [one.name for at, one in enumerate(rivals) if not trusted[at]]
    note = f" {left_out}" if left_out else ""
    if few:
        note += f" Left out, with fewer than {FEWEST_ERRORS} errors: {listed(few, len(few))}."
    if lifted is not None and losses[lifted] < LIFT_RATIO * losses[linear]:
        said = f"Its held-out loss, {losses[lifted]:.4f}, is below {LIFT_RATIO} of the best without a lift"
        taken, reason = lifted, f"{said} ({rivals[linear].name}: {losses[linear]:.4f}).{note}"
    else:
        taken, reason = linear, f"It has the least held-out loss of the heads without a lift, {losses[linear]:.4f}"
        reason += (
            f", and no lift is below {LIFT_RATIO} of it ({rivals[lifted].name}: {losses[lifted]:.4f}).{note}"
            if lifted is not None
            else f".{note}"
        )
    return taken, Choice(question, rivals[taken].name, reason, sums.rows, figures(rivals, sums))


def errors_to_gain(versions: int) -> float:
    """Return the standard errors that the best of several versions must gain: two, and more for more versions.

    By Bonferroni's correction the best of versions that are all alike passes no more often than one would by two.
    """
    return NormalDist().inv_cdf(1 - CHANCE / max(versions, 1))


def choose_tuned(rivals: Sequence[Rival], bars: Sequence[float], sums: RivalSums) -> tuple[int, Choice]:
    """Choose between the solved head, first, and tuned versions, each by proof against the one taken so far.

    Heads that are solved are delivered solved from all rows, held-out ones included, so that they are compared alike. A
    trained head has not seen these rows, and must be proven better than all heads before it.

    Args:
        rivals: the solved head, and tuned versions in the order of preference.
        bars: the standard errors that each must gain.
        sums: their comparison.
    """
    taken = 0
    for at, rival in enumerate(rivals[1:], start=1):
        others = range(at) if rival.trained else (taken,)
        if all(_is_proven(sums, at, other, bars[at]) for other in others):
            taken = at
    shown = taken or 1
    reason = "There are too few held-out rows for a proof."
    if sums.rows > 1:
        gain, error = sums.paired.gain(shown, 0)
        fewer = int(sums.right[0] - sums.right[shown])
        reason = (
            f"The mean held-out loss of {rivals[shown].name} is {abs(gain):.4f} {'less' if gain > 0 else 'more'} than "
            f"that of the solved head, with a paired standard error of {error:.4f}; a proof takes "
            f"{bars[shown]:.1f} of them{f'; it predicts {fewer} fewer held-out rows correctly' if fewer > 0 else ''}: "
            f"tuning is {'proven' if taken else 'not proven'} to be better."
        )
    return taken, Choice("Tuning", rivals[taken].name, reason, sums.rows, figures(rivals, sums))


def _is_proven(sums: RivalSums, head: int, over: int, needed: float) -> bool:
    """Return whether a head's loss is less by enough standard errors, without more errors."""
    gain, error = sums.paired.gain(head, over)
    return gain > needed * error and bool(sums.right[head] >= sums.right[over])


def choose_by_error(rivals: Sequence[Rival], errors: Sequence[float], left_out: str = "") -> tuple[int, Choice]:
    """Choose among heads by their cross-validation errors; return the position of the one that is taken.

    Args:
        rivals: the heads; the first is on plain features.
        errors: of each, in units of the targets' variance.
        left_out: why lifted heads are missing; empty if they are not.
    """
    linear = min((at for at, one in enumerate(rivals) if not one.lifted), key=lambda at: errors[at])
    lifted = min((at for at, one in enumerate(rivals) if one.lifted), key=lambda at: errors[at], default=None)
    taken = lifted if lifted is not None and errors[lifted] < LIFT_RATIO * errors[linear] else linear
    compared = ", ".join(f"{one.name}: {error:.4f}" for one, error in zip(rivals, errors, strict=True))
    reason = (
        f"By generalised cross-validation from sums, in units of the targets' variance ({compared}); a lift is taken "
        f"below {LIFT_RATIO} of the best without one."
    )
    listed_errors = [{"name": one.name, "loss": error} for one, error in zip(rivals, errors, strict=True)]
    said = f"{reason} {left_out}".rstrip()
    return taken, Choice("Features", rivals[taken].name, said, 0, listed_errors)


def choose_round(rivals: Sequence[Rival], sums: RivalSums) -> tuple[int, Choice]:
    """Choose between the solved head, first, and one from rounds: the latter if it is better by `BAR` standard errors.

    The solved head is delivered from all rows, held-out ones included, which rounds have not seen; and the best of all
    rounds was chosen on the same rows. Beyond one standard error, such rounds were often worse on other rows.
    """
    gain, error = sums.paired.gain(1, 0)
    proven = gain > BAR * error
    taken = int(proven)
    compared = (
        f"The mean held-out loss after rounds is {abs(gain):.4f} {'less' if gain > 0 else 'more'} than before, with a "
        f"paired standard error of {error:.4f}; a proof takes {BAR:g} of them"
        if sums.rows > 1
        else "There are too few held-out rows for a proof"
    )
    verdict = f"rounds are {'' if proven else 'not '}proven better"
    return taken, Choice("Kept head", rivals[taken].name, f"{compared}: {verdict}.", sums.rows, figures(rivals, sums))
