"""The Grid of real sites: messages go through the SuperLink in this process."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from uuid import uuid4

from flwr.app import Message, RecordDict

from fedhead.flower.grids import Run
from fedhead.flower.messages import error_reply
from fedhead.logs import with_fields
from fedhead.server.grid import SiteGrid
from fedhead.server.messenger import UNREACHABLE
from fedhead.server.network.superlink import SuperLink
from fedhead.wording import counted, listed

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often it is looked whether sites are lost."""
LOG_SECONDS = 60.0
"""Time after which outstanding replies are logged, and between such lines."""
NAMED = 5
"""Sites named in one line."""


class _Asked(NamedTuple):
    """A message that was sent, and when by `time.monotonic`."""

    message: Message
    since: float


class NetworkGrid(SiteGrid):
    """Flower's Grid over the sites that are connected to a SuperLink.

    Sites are known by the name that their key is registered under; node ids change when a coordinator is started
    again. A site that is lost is answered for with an error, once its heartbeats stay away.
    """

    def __init__(self, link: SuperLink) -> None:
        self.link = link
        self._asked: dict[str, _Asked] = {}
        self._seen = 0
        self._looked = 0.0
        self._logged = time.monotonic()

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("Each site has a run of its own.")

    @property
    def run(self) -> Run:
        raise NotImplementedError("Each site has a run of its own.")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.link.online().values())

    def site_name(self, node_id: int) -> str | None:
        """Return the name that a node's key is registered under."""
        site = self.link.named(node_id)
        return site.link.name if site else None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = [message_id or uuid4().hex for message_id in self.link.send(pushed)]
        now = time.monotonic()
        self._asked.update({key: _Asked(message, now) for key, message in zip(ids, pushed, strict=True)})
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived, and an error for each lost site."""
        wanted = [message_id for message_id in message_ids if message_id in self._asked]
        self._seen = self.link.answers
        found = list(self._taken(wanted))
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            waiting = [message_id for message_id in wanted if message_id in self._asked]
            found.extend(self._lost(waiting))
            if now - self._logged > LOG_SECONDS:
                self._logged = now
                self._log_waiting()
        return found

    def wait(self, seconds: float) -> None:
        """Return when an answer has come since the last pull or wait, or after `seconds`."""
        self.link.wait_for_answer(self._seen, seconds)
        self._seen = self.link.answers

    def forget(self, message_ids: Iterable[str]) -> None:
        """Give up messages: sites that have not pulled them never will, and replies to them are dropped."""
        for message_id in message_ids:
            asked = self._asked.pop(message_id, None)
            if asked is not None:
                self.link.forget(asked.message.metadata.dst_node_id, message_id)

    def forget_all(self) -> None:
        """Give up every message, at the end of a run."""
        self.forget(list(self._asked))

    def outstanding(self) -> dict[str, tuple[str, float]]:
        """Return the sites that owe a reply, by name: the action, and for how many seconds."""
        now = time.monotonic()
        owing: dict[str, tuple[str, float]] = {}
        for message, since in list(self._asked.values()):
            if (name := self.site_name(message.metadata.dst_node_id)) is not None:
                owing[name] = (message.metadata.message_type, now - since)
        return owing

    def _log_waiting(self) -> None:
        late = {name: told for name, told in sorted(self.outstanding().items()) if told[1] > LOG_SECONDS}
        if late:
            named = [
                f"{name} ({action}, {seconds:.0f} s{self._extraction(name)})"
                for name, (action, seconds) in late.items()
            ]
            logger.info(
                "Waiting for replies of %s: %s.",
                counted(len(late), "site"),
                listed(named, NAMED),
                extra=with_fields(event="waiting", sites=sorted(late)),
            )

    def _extraction(self, name: str) -> str:
        site = self.link.sites.get(name)
        extracted = site.extracted if site else None
        return f", features of {extracted[0]:,} of {extracted[1]:,} rows" if extracted else ""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        stop = time.monotonic() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        while waiting and time.monotonic() < stop:
            self.wait(LOOK_SECONDS)
            found = self.pull_messages(waiting)
            replies.extend(found)
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
        self.forget(waiting)
        return replies

    def _taken(self, message_ids: list[str]) -> Iterator[Message]:
        for message_id in self.link.replied(message_ids):
            reply = self.link.take(self._asked[message_id].message.metadata.dst_node_id, message_id)
            if reply is not None:
                del self._asked[message_id]
                yield reply

    def _lost(self, message_ids: list[str]) -> Iterator[Message]:
        online = set(self.link.online().values())
        for message_id in message_ids:
            message = self._asked[message_id].message
            if message.metadata.dst_node_id in online:
                continue
            site = self.link.named(message.metadata.dst_node_id)
            ago = f", last heard of {time.time() - site.last_seen:.0f} s ago" if site and site.last_seen else ""
            reason = f"it is not connected{ago}" if site else "it is no longer registered"
            self.forget([message_id])
            yield error_reply(message, message_id, UNREACHABLE, reason)
