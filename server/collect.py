"""`collect(question) -> Collected`: ask sites for sums over their rows, check each reply, and add them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from flwr.app import RecordDict

from fedhead.errors import FedheadError
from fedhead.protocol.messages import Payload
from fedhead.server.exchange import POOL, Exchange
from fedhead.server.messenger import Messenger, Reply
from fedhead.server.screening import SumsScreen, most_rows
from fedhead.server.secure_sum import Summation
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Arrays, Sums

S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class Question(Generic[S]):
    """A question for sums.

    Attributes:
        action: the requested action.
        content: the message.
        nothing: the sums over no rows, which give the form that replies must have; they may be added to in place.
        together: whether one reply may be the sum of several sites of this process.
        beside: arrays that such a reply may hold beside the sums, by name.
        widen: turns the arrays of a single site's reply into those of sums; None if they are.
    """

    action: str
    content: RecordDict
    nothing: S
    together: bool = True
    beside: tuple[str, ...] = ()
    widen: Callable[[Arrays], Arrays] | None = None


@dataclass(frozen=True)
class Collected(Generic[S]):
    """The sum of all replies that could be used.

    Attributes:
        total: the sum; over no rows if no reply could be used.
        replies: the number of replies that could be used.
        exchange: the traffic, and the sites that were dropped or late.
        sites: those in the total, in the order of names.
    """

    total: S
    replies: int
    exchange: Exchange
    sites: Sequence[str] = ()

    def require_one(self) -> None:
        """Check that at least one reply could be used.

        Raises:
            FedheadError: if not, with the first reasons.
        """
        if not self.replies:
            raise FedheadError(f"Not one site's statistics could be used.{self.exchange.first_reasons()}")


Each = Callable[[tuple[str, ...], S, Arrays], None]
"""Receives each reply: its sites, their sums and the arrays beside them. A `ValueError` drops a merged reply."""


def collect(
    messenger: Messenger,
    nodes: Mapping[str, int],
    question: Question[S],
    rows: Mapping[str, int],
    each: Each[S] | None = None,
) -> Collected[S]:
    """Ask sites for sums over their rows, check each reply, and add them in the order of arrival.

    Replies of other processes are screened: they are held until they can be compared.

    Args:
        messenger: reaches the sites.
        nodes: the sites to ask, by name.
        question: the request.
        rows: the number of rows of each site; sums over more are dropped.
        each: is called with each reply that can be used, before it is added; under secure summation once, with the
            total of all sites under the name `POOL`.

    Raises:
        FedheadError: if secure summation fails.
    """
    if messenger.summation is not None:
        return _collect_securely(messenger.summation, nodes, question, each)
    total, replies = question.nothing, 0
    used: list[str] = []
    screen: SumsScreen[S] = SumsScreen()
    bar = np.inf if messenger.in_process else most_rows(rows.values())

    def add(sites: tuple[str, ...], sums: S, beside: Arrays) -> None:
        nonlocal total, replies
        if each is not None:
            each(sites, sums, beside)
        total += sums
        replies += 1
        used.extend(sites)

    def read(reply: Reply) -> None:
        sums, beside = _read(reply, question, total)
        known = sum(rows[name] for name in reply.sites)
        summed = sums.independent if isinstance(sums, FeatureStatistics) else sums.rows
        if summed > known:
            raise ValueError(f"it sums {summed} rows, of {known} that it has")
        if summed > bar:
            raise ValueError(f"it sums {summed} rows; the sites' median allows {bar:.0f}")
        if messenger.in_process:
            add(reply.sites, sums, beside)
            return
        for site, usable in screen.take(reply.sites[0], sums):
            add((site,), usable, {})

    exchange = messenger.ask(nodes, question.action, question.content, read, together=question.together)
    for site, usable in screen.release():
        add((site,), usable, {})
    for site, reason in screen.dropped.items():
        exchange.drop([site], reason)
    return Collected(total, replies, exchange, sorted(used))


def _read(reply: Reply, question: Question[S], like: S) -> tuple[S, Arrays]:
    """Return the sums of a reply, and the arrays beside them.

    Raises:
        ValueError: if they are not sums like `like`.
    """
    arrays = dict(reply.payload.arrays)
    beside = {name: arrays.pop(name) for name in question.beside if reply.merged and name in arrays}
    if question.widen is not None and len(reply.sites) == 1:
        arrays = dict(question.widen(arrays))
    return type(like).from_arrays(arrays, like), beside


def _collect_securely(
    summation: Summation, nodes: Mapping[str, int], question: Question[S], each: Each[S] | None
) -> Collected[S]:
    summed = summation.total(nodes, question.action, Payload.from_content(question.content), question.nothing)
    if each is not None and summed.sites:
        each((POOL,), summed.total, {})
    return Collected(summed.total, len(summed.sites), summed.exchange, summed.sites)
