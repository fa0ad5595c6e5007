"""A site's connection to its coordinator: it stays, through restarts and lost networks, or says why it cannot."""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.app import Message

from fedhead.client.troubles import Trouble, Troubles, detail_of, may_recover, sentence_of
from fedhead.errors import FedheadError
from fedhead.files import write_atomically
from fedhead.flower.fleet_client import BrokenPartError, FleetClient
from fedhead.flower.messages import Delivery, assemble, disassemble
from fedhead.wording import size

logger = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_SECONDS = 10.0
"""Time between heartbeats."""
HEARTBEAT_INTERVAL = 20.0
"""The interval that a site promises, in seconds; Flower regards a site as gone after twice as long."""
LONG_WAIT = 25
"""Seconds for which our coordinator holds a pull that finds nothing."""
HELD_MARGIN = 1.0
"""Seconds after its hold in which a pull still counts as a heartbeat; then the site sends heartbeats again."""
PROMPT, BUSY, IDLE = 0.05, 0.5, 3.0
"""Seconds between pulls where they are not held: at first, in the minute after a message, and later."""
BUSY_FOR = 60.0
SLOWEST_RETRY = 8.0
MOST_MESSAGE_BYTES = 2**29
PUSH_FOR = 900.0
"""Time after which a reply that cannot be delivered is given up."""


class CannotHealError(FedheadError):
    """A permanent failure of the connection; the message says what to do."""


class TakenOverError(CannotHealError):
    """Another process with this site's key took its place; started anew, this one would only take it back."""

    exit_status = 2


class WorkIsOverError(FedheadError):
    """The message at hand is of a run that has ended, or was meant for a node that this site no longer is."""


class RefusedError(WorkIsOverError):
    """The coordinator rejects a message; it says why."""


class TooLargeError(FedheadError):
    """A message has more bytes than a site takes in."""


class Connection:
    """Receives messages and sends replies; activates the site's node, and keeps it active by heartbeats meanwhile.

    Each outage is logged once at its start and once at its end.

    Args:
        fleet: the requests.
        address: of the coordinator, for messages.
        remembered: the file that keeps the node id, so that a site killed and started again is the same node.
        insecure: whether the coordinator takes any key, and none is registered before.
        retry_seconds: time in which a refused key is tried again, since an earlier process may still count as active.
        beat: seconds between heartbeats.
        on_change: called with whether it is connected when that changes.
    """

    def __init__(
        self,
        fleet: FleetClient,
        address: str,
        remembered: Path,
        *,
        insecure: bool = False,
        retry_seconds: float = 2 * HEARTBEAT_INTERVAL + 5,
        beat: float = BEAT_SECONDS,
        on_change: Callable[[bool], None] = lambda connected: None,
    ) -> None:
        self.address = address
        self._fleet = fleet
        self._troubles = Troubles(address, fleet.proxy, insecure)
        self._remembered = remembered
        self._insecure = insecure
        self._retry_seconds = retry_seconds
        self._between_beats = beat
        self._on_change = on_change
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._node: int | None = None
        self._trouble = ""
        self._connected_before = False
        self._hopeless: FedheadError | None = None
        self._pause = PROMPT
        self._pulling_since: float | None = None
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

    def receive(self, begin: Callable[[Delivery], None] = lambda delivery: None) -> Message | None:
        """Return the next message, or None after a while without one.

        Args:
            begin: called with an arriving message before its parts are pulled; an exception ends the reception.

        Raises:
            CannotHealError: if the connection is lost for good.
            WorkIsOverError: if a message came whose run has ended since.
        """
        began = time.monotonic()
        delivery = self._ask(self._pull)
        if delivery is None:
            self._rest(time.monotonic() - began)
            return None
        self._pause, self._last_message = PROMPT, time.monotonic()
        metadata = delivery.message.metadata
        begin(delivery)
        contents = dict(delivery.contents)
        apart = [object_id for object_id in delivery.objects if object_id not in contents]
        for object_id in apart:
            contents[object_id] = self._object(delivery, object_id)
            if sum(map(len, contents.values())) > MOST_MESSAGE_BYTES:
                raise TooLargeError(f"The message has more than {size(MOST_MESSAGE_BYTES)}.")
        try:
            message = assemble(delivery, contents)
        except ValueError as error:
            raise WorkIsOverError(f"A message cannot be used: {error}.") from None
        if apart:
            self._ask(lambda node: self._fleet.confirm(message), of=metadata.dst_node_id)
        return message

    def _pull(self, node: int) -> Delivery | None:
        self._pulling_since = time.monotonic()
        try:
            return self._fleet.pull(node, hold=not self._trouble)
        finally:
            self._pulling_since = None

    @property
    def _counted(self) -> bool:
        """Whether a pull is under way that counts as a heartbeat, and is not overdue."""
        since = self._pulling_since
        return since is not None and self._fleet.pulls_count and time.monotonic() - since < LONG_WAIT + HELD_MARGIN

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply that took `seconds` to make; retry for a quarter of an hour while the network is down.

        Raises:
            CannotHealError: if the connection is lost for good.
            RefusedError: if the coordinator does not take it.
            WorkIsOverError: if nobody waits for it any more.
        """
        self._last_message = time.monotonic()
        give_up = time.monotonic() + PUSH_FOR
        tree, objects = disassemble(reply)
        node = reply.metadata.src_node_id
        for delay in _delays():
            session, wanted = self._ask(
                lambda _: self._fleet.push(reply, tree, seconds, objects), of=node, until=give_up
            )
            pushes = [self._pushing(reply, session, each, objects[each]) for each in objects if each in wanted]
            if all(self._ask(push, of=node, until=give_up) for push in pushes):
                return
            # The session expired while the network was down; announced again, it gets another one.
            self._wait(delay)

    def _pushing(self, reply: Message, session: str, object_id: str, content: bytes) -> Callable[[int], bool]:
        return lambda _: self._fleet.push_object(reply, session, object_id, content)

    def close(self, last: Message | None = None) -> None:
        """Send a goodbye; with `last`, a final reply to the message in progress."""
        if self._ending.is_set():
            return
        self._ending.set()
        node = self._node
        try:
            if node is not None and not self._trouble:
                if last is not None:
                    tree, objects = disassemble(last)
                    session, wanted = self._fleet.push(last, tree, 0.0, objects)
                    for object_id in wanted & objects.keys():
                        self._fleet.push_object(last, session, object_id, objects[object_id])
                self._fleet.deactivate(node)
                self._remembered.unlink(missing_ok=True)
        except (httpx.HTTPError, ValueError, OSError) as error:
            logger.debug("The coordinator could not be notified that this site leaves: %s.", error)
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
                    raise TakenOverError(f"{sentence_of(error.response)} A site has one process.") from None
                if status in (httpx.codes.UNAUTHORIZED, httpx.codes.PRECONDITION_FAILED):
                    self._forget(node)
                elif status < 500 and status not in (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS):
                    raise RefusedError(f"The coordinator refuses it: {detail_of(error.response)}.") from None
                else:
                    self._say(Trouble(f"{self.address} fails with {detail_of(error.response)}."))
            except httpx.TransportError as error:
                self._say(self._troubles.of_transport(error))
            except BrokenPartError as error:
                raise WorkIsOverError(f"It was lost on the way: {error}.") from None
            except ValueError as error:
                self._say(Trouble(f"{self.address} gives an answer that cannot be read ({error})."))
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
                    trouble = self._troubles.of_refusal(error.response, heals=now - refused_since < self._retry_seconds)
                else:
                    refused_since = None
                    trouble = self._troubles.of_status(error.response)
            except httpx.TransportError as error:
                trouble = self._troubles.of_transport(error)
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
            kept = json.loads(self._remembered.read_text(encoding="utf-8"))
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
                if may_recover(error.response):
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
            if self._counted and self.connected:
                continue
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
                # The connection is lost for good, or being closed; the next request says so.
                return
            # Without heartbeats the site would be given up.
            except Exception as error:
                if not self._ending.is_set():
                    logger.warning("A heartbeat failed (%s: %s).", type(error).__name__, error)
                delay = 2.0

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


def _delays(first: float = 0.25, most: float = SLOWEST_RETRY, times: int | None = None) -> Iterator[float]:
    """Yield ever longer delays with jitter, so that many sites do not come back all at once."""
    delay = first
    while times is None or times > 0:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(delay * 2, most)
        times = None if times is None else times - 1
