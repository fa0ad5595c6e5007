"""The sites that may connect to a coordinator, and how a request proves which of them sent it."""

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedhead.certificates import fingerprint
from fedhead.errors import UserError
from fedhead.flower.fleet_api import ACTIVATE
from fedhead.flower.fleet_client import SITE_HEADER
from fedhead.flower.signing import IdentityError, Nonces, Proof, proof
from fedhead.flower.site_link import SiteLink
from fedhead.server.kit import CoordinatorKit, check_site_name
from fedhead.server.network.requests import MAX_HOLD_SECONDS, RefusedError, extracted_rows

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 60.0
"""Time before the same refusal is logged again."""
_KEPT_REFUSALS = 1000

_IDENTITY = {
    "unsigned": "it is not signed by a site's key",
    "clock": "it was signed at another time: the two clocks differ by minutes; set them (NTP)",
    "forged": "its signature is not of the key that it shows, or the request was changed since",
    "partly": "it signs only the time, as stock SuperNodes and earlier versions of fedhead do; install this version at "
    "the site",
}


@dataclass
class ConnectedSite:
    """A site as the network knows it.

    Attributes:
        link: its messages and state.
        address: the address of its last request.
        last_seen: the time of its last request, by `time.time`; 0.0 before the first.
        process: the id that its process gives itself, if any.
        earlier_processes: the ids of those before, the last 64.
        nonces: of its recent requests.
        extracted: the rows whose features it has extracted and those to extract, as it says; None between extractions.
    """

    link: SiteLink
    address: str = ""
    last_seen: float = 0.0
    process: bytes = b""
    earlier_processes: deque[bytes] = field(default_factory=lambda: deque(maxlen=64))
    nonces: Nonces = field(default_factory=Nonces)
    extracted: tuple[int, int] | None = None


class SiteRegistry:
    """Knows the registered sites by name, key and node id.

    Args:
        kit: the coordinator's keys and registered sites; without it, each site is admitted with the key that it made.
    """

    def __init__(self, kit: CoordinatorKit | None) -> None:
        self._kit = kit
        self._sites: dict[str, ConnectedSite] = {}
        self._by_key: dict[bytes, ConnectedSite] = {}
        self._by_node: dict[int, ConnectedSite] = {}
        self._revoked: Mapping[bytes, str] = {}
        self._logged: dict[str, float] = {}
        self._read_at = 0
        self.refresh()

    @property
    def sites(self) -> Mapping[str, ConnectedSite]:
        """Every registered site by name; without a kit, every site that ever connected."""
        return dict(self._sites)

    def with_node(self, node_id: int) -> ConnectedSite | None:
        """Return the site with a node id."""
        return self._by_node.get(node_id)

    def identify(
        self, headers: Mapping[bytes, bytes], path: str, request_name: str, address: str
    ) -> tuple[ConnectedSite, Proof]:
        """Return the site that signed a request, and the proof.

        Raises:
            RefusedError: if it has no signature of a registered site, or is a repetition.
        """
        try:
            sent = proof(path, headers)
        except IdentityError as error:
            raise self._refuse(401, f"a request from {address}", _IDENTITY[error.reason]) from None
        key = sent.key
        claimed = headers.get(SITE_HEADER.encode(), b"").decode("latin1")
        if self._kit is None and request_name == ACTIVATE:
            self._admit(claimed, key)
        site = self._by_key.get(key)
        if site is None and self._kit is None:
            raise RefusedError(401, "The coordinator does not know this site yet; it has to activate its node.")
        status = 412 if request_name == ACTIVATE else 401
        if site is None:
            who = f"{self._revoked[key]} ({address})" if key in self._revoked else f"a site from {address}"
            why = "its key is revoked" if key in self._revoked else f"its key ({fingerprint(key)}) is not registered"
            raise self._refuse(status, who, why)
        if claimed not in ("", site.link.name):
            why = f"its key is registered as {site.link.name!r}, and its site.toml calls it {claimed[:64]!r}"
            raise self._refuse(status, f"a site from {address}", why)
        now = time.time()
        if not site.nonces.is_new(sent, now):
            raise self._refuse(401, f"a request of {site.link.name} from {address}", "it came before")
        site.address = address
        site.last_seen = now
        site.extracted = extracted_rows(headers)
        return site, sent

    def refresh(self) -> None:
        """Read the kit's register again if its file has changed.

        Raises:
            UserError: if it cannot be read.
            OSError: if it is missing.
        """
        if self._kit is None:
            return
        changed = self._kit.registry.stat().st_mtime_ns
        if changed == self._read_at:
            return
        kit = CoordinatorKit.read(self._kit.folder)
        self._read_at = changed
        self._revoked = kit.revoked
        for name, site in list(self._sites.items()):
            if kit.sites.get(name) != site.link.public_key:
                logger.warning("%s is no longer registered, and is disconnected.", name)
                self._drop(site)
        for name, key in kit.sites.items():
            if name not in self._sites:
                self._add(name, key)

    def log_refusal(self, sentence: str) -> None:
        """Log a refusal, the same sentence at most once a minute, and `_KEPT_REFUSALS` different ones at most."""
        now = time.monotonic()
        if len(self._logged) >= _KEPT_REFUSALS:
            self._logged = {said: at for said, at in self._logged.items() if now - at <= REPEAT_SECONDS}
            # A stranger's every new key gives a new sentence.
            if len(self._logged) >= _KEPT_REFUSALS:
                return
        if now - self._logged.get(sentence, float("-inf")) > REPEAT_SECONDS:
            self._logged[sentence] = now
            logger.warning("%s", sentence)

    def _refuse(self, status: int, who: str, why: str) -> RefusedError:
        self.log_refusal(f"Refused: {who}, since {why}.")
        return RefusedError(status, f"The coordinator refuses this site, since {why}.")

    def _admit(self, name: str, key: bytes) -> None:
        """Admit a site that made its own key."""
        try:
            check_site_name(name)
        except UserError as error:
            raise self._refuse(412, "a site", f"it gives no name that can be used ({error})") from None
        known = self._sites.get(name)
        if known is not None and known.link.public_key != key:
            if known.link.online and time.time() - known.last_seen < MAX_HOLD_SECONDS:
                raise self._refuse(412, f"a second {name}", "a process that calls itself so is connected already")
            self._drop(known)
            known = None
        if known is None:
            self._add(name, key)

    def _add(self, name: str, key: bytes) -> None:
        site = ConnectedSite(SiteLink(key, name))
        self._sites[name] = self._by_key[key] = self._by_node[site.link.node_id] = site

    def _drop(self, site: ConnectedSite) -> None:
        del self._sites[site.link.name], self._by_key[site.link.public_key], self._by_node[site.link.node_id]
