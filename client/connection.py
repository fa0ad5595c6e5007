"""A site's connection to its coordinator: it stays, through restarts and lost networks, or says why it cannot."""

import email.utils
import json
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.app import Message

from fedhead.errors import FedheadError
from fedhead.files import write_atomically
from fedhead.flower import Delivery, FleetClient, assemble, disassemble

logger = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT_INTERVAL = 20.0
"""Seconds; a site that is silent for twice as long counts as gone."""
LONG_WAIT = 25
"""Seconds for which our coordinator holds a pull that finds nothing."""
PROMPT, BUSY, IDLE = 0.05, 0.5, 3.0
"""Seconds between pulls where they are not held: at first, in the minute after a message, and later."""
BUSY_FOR = 60.0
SLOWEST_RETRY = 15.0
PUSH_FOR = 900.0
"""Seconds after which a reply that cannot be delivered is given up: the run has gone on without it."""

# OpenSSL's X509_V_ERR codes of a certificate whose time is wrong, or whose name is another.
_EXPIRED, _NOT_YET_VALID, _OTHER_NAME = 10, 9, (62, 64)
_CLOCKS_MAY_DIFFER = 4.0


class CannotHealError(FedheadError):
    """The connection fails for a reason that waiting does not mend; it says what to do."""


class TakenOverError(CannotHealError):
    """Another process with this site's key took its place; started anew, this one would only take it back."""

    exit_status = 2


class WorkIsOverError(FedheadError):
    """The message at hand is of a run that has ended, or was meant for a node that this site no longer is."""


class RefusedError(WorkIsOverError):
    """The coordinator does not take what was sent; it says why."""


@dataclass(frozen=True)
class Trouble:
    """Why a request got no answer, in a sentence, and whether trying again may help."""

    sentence: str
    heals: bool = True


class Connection:
    """Receives messages and sends replies; activates the site's node, and keeps it active by heartbeats meanwhile.

    What goes wrong is said once, when it begins, and so is its end.

    Args:
        fleet: the requests.
        address: of the coordinator, for messages.
        remembered: the file that keeps the node id, so that a site killed and started again is the same node.
        insecure: whether the coordinator takes any key, and none is registered before.
        patience: seconds for which a refused key is tried again, since an earlier process may still count as active.
        beat: seconds between heartbeats.
        on_change: is told whether it is connected, when that changes.
    """

    def __init__(
        self,
        fleet: FleetClient,
        address: str,
        remembered: Path,
        *,
        insecure: bool = False,
        patience: float = 2 * HEARTBEAT_INTERVAL + 5,
        beat: float = 0.8 * HEARTBEAT_INTERVAL,
        on_change: Callable[[bool], None] = lambda connected: None,
    ) -> None:
        self.address = address
        self._fleet = fleet
        self._remembered = remembered
        self._insecure = insecure
        self._patience = patience
        self._between_beats = beat
        self._on_change = on_change
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._node: int | None = None
        self._trouble = ""
        self._connected_before = False
        self._hopeless: FedheadError | None = None
        self._pause = PROMPT
        self._last_message = float("-inf")
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def connected(self) -> bool:
        """Whether the site's node is active, as far as is known."""
        return self._node is not None and not self._trouble

    def open(self) -> None:
        """Connect, however long it takes.

        Raises:
            CannotHealError: if waiting does not help.
        """
        self._active_node()
        self._heart.start()

    def receive(self) -> Message | None:
        """Return the next message, or None after a while without one.

        Raises:
            CannotHealError: if the connection is lost for good.
            WorkIsOverError: if a message came whose run has ended since.
        """
        began = time.monotonic()
        delivery = self._ask(self._fleet.pull)
        if delivery is None:
            self._rest(time.monotonic() - began)
            return None
        self._pause, self._last_message = PROMPT, time.monotonic()
        metadata = delivery.message.metadata
        contents = {object_id: self._object(delivery, object_id) for object_id in delivery.objects}
        try:
            message = assemble(delivery, contents)
        except ValueError as error:
            raise WorkIsOverError(f"A message cannot be used: {error}.") from None
        self._ask(lambda node: self._fleet.confirm(message), of=metadata.dst_node_id)
        return message

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply that took `seconds` to make, through lost networks, for a quarter of an hour.

        Raises:
            CannotHealError: if the connection is lost for good.
            RefusedError: if the coordinator does not take it.
            WorkIsOverError: if nobody waits for it any more.
        """
        self._last_message = time.monotonic()
        give_up = time.monotonic() + PUSH_FOR
        tree, objects = disassemble(reply)
        node = reply.metadata.src_node_id
        session, wanted = self._ask(lambda _: self._fleet.push(reply, tree, seconds), of=node, until=give_up)
        for object_id, content in objects.items():
            if object_id in wanted:
                self._ask(self._pushing(reply, session, object_id, content), of=node, until=give_up)

    def _pushing(self, reply: Message, session: str, object_id: str, content: bytes) -> Callable[[int], None]:
        return lambda _: self._fleet.push_object(reply, session, object_id, content)

    def close(self, last: Message | None = None) -> None:
        """Say goodbye, if anyone listens; with `last`, a reply that ends what was being worked on."""
        if self._ending.is_set():
            return
        self._ending.set()
        node = self._node
        try:
            if node is not None and not self._trouble:
                if last is not None:
                    tree, objects = disassemble(last)
                    session, wanted = self._fleet.push(last, tree, 0.0)
                    for object_id in wanted & objects.keys():
                        self._fleet.push_object(last, session, object_id, objects[object_id])
                self._fleet.deactivate(node)
                self._remembered.unlink(missing_ok=True)
        except (httpx.HTTPError, ValueError, OSError) as error:
            logger.debug("The coordinator was not told that this site goes: %s.", error)
        self._fleet.close()

    def _ask(self, request: Callable[[int], T], of: int | None = None, until: float = float("inf")) -> T:
        """Make a request until it is answered.

        Args:
            request: takes this site's node id.
            of: the node that the request is about; if this site is another by now, it is pointless.
            until: when to give up, by `time.monotonic`.
        """
        delays = _delays()
        while True:
            node = self._active_node()
            if of not in (None, node):
                raise WorkIsOverError("The coordinator has been restarted since, and waits for this no longer.")
            try:
                answer = request(node)
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status == httpx.codes.FORBIDDEN:
                    raise WorkIsOverError("The run is over, so its work is dropped.") from None
                if status == httpx.codes.CONFLICT:
                    raise TakenOverError(f"{_body(error.response).get('detail')} A site has one process.") from None
                if status in (httpx.codes.UNAUTHORIZED, httpx.codes.PRECONDITION_FAILED):
                    self._forget(node)
                elif status < 500 and status not in (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS):
                    raise RefusedError(f"The coordinator refuses it: {_detail(error.response)}.") from None
                else:
                    self._say(Trouble(f"{self.address} fails with {_detail(error.response)}."))
            except httpx.TransportError as error:
                self._say(self._explain(error))
            except ValueError as error:
                raise WorkIsOverError(f"It was lost on the way: {error}.") from None
            else:
                self._well()
                return answer
            if time.monotonic() > until:
                raise WorkIsOverError("It could not be delivered in time.")
            self._wait(next(delays))

    def _object(self, delivery: Delivery, object_id: str) -> bytes:
        """Return a part of a message; the sender may still be storing it."""
        for delay in _delays(most=2.0, times=12):
            metadata = delivery.message.metadata
            pulled = self._ask(lambda _: self._fleet.pull_object(delivery.message, object_id), of=metadata.dst_node_id)
            if pulled is not None:
                return pulled
            self._wait(delay)
        raise WorkIsOverError("A message was announced, but a part of it never came.")

    def _rest(self, took: float) -> None:
        """Wait before the next pull, unless the coordinator held the last one."""
        if took > 1.0:
            self._pause = PROMPT
            return
        busy = time.monotonic() - self._last_message < BUSY_FOR
        self._pause = min(self._pause * 1.5, BUSY if busy else IDLE)
        self._wait(self._pause * random.uniform(0.75, 1.25))

    def _wait(self, seconds: float) -> None:
        if self._ending.wait(seconds):
            raise WorkIsOverError("The site is being stopped.")

    # Being a node.

    def _active_node(self) -> int:
        """Return the id of this site's active node, after activating it if need be."""
        with self._lock:
            if self._hopeless is not None:
                raise self._hopeless
            if self._node is None:
                try:
                    self._node = self._activate()
                except CannotHealError as error:
                    self._hopeless = error
                    raise
                self._well()
            return self._node

    def _activate(self) -> int:
        delays = _delays()
        refused_since: float | None = None
        while True:
            try:
                node = self._resume() or self._register_and_activate()
            except httpx.HTTPStatusError as error:
                now = time.monotonic()
                if error.response.status_code == httpx.codes.PRECONDITION_FAILED:
                    refused_since = refused_since or now
                    trouble = self._refused(error.response, heals=now - refused_since < self._patience)
                else:
                    refused_since = None
                    trouble = self._explain_status(error.response)
            except httpx.TransportError as error:
                trouble = self._explain(error)
            except ValueError:
                trouble = Trouble(f"What answers at {self.address} is no coordinator: check the address.", heals=False)
            else:
                self._remember(node)
                return node
            if not trouble.heals:
                raise CannotHealError(trouble.sentence)
            self._say(trouble)
            self._wait(next(delays))

    def _resume(self) -> int | None:
        """Return the node that this site was before it was killed, if it still is."""
        try:
            kept = json.loads(self._remembered.read_text())
            node = int(kept["node"]) if kept["address"] == self.address else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if node is None:
            return None
        try:
            known = self._fleet.heartbeat(node, HEARTBEAT_INTERVAL)
        except httpx.HTTPStatusError as error:
            if error.response.status_code >= 500:
                raise
            known = False
        if known:
            return node
        self._remembered.unlink(missing_ok=True)
        return None

    def _remember(self, node: int) -> None:
        try:
            write_atomically(self._remembered, json.dumps({"node": node, "address": self.address}))
        except FedheadError as error:
            # Without it, a site that is killed waits until its old node counts as gone; that is all.
            logger.warning("%s", error)

    def _register_and_activate(self) -> int:
        if self._insecure:
            try:
                self._fleet.register()
            except httpx.HTTPStatusError as error:
                # Known already, or the coordinator takes any key as it comes.
                if _may_recover(error.response):
                    raise
        return self._fleet.activate(HEARTBEAT_INTERVAL)

    def _forget(self, node: int) -> None:
        with self._lock:
            if self._node == node:
                self._node = None
                self._remembered.unlink(missing_ok=True)

    def _beat(self) -> None:
        delay = self._between_beats
        while not self._ending.wait(delay * random.uniform(0.9, 1.0)):
            delay = self._between_beats
            try:
                node = self._active_node()
                if not self._fleet.heartbeat(node, HEARTBEAT_INTERVAL):
                    self._forget(node)
                    self._active_node()
            except httpx.HTTPStatusError as error:
                if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.PRECONDITION_FAILED):
                    self._forget(node)
                delay = 1.0
            except (httpx.TransportError, ValueError):
                delay = 2.0
            except FedheadError:
                # The connection is lost for good, or being closed; whoever asks next is told.
                return
            except RuntimeError:
                if not self._ending.is_set():
                    raise

    # Saying what is wrong.

    def _say(self, trouble: Trouble) -> None:
        with self._lock:
            if trouble.sentence != self._trouble:
                self._trouble = trouble.sentence
                self._on_change(False)
                logger.warning("%s The site keeps trying.", trouble.sentence)

    def _well(self) -> None:
        if self._trouble or not self._connected_before:
            with self._lock:
                again = " again" if self._connected_before else ""
                self._trouble, self._connected_before = "", True
                self._on_change(True)
                logger.info("Connected%s to %s.", again, self.address)

    def _explain(self, error: httpx.TransportError) -> Trouble:
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return self._explain_certificate(cause)
            if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                return Trouble(
                    f"{self.address} does not speak TLS: the coordinator was started with --insecure, or something "
                    "else listens there. Check the address in site.toml, and start the coordinator with its kit.",
                    heals=False,
                )
            if isinstance(cause, socket.gaierror):
                return Trouble(f"The name of {self.address} cannot be found ({cause.strerror}).")
            if isinstance(cause, ConnectionRefusedError):
                return Trouble(f"Nothing listens at {self.address}: the coordinator is not up.")
        if self._insecure and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and self._speaks_tls():
            return Trouble(
                f"The coordinator at {self.address} speaks TLS, and this client was started with --insecure. Start it "
                "with --kit and the kit that the coordinator made for this site.",
                heals=False,
            )
        what = str(error) or type(error).__name__
        return Trouble(f"The connection to {self.address} fails ({what.rstrip('.')}).")

    def _explain_certificate(self, error: ssl.SSLCertVerificationError) -> Trouble:
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
        return Trouble(
            f"{self.address} is not the coordinator that made this kit: its certificate is not signed by the kit's "
            f"ca.pem ({error.verify_message}; CERTIFICATE_VERIFY_FAILED). Use the kit of this coordinator, or correct "
            "the address in site.toml.",
            heals=False,
        )

    def _explain_status(self, response: httpx.Response) -> Trouble:
        if response.status_code == httpx.codes.UNAUTHORIZED:
            skew = _clock_difference(response)
            if abs(skew) > _CLOCKS_MAY_DIFFER:
                return Trouble(
                    f"{self.address} refuses this site's signature: the two clocks differ by {abs(skew):.0f} s. Set "
                    "this machine's clock (NTP)."
                )
            return Trouble(f"{self.address} refuses this site's signature ({_detail(response)}).")
        if _may_recover(response):
            return Trouble(f"{self.address} fails with {_detail(response)}.")
        return Trouble(
            f"What answers at {self.address} is no coordinator ({_detail(response)}): check the address.", heals=False
        )

    def _refused(self, response: httpx.Response, *, heals: bool) -> Trouble:
        """Return why this site may not connect; a stock SuperLink does not tell the reasons apart, ours does."""
        said = _body(response)
        remedy = "Ask the coordinator's operator for a new kit (fedhead provision --add-site)."
        if self._insecure:
            remedy = "Give this site another name, or end what has it."
        if "code" not in said and said.get("detail"):
            return Trouble(f"{str(said['detail'])[:500].rstrip('.')}. {remedy}", heals=False)
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


def _delays(first: float = 0.25, most: float = SLOWEST_RETRY, times: int | None = None) -> Iterator[float]:
    """Yield ever longer delays with jitter, so that many sites do not come back all at once."""
    delay = first
    while times is None or times > 0:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(delay * 2, most)
        times = None if times is None else times - 1


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _may_recover(response: httpx.Response) -> bool:
    """Tell whether a server fails that may be well later; one that does not know such a request will not learn it."""
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
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _detail(response: httpx.Response) -> str:
    """Return what a refusal says, shortened."""
    said = _body(response)
    detail = str(said.get("public_message") or said.get("detail") or "")[:200].rstrip(".")
    return f"HTTP {response.status_code}" + (f": {detail}" if detail else "")
