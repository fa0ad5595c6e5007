"""Explanations of failed requests to a coordinator, in sentences for the site's engineer."""

import email.utils
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from fedhead.addresses import shown_proxy
from fedhead.wording import one_line

# OpenSSL's X509_V_ERR codes of a certificate whose time is wrong, or whose name is another.
_EXPIRED, _NOT_YET_VALID, _OTHER_NAME = 10, 9, (62, 64)
_CLOCKS_MAY_DIFFER = 4.0


@dataclass(frozen=True)
class Trouble:
    """Why a request got no answer, in a sentence, and whether trying again may help."""

    sentence: str
    heals: bool = True


@dataclass(frozen=True)
class Troubles:
    """Explains failed requests.

    Attributes:
        address: the coordinator's address.
        proxy: the proxy's address; empty without one.
        insecure: whether the connection is without TLS.
    """

    address: str
    proxy: str
    insecure: bool

    def of_transport(self, error: httpx.TransportError) -> Trouble:
        """Explain a request that got no answer."""
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return self._of_certificate(cause)
            if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                return Trouble(
                    f"{self.address} does not speak TLS: the coordinator was started with --insecure, or something "
                    "else listens there. Check the address in site.toml, and start the coordinator with its kit.",
                    heals=False,
                )
        if self.proxy and isinstance(error, httpx.ProxyError | httpx.ConnectError | httpx.ConnectTimeout):
            return self._of_proxy(error)
        for cause in _causes(error):
            if isinstance(cause, socket.gaierror):
                return Trouble(f"The name of {self.address} cannot be found ({cause.strerror}).")
            if isinstance(cause, ConnectionRefusedError):
                return Trouble(f"Nothing listens at {self.address}: the coordinator is not up.")
        if self.insecure and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and self._speaks_tls():
            return Trouble(
                f"The coordinator at {self.address} speaks TLS, and this client was started with --insecure. Start it "
                "with --kit and the kit that the coordinator made for this site.",
                heals=False,
            )
        what = str(error) or type(error).__name__
        return Trouble(f"The connection to {self.address} fails ({what.rstrip('.')}).")

    def _of_proxy(self, error: httpx.TransportError) -> Trouble:
        proxy, host = shown_proxy(self.proxy), self.address.rpartition(":")[0]
        what = (str(error) or type(error).__name__).rstrip(".")
        if isinstance(error, httpx.ProxyError):
            return Trouble(
                f"The proxy {proxy} does not connect this site to {self.address} ({what}). Its operator has to allow "
                f"CONNECT to that address; or list {host} in NO_PROXY if it is reached directly."
            )
        return Trouble(
            f"The proxy {proxy} does not answer ({what}). Correct HTTPS_PROXY, or list {host} in NO_PROXY if it is "
            "reached directly."
        )

    def _of_certificate(self, error: ssl.SSLCertVerificationError) -> Trouble:
        if error.verify_code == _EXPIRED:
            return Trouble(
                f"The certificate of {self.address} has expired, or this machine's clock is wrong. The coordinator's "
                "operator has to renew it (fedhead provision --renew), and start the coordinator again."
            )
        if error.verify_code == _NOT_YET_VALID:
            return Trouble(f"The certificate of {self.address} is not valid yet: check this machine's clock.")
        if error.verify_code in _OTHER_NAME:
            return Trouble(
                f"The certificate of {self.address} is for another name ({error.verify_message}). Use the address that "
                "was given to fedhead provision --coordinator, or have the certificate made for this one.",
                heals=False,
            )
        between = (
            f" Or {shown_proxy(self.proxy)} opens TLS: it must pass this address through unopened."
            if self.proxy
            else ""
        )
        return Trouble(
            f"{self.address} is not the coordinator that made this kit: its certificate is not signed by the kit's "
            f"ca.pem ({error.verify_message}; CERTIFICATE_VERIFY_FAILED). Use the kit of this coordinator, or correct "
            "the address in site.toml. If a reverse proxy shows a certificate of its own, name its authority with "
            f"--ca-bundle.{between}",
            heals=False,
        )

    def of_status(self, response: httpx.Response) -> Trouble:
        """Explain an answer with an error status."""
        if response.status_code == httpx.codes.UNAUTHORIZED:
            skew = _clock_difference(response)
            if abs(skew) > _CLOCKS_MAY_DIFFER:
                return Trouble(
                    f"{self.address} refuses this site's signature: the two clocks differ by {abs(skew):.0f} s. Set "
                    "this machine's clock (NTP)."
                )
            return Trouble(f"{self.address} refuses this site's signature ({detail_of(response)}).")
        if may_recover(response):
            return Trouble(f"{self.address} fails with {detail_of(response)}.")
        return Trouble(
            f"What answers at {self.address} is no coordinator ({detail_of(response)}): check the address.", heals=False
        )

    def of_refusal(self, response: httpx.Response, *, heals: bool) -> Trouble:
        """Return why this site may not connect; a stock SuperLink gives no reason, ours does."""
        said = _body(response)
        remedy = "Ask the coordinator's operator for a new kit (fedhead provision --add-site)."
        if self.insecure:
            remedy = "Give this site another name, or end the process that uses it."
        if "code" not in said and said.get("detail"):
            return Trouble(f"{sentence_of(response)} {remedy}", heals=False)
        return Trouble(
            f"The coordinator at {self.address} does not accept this site: its key is not registered there, or was "
            f"revoked, or another process with the same kit is connected. End that process. {remedy}",
            heals,
        )

    def _speaks_tls(self) -> bool:
        host, _, port = self.address.rpartition(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with (
                socket.create_connection((host.strip("[]"), int(port)), timeout=5) as plain,
                context.wrap_socket(plain),
            ):
                return True
        except OSError:
            return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def may_recover(response: httpx.Response) -> bool:
    """Return whether a failing server may recover; one that does not know a request will not learn it."""
    return response.status_code >= 500 and response.status_code != httpx.codes.NOT_IMPLEMENTED


def _clock_difference(response: httpx.Response) -> float:
    """Return by how many seconds this machine's clock is ahead of the other's; 0 if it does not say its time."""
    try:
        theirs = email.utils.parsedate_to_datetime(response.headers["date"])
    except (KeyError, ValueError):
        return 0.0
    return time.time() - theirs.timestamp()


def _body(response: httpx.Response) -> dict[str, object]:
    """Return a refusal's JSON object; empty if it has none."""
    try:
        said = response.json()
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def sentence_of(response: httpx.Response) -> str:
    """Return a refusal's own words."""
    return one_line(str(_body(response).get("detail", ""))).rstrip(".") + "."


def detail_of(response: httpx.Response) -> str:
    """Return the text of a refusal, shortened."""
    said = _body(response)
    detail = one_line(str(said.get("public_message") or said.get("detail") or ""), 200).rstrip(".")
    return f"HTTP {response.status_code}" + (f": {detail}" if detail else "")
