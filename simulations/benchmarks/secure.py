"""`secure`: the cost of a secure sum beside a plain exchange of the same statistics."""

import time
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import typer
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.errors import FedheadError
from fedhead.protocol.messages import Payload
from fedhead.secure.coordinator import SecureSum
from fedhead.secure.fixed_point import Elements, add
from fedhead.secure.keys import SiteKeys, signed_roster
from fedhead.secure.layout import Layout
from fedhead.secure.messages import (
    Openings,
    sealed_to_array,
    shares_to_arrays,
    signature_to_arrays,
)
from fedhead.secure.replies import SUM, additive, layout_of
from fedhead.secure.session import Context, Purpose
from fedhead.secure.site import SiteState, open_session
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Arrays

ROWS = 200
OPEN, MASK, AGREE, UNMASK, PLAIN = "open", "mask", "agree", "unmask", "a plain exchange"


@app.command()
def secure(
    sites: Annotated[int, typer.Option(help="Sites of the sum.", min=3)] = 20,
    features: Annotated[int, typer.Option(help="Features d of the statistics.", min=1)] = 512,
    classes: Annotated[int, typer.Option(help="Classes of the statistics.", min=2)] = 10,
    lost: Annotated[int, typer.Option(help="Sites that are lost after they opened the session.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Sum the statistics of many sites under masks: bytes and processor time of a site and of the coordinator."""
    measure(sites, features, classes, lost).show(as_json=as_json)


def measure(sites: int, features: int, classes: int, lost: int = 0) -> Measurement:
    """Run one secure sum in this process, with every message as bytes.

    Raises:
        FedheadError: if the sum differs, in any bit, from the sum of the same vectors without masks.
    """
    generator = torch.Generator().manual_seed(0)
    values = FeatureStatistics.from_features(
        torch.randn(ROWS, features, generator=generator),
        torch.randint(classes, (ROWS,), generator=generator),
        classes,
    ).to_arrays()
    summed = additive(values)
    masked = _MaskedSum([f"site-{number:03}" for number in range(sites)], layout_of(values))
    openings = masked.open()
    for name in masked.names[lost:]:
        masked.mask(name, summed, openings)
    total = masked.unmask(masked.agree())
    vector = layout_of(values).pack(summed, sites)
    expected = np.zeros_like(vector)
    for _ in masked.names[lost:]:
        add(expected, vector)
    if not np.array_equal(total, expected):
        raise FedheadError("The secure sum differs from the sum of the same vectors without masks.")
    plain, masked_bytes = len(Payload({}, values).blob), sum(masked.sent.values())
    setting = {
        "sites": sites,
        "features": features,
        "classes": classes,
        "lost": lost,
        "bytes_up": {PLAIN: plain, **masked.sent, "all four exchanges": masked_bytes},
        "bytes_down": masked.received,
        "sum": "equal in every bit to the sum without masks",
    }
    spent = masked.at.seconds
    seconds = {"one site, on average": spent["site"] / sites, "coordinator": spent["coordinator"]}
    figures = {"bytes up of a site, times a plain exchange": masked_bytes / plain}
    return Measurement("A secure sum of statistics", seconds, setting, figures, units="figure")


class _MaskedSum:
    """The four exchanges of a secure sum, with the time and the bytes that they take."""

    def __init__(self, names: Sequence[str], layout: Layout) -> None:
        self.names = names
        self.at = Clock()
        self._layout = layout
        self.sent: dict[str, int] = {}
        self.received = 0
        self._keys = {name: SiteKeys.generate() for name in names}
        members = {name: own.member for name, own in self._keys.items()}
        self._roster = signed_roster(ec.generate_private_key(ec.SECP256R1()), members)
        purpose = Purpose("r", "query.statistics", "train", "0" * 64)
        self._session = SecureSum(Context.propose(self._roster, names, layout, purpose), self._roster)
        self._states: dict[str, SiteState] = {}

    def open(self) -> Openings:
        """Open the session at every site."""
        for name in self.names:
            with self.at.of("site"):
                self._states[name], opening = open_session(self._session.context, name, self._keys[name], self._roster)
            self.sent[OPEN] = len(Payload({}, opening.to_arrays()).blob)
            with self.at.of("coordinator"):
                self._session.take_opening(name, opening)
        with self.at.of("coordinator"):
            return self._session.openings()

    def mask(self, name: str, values: Arrays, openings: Openings) -> None:
        """Have a site mask its values."""
        with self.at.of("coordinator"):
            sealed = self._session.sealed_for(name)
        self.received = len(Payload({}, {**openings.to_arrays(), "sealed": sealed_to_array(sealed)}).blob)
        with self.at.of("site"):
            self._states[name] = self._states[name].mask(openings, sealed, self._keys[name], self._roster)
            masked = self._states[name].masked(self._layout.pack(values, len(self.names)))
        self.sent[MASK] = len(Payload({}, {SUM: masked}).blob)
        with self.at.of("coordinator"):
            self._session.take_vector(name, masked)

    def agree(self) -> Sequence[str]:
        """Have the remaining sites agree on who remains; return these."""
        survivors = self._session.survivors()
        for name in survivors:
            with self.at.of("site"):
                self._states[name], signature = self._states[name].agree(survivors, self._keys[name])
            self.sent[AGREE] = len(Payload({}, signature_to_arrays(signature)).blob)
            with self.at.of("coordinator"):
                self._session.take_agreement(name, signature)
        return survivors

    def unmask(self, survivors: Sequence[str]) -> Elements:
        """Have the remaining sites send the shares of masks; return the sum of their vectors."""
        agreements = self._session.agreements()
        for name in survivors:
            with self.at.of("site"):
                self._states[name], shares = self._states[name].unmask(agreements, self._roster)
            self.sent[UNMASK] = len(Payload({}, shares_to_arrays(shares)).blob)
            with self.at.of("coordinator"):
                self._session.take_shares(name, shares)
        with self.at.of("coordinator"):
            return self._session.unmasked()


class Clock:
    """Processor time by who spends it; used as a context, `with clock.of(who)`.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._who, self._began = "", 0.0

    def of(self, who: str) -> "Clock":
        """Count the time of the following block as `who`'s."""
        self._who = who
        return self

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self._who] = self.seconds.get(self._who, 0.0) + time.process_time() - self._began
