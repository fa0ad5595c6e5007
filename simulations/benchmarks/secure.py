"""`secure`: the cost of a secure sum beside a plain exchange of the same statistics."""

import time
from typing import Annotated

import numpy as np
import torch
import typer
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.errors import FedheadError
from fedhead.protocol.messages import Payload
from fedhead.secure.coordinator import SecureSum
from fedhead.secure.fixed_point import add
from fedhead.secure.keys import SiteKeys, signed_roster
from fedhead.secure.messages import (
    sealed_to_array,
    shares_to_arrays,
    signature_to_arrays,
)
from fedhead.secure.replies import SUM, additive, layout_of
from fedhead.secure.session import Context, Purpose
from fedhead.secure.site import open_session
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app
from fedhead.sums.features import FeatureStatistics

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
    names = [f"site-{number:03}" for number in range(sites)]
    keys = {name: SiteKeys.generate() for name in names}
    roster = signed_roster(ec.generate_private_key(ec.SECP256R1()), {name: own.member for name, own in keys.items()})
    generator = torch.Generator().manual_seed(0)
    values = FeatureStatistics.from_features(
        torch.randn(ROWS, features, generator=generator),
        torch.randint(classes, (ROWS,), generator=generator),
        classes,
    ).to_arrays()
    summed = additive(values)
    layout = layout_of(values)
    session = SecureSum(
        Context.propose(roster, names, layout, Purpose("r", "query.statistics", "train", "0" * 64)), roster
    )
    context, at = session.context, Clock()
    up, states = len(Payload({}, values).blob), {}
    sent = {PLAIN: up}
    for name in names:
        with at.of("site"):
            states[name], opening = open_session(context, name, keys[name], roster)
        sent[OPEN] = len(Payload({}, opening.to_arrays()).blob)
        with at.of("coordinator"):
            session.take_opening(name, opening)
    with at.of("coordinator"):
        openings = session.openings()
    expected = np.zeros((layout.limbs, layout.size), np.uint64)
    for name in names[lost:]:
        with at.of("coordinator"):
            sealed = session.sealed_for(name)
        received = len(Payload({}, {**openings.to_arrays(), "sealed": sealed_to_array(sealed)}).blob)
        with at.of("site"):
            states[name] = states[name].mask(openings, sealed, keys[name], roster)
            vector = layout.pack(summed, sites)
            masked = states[name].masked(vector)
        sent[MASK] = len(Payload({}, {SUM: masked}).blob)
        add(expected, vector)
        with at.of("coordinator"):
            session.take_vector(name, masked)
    survivors = session.survivors()
    for name in survivors:
        with at.of("site"):
            states[name], signature = states[name].agree(survivors, keys[name])
        sent[AGREE] = len(Payload({}, signature_to_arrays(signature)).blob)
        with at.of("coordinator"):
            session.take_agreement(name, signature)
    agreements = session.agreements()
    for name in survivors:
        with at.of("site"):
            states[name], shares = states[name].unmask(agreements, roster)
        sent[UNMASK] = len(Payload({}, shares_to_arrays(shares)).blob)
        with at.of("coordinator"):
            session.take_shares(name, shares)
    with at.of("coordinator"):
        total = session.unmasked()
    if not np.array_equal(total, expected):
        raise FedheadError("The secure sum differs from the sum of the same vectors without masks.")
    masked_bytes = sum(sent.values()) - sent[PLAIN]
    setting = {
        "sites": sites,
        "features": features,
        "classes": classes,
        "lost": lost,
        "bytes_up": {**sent, "all four exchanges": masked_bytes},
        "bytes_down": received,
        "sum": "equal in every bit to the sum without masks",
    }
    seconds = {"one site, on average": at.seconds["site"] / sites, "coordinator": at.seconds["coordinator"]}
    figures = {"bytes up of a site, times a plain exchange": masked_bytes / sent[PLAIN]}
    return Measurement("A secure sum of statistics", seconds, setting, figures, units="figure")


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
