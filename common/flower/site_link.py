"""A coordinator's end of the Fleet API, for one site."""

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PushObjectResponse
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.inflatable.inflatable_object import is_valid_sha256_hash, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.object_store import NoObjectInStoreError
from flwr.superlink.federation import NoOpFederationManager
from google.protobuf.message import DecodeError

from fedhead.flower.fleet_api import (
    ACTIVATE,
    CONFIRM,
    DEACTIVATE,
    PULL_MESSAGES,
    PUSH_MESSAGES,
    PUSH_OBJECT,
    REQUESTS,
    refusal,
)
from fedhead.flower.inline import add_objects, fitting, objects_of
from fedhead.flower.messages import PackedContent, error_reply, set_message_id
from fedhead.flower.signing import IdentityError

logger = logging.getLogger(__name__)

FIRST_REDELIVERY, SLOWEST_REDELIVERY = 0.5, 30.0
"""Seconds before an unanswered message is delivered again to a site that asks for more; doubled each time."""
UNCONFIRMED_SECONDS = 10.0
"""The same for sites that may pull while they work, and then only for messages that were never confirmed."""
MOST_OBJECTS = 100
"""Objects of one reply; a reply of fedhead has three."""


class TooLargeError(Exception):
    """A site pushes more than the coordinator takes."""


@dataclass
class _Sent:
    """An instruction that is not answered yet, and the state of its reply.

    Attributes:
        bare: the message without its content.
        tree: of the message's objects.
        objects: by id.
        delivered: when the site last pulled it, by `time.monotonic`; None while it waits to be pulled.
        deliveries: how often the site pulled it.
        confirmed: whether the site confirmed that all of it arrived.
        missing: the reply's objects that have not arrived yet; None before it is announced.
        reply_bytes: size of the reply's objects that have arrived.
        reply_tree: serialised tree of the reply's objects, as first announced.
    """

    bare: Message
    tree: ObjectTree
    objects: Mapping[str, bytes]
    delivered: float | None = None
    deliveries: int = 0
    confirmed: bool = False
    missing: set[str] | None = None
    reply_bytes: int = 0
    reply_tree: bytes = b""

    def due(self, sequential: bool) -> float | None:
        """Return when to deliver it again, by `time.monotonic`; None for never.

        Args:
            sequential: whether the site pulls only once it has answered, or given up, everything it pulled before.
        """
        if self.delivered is None or self.missing == set():
            return None
        if sequential:
            return self.delivered + min(FIRST_REDELIVERY * 2.0 ** min(self.deliveries - 1, 10), SLOWEST_REDELIVERY)
        return None if self.confirmed else self.delivered + UNCONFIRMED_SECONDS


class SiteLink:
    """Flower's link state, object store and request handlers, for one site alone.

    In a state that sites share, a registered site can forge another's reply, read messages addressed to it and delete
    them (Flower 1.41). With a state for each site, a site's requests touch nothing of another's.

    Delivery is at least once: a message is delivered until its reply is complete or it is forgotten. A request that
    the site repeats, because it lost the answer, is answered as before.

    Methods may be called from any thread.

    Args:
        public_key: the site's, as PEM.
        name: of the site.
        most_reply_bytes: limit on the size of its replies, over all their objects.
    """

    def __init__(self, public_key: bytes, name: str, most_reply_bytes: int = 2**29) -> None:
        self.name = name
        self.public_key = public_key
        self.most_reply_bytes = most_reply_bytes
        self._state = InMemoryLinkState(NoOpFederationManager(), InMemoryObjectStore())
        self.node_id = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, 0, name=name)
        run = self._state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        (self._run,) = self._state.get_run_info(run_ids=[run])
        assert self._run.primary_task_id is not None
        self._state.claim_task(self._run.primary_task_id)
        self._state.activate_task(self._run.primary_task_id)
        self._came = False
        self._completed: deque[str] = deque()
        self._sent: dict[str, _Sent] = {}
        self._lock = threading.RLock()

    def keep_running(self) -> None:
        """Report that the run continues; Flower ends a run after a minute without reports."""
        assert self._run.primary_task_id is not None
        self._state.acknowledge_task_heartbeat(self._run.primary_task_id)

    @property
    def online(self) -> bool:
        """Whether the site was heard of within twice its heartbeat interval."""
        node = self._state.nodes[self.node_id]
        return bool(node.status == NodeStatus.ONLINE and node.online_until > time.time())

    @property
    def online_until(self) -> float:
        """When it will be given up unless it is heard of, by `time.time`; 0.0 before it was ever there."""
        (node,) = self._state.get_node_info(node_ids=[self.node_id])
        return float(node.online_until)

    def note_alive(self) -> None:
        """Count a request as a heartbeat, also after a silence; a site that left must activate its node first."""
        if self._came:
            self._state.acknowledge_node_heartbeat(self.node_id, self._state.nodes[self.node_id].heartbeat_interval)

    def take_over(self) -> None:
        """Let a process of the site activate its node while an earlier one, perhaps killed, still counts as active."""
        self._state.deactivate_node(self.node_id)

    def take_completed(self) -> list[str]:
        """Return the ids of the messages whose replies became complete since the last call."""
        # Another thread may be storing an object of this site's, so each step is atomic.
        return [self._completed.popleft() for _ in range(len(self._completed))]

    def answer(self, request_name: str, body: bytes, room: int = 0) -> tuple[int, bytes]:
        """Answer a request of the site's, whose identity is proven.

        Args:
            request_name: the last part of its path.
            body: of the request.
            room: how many bytes of objects an answer with a message may carry.

        Returns:
            The HTTP status and the body; that of a refusal is JSON with a sentence as `detail`.
        """
        request_type, handler = REQUESTS[request_name]
        with self._lock:
            try:
                request = request_type.FromString(body)
                self._check(request_name, request)
                carried = objects_of(body, MOST_OBJECTS) if request_name == PUSH_MESSAGES else {}
                response = self._repeated(request_name, request)
                if response is None:
                    response = handler(request, self._state)
                    self._note(request_name, request, response)
                if request_name == PULL_MESSAGES:
                    self._carry_objects(response, room)
                self._store_carried(request, response, carried)
                return 200, response.SerializeToString()
            except TooLargeError as error:
                return refusal(413, str(error))
            except IdentityError:
                return refusal(401, "This is not the node id that the coordinator knows this site's key by.")
            except FlowerError as error:
                specification = API_ERROR_MAP[error.code]
                return refusal(specification.http_status_code, specification.public_message)
            except KeyError:
                return refusal(403, "The run is over, or is not this coordinator's.")
            except (DecodeError, ValueError, RecursionError) as error:
                return refusal(400, f"The request is malformed: {error}.")
            # Flower's handlers raise many kinds on requests that no honest site sends.
            except Exception as error:
                logger.warning("A request of %s (%s) failed: %s.", self.name, request_name, type(error).__name__)
                return refusal(400, f"The request is malformed ({type(error).__name__}).")

    def _check(self, request_name: str, request: Any) -> None:
        """Check that a request speaks for this site alone.

        Raises:
            IdentityError: if it names another node.
            ValueError: if the pushed message is not one reply of this site.
            TooLargeError: if it is too much.
        """
        if request_name == ACTIVATE:
            ours = request.public_key == self.public_key
        else:
            ours = (request.node.node_id if hasattr(request, "node") else request.node_id) == self.node_id
        if not ours:
            raise IdentityError("node")
        if request_name == PUSH_MESSAGES:
            if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
                raise ValueError("one reply is pushed at a time")
            metadata = request.messages_list[0].metadata
            if metadata.src_node_id != self.node_id:
                raise ValueError("it is a reply of another site")
            if request.message_object_trees[0].object_id != metadata.message_id:
                raise ValueError("the reply and its objects have different ids")
            self._check_tree(metadata, request.message_object_trees[0])
        if request_name == PUSH_OBJECT and not self._state.object_store.get(request.object_id):
            self._check_room(request.object_content)

    def _check_room(self, content: bytes) -> None:
        held = sum(sent.reply_bytes for sent in self._sent.values())
        if held + len(content) > self.most_reply_bytes:
            raise TooLargeError(f"Replies of more than {self.most_reply_bytes} bytes are not taken.")

    def _check_tree(self, metadata: Any, tree: ObjectTree) -> None:
        """Check that a reply's objects are few, and form a tree that is announced once.

        Flower's store registers a tree node by node and reads it recursively: shared nodes would take exponential
        time, and nodes that no reply refers to would never be deleted.

        Raises:
            ValueError: if not.
        """
        ids = [node.object_id for node in iterate_object_tree(tree)]
        if len(ids) > MOST_OBJECTS or len(set(ids)) < len(ids) or not all(map(is_valid_sha256_hash, ids)):
            raise ValueError("the reply's objects are too many, not distinct, or have invalid ids")
        if metadata.message_id in self._sent:
            raise ValueError("the reply has the id of a message")
        sent = self._sent.get(metadata.reply_to_message_id)
        if sent is None or metadata.message_id not in self._state.message_res_store:
            return
        earlier = self._state.message_ins_id_to_message_res_id.get(metadata.reply_to_message_id)
        if earlier != metadata.message_id or sent.reply_tree != tree.SerializeToString(deterministic=True):
            raise ValueError("the reply was pushed before, for another message or with other objects")

    def _repeated(self, request_name: str, request: Any) -> Any | None:
        """Return the answer to a push or confirmation that needs nothing done; None to have Flower's handler answer."""
        if request_name == CONFIRM and request.message_object_id in self._state.message_res_store:
            # The handler would delete a reply that the coordinator has not read.
            return ConfirmMessageReceivedResponse()
        if request_name == PUSH_OBJECT and self._state.object_store.get(request.object_id):
            return PushObjectResponse(stored=True)
        if request_name == PUSH_MESSAGES:
            metadata = request.messages_list[0].metadata
            sent = self._sent.get(metadata.reply_to_message_id)
            earlier = self._state.message_ins_id_to_message_res_id.get(metadata.reply_to_message_id)
            if sent is not None and sent.missing and earlier not in (None, metadata.message_id):
                # The site gave the earlier reply up before all of it had arrived.
                self._discard_reply(metadata.reply_to_message_id)
                sent.missing, sent.reply_bytes = None, 0
        return None

    def _note(self, request_name: str, request: Any, response: Any) -> None:
        """Keep track of whether the site is there, of deliveries and of replies."""
        if request_name in (ACTIVATE, DEACTIVATE):
            self._came = request_name == ACTIVATE
        elif request_name == PULL_MESSAGES:
            for message in response.messages_list:
                sent = self._sent[message.metadata.message_id]
                sent.delivered, sent.deliveries = time.monotonic(), sent.deliveries + 1
        elif request_name == CONFIRM and request.message_object_id in self._sent:
            self._sent[request.message_object_id].confirmed = True
        elif request_name == PUSH_MESSAGES:
            if not response.objects_to_push:
                self._state._cleanup_push_session(response.session_id, cleanup_messages=False)
            metadata = request.messages_list[0].metadata
            stored = self._state.message_ins_id_to_message_res_id.get(metadata.reply_to_message_id)
            sent_to = self._sent.get(metadata.reply_to_message_id)
            if stored == metadata.message_id and sent_to is not None and sent_to.missing != set():
                sent_to.missing = set(response.objects_to_push)
                sent_to.reply_tree = request.message_object_trees[0].SerializeToString(deterministic=True)
                if not sent_to.missing:
                    self._completed.append(metadata.reply_to_message_id)
        elif request_name == PUSH_OBJECT and response.stored:
            self._arrived(request.object_id, request.object_content)

    def _arrived(self, object_id: str, content: bytes) -> None:
        for message_id, sent in self._sent.items():
            if sent.missing and object_id in sent.missing:
                sent.missing.discard(object_id)
                sent.reply_bytes += len(content)
                if not sent.missing:
                    self._completed.append(message_id)

    def _carry_objects(self, response: Any, room: int) -> None:
        """Let the answer to a pull carry the objects of its message, as far as there is room."""
        for message in response.messages_list:
            add_objects(response, fitting(self._sent[message.metadata.message_id].objects, room).values())

    def _store_carried(self, request: Any, response: Any, carried: Mapping[str, bytes]) -> None:
        """Store the objects that came with a reply, so that the answer does not ask for them.

        Raises:
            TooLargeError: if they are too much.
        """
        for object_id in [each for each in carried if each in response.objects_to_push]:
            self._check_room(carried[object_id])
            run_id = request.messages_list[0].metadata.run_id
            if self._state.store_object(run_id, response.session_id, object_id, carried[object_id]):
                response.objects_to_push.remove(object_id)
                self._arrived(object_id, carried[object_id])

    def send(self, message: Message, content: PackedContent) -> str | None:
        """Hold a message for the site to pull; return its id, or None if the site was never there.

        Call it within `packing`.
        """
        with self._lock:
            message.metadata.__dict__["_run_id"] = self._run.run_id
            blob = message.deflate()
            message_id = hashlib.sha256(blob).hexdigest()
            set_message_id(message, message_id)
            tree = ObjectTree(object_id=message_id, children=[content.tree])
            sent = _Sent(remove_content_from_message(message), tree, {**content.objects, message_id: blob})
            if not self._store(sent):
                return None
            self._sent[message_id] = sent
            return message_id

    def _store(self, sent: _Sent) -> bool:
        session = self._state.start_session(self._run.run_id)
        stored, missing = self._state.store_message_and_object_tree(sent.bare, sent.tree, session)
        for object_id in missing:
            self._state.store_object(self._run.run_id, session, object_id, sent.objects[object_id])
        return stored

    def deliver_again(self) -> None:
        """Let the site pull all unanswered messages again, because its process is a new one."""
        with self._lock:
            for message_id, sent in self._sent.items():
                if sent.delivered is not None and sent.missing != set():
                    self._hold_again(message_id, sent)

    def deliver_due(self, sequential: bool) -> float:
        """Let the site pull the messages that are due again; return the seconds until the next.

        Args:
            sequential: whether it pulls only once it has answered, or given up, everything it pulled before.
        """
        now, next_due = time.monotonic(), float("inf")
        with self._lock:
            for message_id, sent in self._sent.items():
                due = sent.due(sequential)
                if due is not None and due <= now:
                    self._hold_again(message_id, sent)
                elif due is not None:
                    next_due = min(next_due, due - now)
        return next_due

    def _hold_again(self, message_id: str, sent: _Sent) -> None:
        self._discard(message_id)
        sent.delivered, sent.confirmed, sent.missing, sent.reply_bytes = None, False, None, 0
        sent.bare.metadata.delivered_at = ""
        self._store(sent)

    def take(self, message_id: str) -> Message | None:
        """Return the reply to a message once it is complete, and forget both; an unreadable one becomes an error.

        The metadata within the reply are ignored: it answers the message that it was stored as the answer to.
        """
        with self._lock:
            sent = self._sent.get(message_id)
            if sent is None or sent.missing is None or sent.missing:
                return None
            try:
                stored = self._state.message_res_store[self._state.message_ins_id_to_message_res_id[message_id]]
                reply_id = stored.metadata.message_id
                tree = self._state.object_store.get_object_tree(reply_id)
            except (KeyError, NoObjectInStoreError):
                self.forget(message_id)
                return error_reply(sent.bare, message_id, ErrorCode.MESSAGE_UNAVAILABLE, "it withdrew its reply")
            contents = {
                node.object_id: self._state.object_store.get(node.object_id) or b""
                for node in iterate_object_tree(tree)
            }
            self.forget(message_id)
        if stored.has_error():
            return make_message(stored.metadata, error=stored.error)
        try:
            inflated = inflate_object_from_contents(reply_id, contents)
            if not isinstance(inflated, Message):
                raise ValueError("it is not a message")
            return make_message(stored.metadata, content=inflated.content)
        # Flower raises many kinds on objects that do not fit each other.
        except Exception as error:
            reason = f"its reply cannot be read ({type(error).__name__}: {error})"
            return make_message(stored.metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))

    def forget(self, message_id: str) -> None:
        """Drop a message and its reply."""
        with self._lock:
            if self._sent.pop(message_id, None) is not None:
                self._discard(message_id)

    def _discard(self, message_id: str) -> None:
        self._discard_reply(message_id)
        self._state.delete_messages({message_id})
        self._state.object_store.delete(message_id)

    def _discard_reply(self, message_id: str) -> None:
        reply_id = self._state.message_ins_id_to_message_res_id.pop(message_id, None)
        if reply_id is not None:
            self._state.message_res_store.pop(reply_id, None)
            session = self._state._object_push_session_by_root.get(reply_id, "")
            self._state._cleanup_push_session(session, cleanup_messages=False)
            self._state.object_store.delete(reply_id)
