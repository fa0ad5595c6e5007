"""Secure summation at the coordinator: one exchange of sums in which no site's own are seen."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fedhead.errors import FedheadError
from fedhead.protocol.messages import MessageError, Payload
from fedhead.secure import SecureSumError
from fedhead.secure.fixed_point import Elements, add
from fedhead.secure.layout import Layout
from fedhead.secure.replies import SUM, layout_of, restored, with_session
from fedhead.server.exchange import POOL, Exchange
from fedhead.server.messenger import Messenger, Reply
from fedhead.server.screening import impossible_grams
from fedhead.sums.sums import Sums

S = TypeVar("S", bound=Sums)


class Summation(Protocol):
    """Asks sites for sums, of which it learns only the total."""

    def total(self, nodes: Mapping[str, int], action: str, payload: Payload, nothing: S) -> "SecureTotal[S]":
        """Ask sites for sums over their rows, and return the total.

        Args:
            nodes: the sites to ask, by name.
            action: the requested action.
            payload: the request.
            nothing: the sums over no rows, which give the form of replies.

        Raises:
            FedheadError: if no rows can have the total.
        """


@dataclass(frozen=True)
class SecureTotal(Generic[S]):
    """The sum of the sites' replies.

    Attributes:
        total: the sum; over no rows if too few sites answered.
        sites: the sites whose replies are in it, in the order of names.
        exchange: the traffic, and the sites that were dropped or late.
    """

    total: S
    sites: Sequence[str]
    exchange: Exchange


class RingSum:
    """Sums of simulated sites: the arithmetic of secure summation, without masks, which nobody could see.

    The sums are equal, bit for bit, to those of real sites with the same replies.

    Args:
        messenger: reaches the sites.
    """

    def __init__(self, messenger: Messenger) -> None:
        self._messenger = messenger

    def total(self, nodes: Mapping[str, int], action: str, payload: Payload, nothing: S) -> SecureTotal[S]:
        layout = layout_of(nothing.to_arrays())
        vectors: dict[str, Elements] = {}

        def read(reply: Reply) -> None:
            vectors[reply.sites[0]] = masked_vector(reply.payload, layout)

        session = {"terms": len(nodes), "layout": layout.model_dump(mode="json")}
        content = with_session(payload, session).to_content()
        exchange = self._messenger.ask(nodes, action, content, read, together=False)
        sites = sorted(vectors)
        return SecureTotal(opened([vectors[site] for site in sites], layout, nothing), sites, exchange)


def masked_vector(payload: Payload, layout: Layout) -> Elements:
    """Read a masked vector.

    Raises:
        MessageError: if it has another form.
    """
    if payload.arrays.keys() != {SUM}:
        raise MessageError("it is no masked sum")
    vector = payload.arrays[SUM]
    try:
        layout.check(vector)
    except SecureSumError as error:
        raise MessageError(str(error)) from None
    return vector


def pool_of(sites: Sequence[str]) -> str:
    """Return a name for the sites of a sum: of two sums with one name, the same sites are in both."""
    return f"{len(sites)} sites {hashlib.sha256(repr(sorted(sites)).encode()).hexdigest()[:12]}"


def opened(vectors: Sequence[Elements], layout: Layout, nothing: S) -> S:
    """Add vectors without masks, and return the total as sums.

    Raises:
        FedheadError: if no rows can have them.
    """
    if not vectors:
        return nothing
    total = vectors[0].copy()
    for vector in vectors[1:]:
        add(total, vector)
    return screened(total, layout, nothing)


def screened(total: Elements, layout: Layout, nothing: S) -> S:
    """Return a total as sums, after every check that a single site's would pass.

    Raises:
        FedheadError: if no rows can have them; the site at fault cannot be identified.
    """
    try:
        arrays = restored(layout.unpack(total), nothing.to_arrays())
        sums = type(nothing).from_arrays(arrays, nothing)
    except (ValueError, SecureSumError) as error:
        reason = str(error)
    else:
        if not (impossible := impossible_grams({POOL: sums})):
            return sums
        reason = impossible[POOL]
    raise unusable(reason)


def unusable(reason: str) -> FedheadError:
    """Return the error about a total that no rows can have."""
    return FedheadError(
        f"The secure sum of all sites cannot be used: {reason.rstrip('.')}. The coordinator cannot know which site is "
        "at fault; check each site's data and log."
    )
