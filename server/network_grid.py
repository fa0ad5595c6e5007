"""The Grid of real sites: messages go through the SuperLink in this process."""

import time
from collections.abc import Iterable, Iterator
from uuid import uuid4

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedhead.server.exchange import UNREACHABLE
from fedhead.server.superlink import SuperLink

LOOK_SECONDS = 0.5
"""How often it is looked whether sites are lost."""


class NetworkGrid(Grid):
    """Flower's Grid over the sites that are connected to a SuperLink.

    Sites are known by the name that their key is registered under; node ids change when a coordinator is started
    again. A site that is lost is answered for with an error, once its heartbeats stay away.
    """

    def __init__(self, link: SuperLink) -> None:
        self.link = link
        self._asked: dict[str, Message] = {}
        self._seen = 0
        self._looked = 0.0

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
        self._asked.update(zip(ids, pushed, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, and an error for each site that is lost."""
        wanted = [message_id for message_id in message_ids if message_id in self._asked]
        self._seen = self.link.answers
        found = list(self._taken(wanted))
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            found.extend(self._lost([message_id for message_id in wanted if message_id in self._asked]))
        return found

    def wait(self, seconds: float) -> None:
        """Return when an answer has come since the last pull or wait, or after `seconds`."""
        self.link.wait_for_answer(self._seen, seconds)
        self._seen = self.link.answers

    def forget(self, message_ids: Iterable[str]) -> None:
        """Give up messages: sites that have not pulled them never will, and replies to them are dropped."""
        for message_id in message_ids:
            message = self._asked.pop(message_id, None)
            site = self.link.named(message.metadata.dst_node_id) if message else None
            if site is not None:
                site.link.forget(message_id)

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
        for message_id in message_ids:
            message = self._asked.get(message_id)
            site = self.link.named(message.metadata.dst_node_id) if message else None
            reply = site.link.take(message_id) if site else None
            if reply is not None:
                del self._asked[message_id]
                yield reply

    def _lost(self, message_ids: list[str]) -> Iterator[Message]:
        online = set(self.link.online().values())
        for message_id in message_ids:
            message = self._asked[message_id]
            if message.metadata.dst_node_id in online:
                continue
            site = self.link.named(message.metadata.dst_node_id)
            ago = f", last heard of {time.time() - site.last_seen:.0f} s ago" if site and site.last_seen else ""
            reason = f"it is not connected{ago}" if site else "it is no longer registered"
            self.forget([message_id])
            error = Message(Error(UNREACHABLE, reason), reply_to=message)
            error.metadata.__dict__["_reply_to_message_id"] = message_id
            yield error
