"""Secure sums of real sites at the coordinator: four exchanges, after each of which sites may be lost."""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from flwr.app import Message

from fedhead.protocol.actions import AGREE, OPEN, UNMASK
from fedhead.protocol.messages import Manifest, MessageError, Payload
from fedhead.secure import SecureSumError
from fedhead.secure.coordinator import SecureSum
from fedhead.secure.layout import Layout
from fedhead.secure.messages import Opening, sealed_to_array, shares_from_arrays, signature_from_arrays
from fedhead.secure.replies import layout_of, purpose_of, with_session
from fedhead.secure.roster import Roster
from fedhead.secure.session import MIN_SITES, Context, threshold_for
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Addresses, Messenger, Reply
from fedhead.server.observer import Observer
from fedhead.server.secure_sum import SecureTotal, masked_vector, screened
from fedhead.sums.sums import Sums

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Sums)

ATTEMPTS = 3
"""Sessions that are tried for one sum; a session that fails reveals nothing."""


class MaskedSum:
    """Asks real sites for sums, of which it learns only the total over those that survive.

    Args:
        messenger: reaches the sites.
        roster: the sites' keys, signed by the consortium's authority.
        manifest: of the run.
        observer: notified of each exchange.
        min_sites: of the run; a sum that fails is tried again at once only with so many of the sites asked.
        max_colluding: the number of sites that may collude with the coordinator.
    """

    def __init__(
        self,
        messenger: Messenger,
        roster: Roster,
        manifest: Manifest,
        observer: Observer,
        min_sites: int = MIN_SITES,
        max_colluding: int = 0,
    ) -> None:
        self._messenger = messenger
        self._min_sites = max(min_sites, MIN_SITES)
        self._max_colluding = max_colluding
        self._roster = roster
        self._manifest = manifest
        self._observer = observer

    def total(self, nodes: Mapping[str, int], action: str, payload: Payload, nothing: S) -> SecureTotal[S]:
        layout = layout_of(nothing.to_arrays())
        exchange = Exchange()
        exchange.drop([site for site in nodes if site not in self._roster.sites], "the roster does not have it")
        total = nothing
        survivors: tuple[str, ...] = ()
        for _ in range(ATTEMPTS):
            left = {site: node for site, node in nodes.items() if site not in exchange.dropped}
            if len(left) < max(MIN_SITES, min(self._min_sites, len(nodes))):
                break
            if self._threshold(len(left), payload) > len(left):
                break
            try:
                session = self._propose(left, action, payload, layout)
                _Session(self._messenger, self._observer, exchange, left).run(session, action, payload)
                vector = session.unmasked()
            except SecureSumError as error:
                logger.warning("A secure sum of %s failed: %s", action, error)
                continue
            total, survivors = screened(vector, layout, nothing), session.survivors()
            break
        exchange.asked = len(nodes)
        for site in survivors:
            # What it sent is in the sum, although it was lost afterwards.
            if site not in exchange.late:
                exchange.dropped.pop(site, None)
        return SecureTotal(total, survivors, exchange)

    def _propose(self, nodes: Mapping[str, int], action: str, payload: Payload, layout: Layout) -> SecureSum:
        purpose = purpose_of(self._manifest, action, payload)
        threshold = self._threshold(len(nodes), payload)
        return SecureSum(Context.propose(self._roster, list(nodes), layout, purpose, threshold), self._roster)

    def _threshold(self, sites: int, payload: Payload) -> int:
        """Return the threshold of a sum; that of noisy sums is such that enough of the noise is in them."""
        terms = self._manifest.privacy
        noises = int(payload.values.get("parties", 0)) if terms is not None and terms.noise == "shared" else 0
        return threshold_for(sites, self._max_colluding, noises)


class _Session:
    """The exchanges of one session.

    Args:
        messenger: reaches the sites.
        observer: notified of each exchange.
        exchange: counts their traffic, and the sites that were dropped.
        nodes: the sites of the session.
    """

    def __init__(self, messenger: Messenger, observer: Observer, exchange: Exchange, nodes: Mapping[str, int]) -> None:
        self._messenger = messenger
        self._observer = observer
        self._exchange = exchange
        self._nodes = nodes

    def run(self, session: SecureSum, action: str, payload: Payload) -> None:
        """Make all four exchanges.

        Raises:
            SecureSumError: if too few sites are left after one of them.
        """
        context = session.context
        self._observer.on_phase("open")
        opening = Payload({"context": context.model_dump(mode="json")})
        self._ask(OPEN, dict.fromkeys(context.sites, opening), lambda site, reply: _take_opening(session, site, reply))
        openings = session.openings()
        self._observer.on_phase("mask")
        asked = {}
        for site in openings.keys:
            sealed = sealed_to_array(session.sealed_for(site))
            values = {"session": context.session, "opened": list(openings.keys)}
            asked[site] = with_session(payload, values, {**openings.to_arrays(), "sealed": sealed})
        self._ask(
            action,
            asked,
            lambda site, reply: session.take_vector(site, masked_vector(reply, context.layout)),
        )
        survivors = session.survivors()
        self._observer.on_phase("agree")
        agree = Payload({"session": context.session, "survivors": list(survivors)})
        self._ask(
            AGREE,
            dict.fromkeys(survivors, agree),
            lambda site, reply: session.take_agreement(site, signature_from_arrays(reply.arrays)),
        )
        agreements = session.agreements()
        self._observer.on_phase("unmask")
        agreed = {"session": context.session, "agreed": list(agreements.signatures)}
        unmask = Payload(agreed, agreements.to_arrays())
        opened = tuple(openings.keys)
        self._ask(
            UNMASK,
            dict.fromkeys(agreements.signatures, unmask),
            lambda site, reply: session.take_shares(site, shares_from_arrays(opened, reply.arrays)),
        )

    def _ask(self, action: str, payloads: Mapping[str, Payload], take: Callable[[str, Payload], None]) -> None:
        """Send each site its payload, and take the replies; those that cannot be used drop their site."""
        contents = {id(payload): payload.to_content() for payload in payloads.values()}
        nodes = {site: self._nodes[site] for site in payloads}
        messages = {
            site: Message(contents[id(payload)], self._nodes[site], action) for site, payload in payloads.items()
        }

        def read(reply: Reply) -> None:
            try:
                take(reply.sites[0], Payload.from_content(reply.content))
            except SecureSumError as error:
                raise MessageError(str(error)) from None

        self._exchange.include(self._messenger.send(messages, Addresses(nodes, {}), read))


def _take_opening(session: SecureSum, site: str, reply: Payload) -> None:
    session.take_opening(site, Opening.from_arrays(reply.arrays, session.context))
