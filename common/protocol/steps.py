"""Steps that every reply passes at the site before sending."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fedhead.data import KeyArray
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.private import PrivateRequest
from fedhead.sums.sums import Arrays


@dataclass(frozen=True)
class Masking:
    """One site's part in a secure sum.

    Attributes:
        encode: encodes the site's arrays, and masks them; None if there are none that can be summed. It raises a
            `FedheadError` if the site takes no part in the sum, and not because of the values.
        threshold: the least number of sites whose sum is opened.
    """

    encode: Callable[[Arrays | None], npt.NDArray[np.uint64]]
    threshold: int


Part = Literal["train", "held_out"]
"""The rows behind a reply: the site's training rows or its held-out rows."""


@dataclass(frozen=True)
class Basis:
    """The rows behind a reply.

    Attributes:
        rows: the number of rows.
        classes: the number of rows of each class; a multi-label row counts for each of its classes.
        share: the site's share of held-out rows; None if unknown.
        keys: returns the keys of the site's rows by part and group; the same object while the rows are the same.
    """

    rows: int
    classes: Mapping[str, int]
    share: float | None = None
    keys: Callable[[], Mapping[str, KeyArray]] | None = None


@dataclass(frozen=True)
class Release:
    """A reply before sending.

    Attributes:
        action: the action that it answers.
        site: the sender; for several simulated sites the first one.
        sites: the number of sites that the reply covers.
        manifest: the run's manifest; None before the site has accepted one.
        parts: the rows behind the reply; empty for none.
        features: the form of the map of features behind it, such as `unit+landmarks:1024`; empty for plain features.
        basis: returns details of these rows; None if there are none or the reply covers several sites.
        masking: encodes and masks sums; None if the request is for a plain reply.
        failed: whether the sums could not be computed.
        private: the request that the reply answers, if it is one for noisy sums.
    """

    action: str
    site: str
    sites: int = 1
    manifest: Manifest | None = None
    parts: Sequence[Part] = ()
    basis: Callable[[], Basis] | None = None
    masking: Masking | None = None
    features: str = ""
    private: PrivateRequest | None = None
    failed: bool = False

    @property
    def run(self) -> str:
        """The id of the run; empty before the site has accepted one."""
        return "" if self.manifest is None else self.manifest.run


class Step:
    """A transformation or check of all outgoing data; the base class passes everything through.

    Steps run in order.

    Attributes:
        per_site: whether each site's reply must pass by itself, so that replies of simulated sites may not be merged
            first.
    """

    per_site: ClassVar[bool] = False

    def conceals(self, manifest: Manifest) -> bool:
        """Return whether no reply of a run may tell of this site's rows alone, not even by a refusal."""
        return False

    def admit(self, action: str, manifest: Manifest, *, masked: bool) -> None:
        """Check a request about rows before anything is computed; the base class admits everything.

        Whether a request is admitted must not depend on the site's rows.

        Args:
            action: the action.
            manifest: of the run, as the site has accepted it.
            masked: whether the request asks for a masked reply.

        Raises:
            FedheadError: if the site does not answer it.
        """

    def leave(self, payload: Payload, release: Release) -> Payload:
        """Return the payload to send in place of `payload`.

        Raises:
            FedheadError: if nothing may be sent.
        """
        return payload

    def applies(self, manifest: Manifest) -> bool:
        """Return whether the step has an effect in a run."""
        return True

    def describe(self) -> str:
        """Return a sentence for the report on the step's protection; empty for none."""
        return ""


def leave(payload: Payload, release: Release, steps: Iterable[Step]) -> Payload:
    """Pass a reply through all steps.

    Raises:
        ValueError: if the reply covers several sites and a step needs single replies.
        FedheadError: if nothing may be sent.
    """
    for step in steps:
        if release.sites > 1 and step.per_site:
            raise ValueError(f"{type(step).__name__} needs single replies, not one for {release.sites} sites.")
        payload = step.leave(payload, release)
    return payload
