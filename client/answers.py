"""Answers: the replies of sites before they pass the release steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Context

from fedhead.client.site_data import Site
from fedhead.protocol.messages import Manifest, Payload, payload_bytes
from fedhead.protocol.private import PrivateRequest
from fedhead.protocol.steps import Part
from fedhead.sums.sums import Arrays


@dataclass(frozen=True)
class Answer:
    """One reply, before it passes the release steps.

    Attributes:
        positions: the sites that it speaks for, by their positions among those asked.
        payload: the content.
        manifest: of the run; None before the sites have accepted one.
        parts: the rows that it rests on; empty for none.
        private: the request that it answers, if it is one for noisy sums.
    """

    positions: Sequence[int]
    payload: Payload
    manifest: Manifest | None
    parts: Sequence[Part] = ()
    private: PrivateRequest | None = None


Handler = Callable[[Sequence[Site], Payload, Context, bool], Iterator[Answer]]


def shared(sites: Sequence[Site], merged: bool) -> list[list[int]]:
    """Return the positions of the sites that one reply speaks for, for each reply."""
    every = list(range(len(sites)))
    return [every] if merged else [[position] for position in every]


def of_several(arrays: Arrays, sites: int, beside: Arrays | None = None) -> Payload:
    """Return a sum of several sites with the bytes of their single replies beside it; of one site the sum alone."""
    if sites == 1:
        return Payload({}, arrays)
    single = payload_bytes(Payload({}, arrays).to_content())
    return Payload({"num_bytes": single * sites}, {**arrays, **(beside or {})})
