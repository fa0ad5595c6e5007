"""The only file that touches what Flower does not document.

Pinned to flwr 1.41; `tests/common/test_flower.py` fails loudly when a new Flower moves any of it.
"""

import base64
import binascii
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    import httpx
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

COORDINATOR_NODE_ID = 1
"""The node id of a SuperLink, from which instructions come."""


@contextmanager
def in_process_identity(run_id: int) -> Iterator[None]:
    """Let this process create messages of a run that no SuperLink knows."""
    with keep_identity():
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 0, COORDINATOR_NODE_ID
        yield


@contextmanager
def keep_identity() -> Iterator[None]:
    """Leave this process's identity as it was, whatever Flower makes of it."""
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that a SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


def content_to_bytes(content: RecordDict) -> bytes:
    """Return what a record dictionary holds, in a form that can rest in a file."""
    from flwr.common.serde import recorddict_to_proto

    return bytes(recorddict_to_proto(content).SerializeToString(deterministic=True))


def content_from_bytes(blob: bytes) -> RecordDict:
    """Read what `content_to_bytes` returned.

    Raises:
        ValueError: if it is anything else.
    """
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
    from google.protobuf.message import DecodeError

    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(blob))
    except DecodeError as error:
        raise ValueError("it is not a serialised record dictionary") from error


WAIT_HEADER = "x-fedhead-wait"
"""On a pull: for how many seconds the coordinator may hold it until there is a message. Others ignore it."""
SITE_HEADER = "x-fedhead-site"
"""What a site calls itself: its name, where it makes its own key (`--insecure`), and else what its key must be
registered as."""
PROCESS_HEADER = "x-fedhead-process"
"""Tells processes of one site apart: to a new one, what is still unanswered is delivered again."""


@dataclass(frozen=True)
class Delivery:
    """A message that was pulled, still without content, and the ids of the objects that make up its content."""

    message: Message
    objects: tuple[str, ...]


class FleetClient:
    """A site's end of Flower's Fleet API: a method per request.

    Requests raise `httpx.HTTPStatusError` for a refusal and `httpx.TransportError` where there is no answer; unlike
    Flower's own connection, nothing here ends the process or retries.

    Args:
        address: `host:port` of the SuperLink.
        key: what the site proves its identity with.
        root_certificates: PEM, for TLS; None is plain HTTP, which then never goes through a proxy.
        wait: seconds to ask the coordinator to hold a pull that finds nothing.
        name: of the site; a coordinator without registered keys knows it by that.
    """

    def __init__(
        self,
        address: str,
        key: "EllipticCurvePrivateKey",
        root_certificates: bytes | None,
        wait: int,
        name: str = "",
    ) -> None:
        import httpx
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        self._public_key = public_key_to_bytes(key.public_key())
        self._wait = wait
        self._headers = {PROCESS_HEADER: secrets.token_hex(16), SITE_HEADER: name}
        insecure = root_certificates is None
        self._client = FleetHttpClient.from_server_address(
            address, insecure, root_certificates, [NodeAuthHttpInterceptor(key, key.public_key()), self]
        )
        if insecure:
            self._client._client.close()
            self._client._client = httpx.Client(trust_env=False, timeout=30.0)
        self._client._client.follow_redirects = False

    def intercept(self, context: "ProtobufRequestContext", call_next: "ProtobufCall") -> "httpx.Response":
        """Say who asks, and ask for long polling where something is pulled; called by Flower for each request."""
        context.request.headers.update(self._headers)
        if context.rpc_method.endswith("/PullMessages"):
            context.request.headers[WAIT_HEADER] = str(self._wait)
            context.request.extensions["timeout"]["read"] = self._wait + 15.0
        return call_next(context)

    def register(self) -> None:
        """Make the key known to a SuperLink that does not authenticate nodes."""
        from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest

        self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._public_key))

    def activate(self, heartbeat_interval: float) -> int:
        """Return the node id that the SuperLink knows the key by; from now on messages can arrive."""
        from flwr.proto.fleet_pb2 import ActivateNodeRequest

        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=heartbeat_interval)
        return self._client.ActivateNode(request).node_id

    def deactivate(self, node_id: int) -> None:
        """Say that the site goes."""
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        """Say that the site is alive; return whether it is known, and counts as active, under this id."""
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
        from flwr.proto.node_pb2 import Node

        request = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=heartbeat_interval)
        return self._client.SendNodeHeartbeat(request).success

    def pull(self, node_id: int) -> Delivery | None:
        """Return the next message for the site, if there is one."""
        from flwr.common.serde import message_from_proto
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        pulled = self._client.PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))
        if not pulled.messages_list:
            return None
        objects = {tree.object_id: None for tree in iterate_object_tree(pulled.message_object_trees[0])}
        return Delivery(message_from_proto(pulled.messages_list[0]), tuple(objects))

    def pull_object(self, message: Message, object_id: str) -> bytes | None:
        """Return one of a message's objects, or None while it is not there yet.

        Raises:
            ValueError: if it is not there, or not what its id says.
        """
        from flwr.proto.message_pb2 import PullObjectRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import get_object_id

        about = message.metadata
        node = Node(node_id=about.dst_node_id)
        pulled = self._client.PullObject(PullObjectRequest(node=node, run_id=about.run_id, object_id=object_id))
        if not pulled.object_found:
            raise ValueError("a part of the message is gone")
        if not pulled.object_available:
            return None
        if get_object_id(pulled.object_content) != object_id:
            raise ValueError("a part of the message is not what its digest says")
        return pulled.object_content

    def confirm(self, message: Message) -> None:
        """Say that all of a message has arrived."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.proto.node_pb2 import Node

        about = message.metadata
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=about.dst_node_id), run_id=about.run_id, message_object_id=about.message_id
        )
        self._client.ConfirmMessageReceived(request)

    def push(self, reply: Message, tree: "ObjectTree", seconds: float) -> tuple[str, frozenset[str]]:
        """Announce a reply that took `seconds` to make; return the session, and which objects are to be pushed."""
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.node_pb2 import Node

        bare = remove_content_from_message(reply) if reply.has_content() else reply
        request = PushMessagesRequest(
            node=Node(node_id=reply.metadata.src_node_id),
            messages_list=[message_to_proto(bare)],
            message_object_trees=[tree],
            clientapp_runtime_list=[seconds],
        )
        pushed = self._client.PushMessages(request)
        return pushed.session_id, frozenset(pushed.objects_to_push)

    def push_object(self, reply: Message, session: str, object_id: str, content: bytes) -> None:
        """Push one of a reply's objects.

        Raises:
            ValueError: if the session is over.
        """
        from flwr.proto.message_pb2 import PushObjectRequest
        from flwr.proto.node_pb2 import Node

        request = PushObjectRequest(
            node=Node(node_id=reply.metadata.src_node_id),
            run_id=reply.metadata.run_id,
            session_id=session,
            object_id=object_id,
            object_content=content,
        )
        if not self._client.PushObject(request).stored:
            raise ValueError("the session in which a reply was pushed is over")

    def close(self) -> None:
        """Drop the connections."""
        self._client.close()


def assemble(delivery: Delivery, contents: dict[str, bytes]) -> Message:
    """Return a delivered message with its content, of all its objects by id; `contents` is emptied on the way.

    Raises:
        ValueError: if they do not make a message.
    """
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    message_id = delivery.message.metadata.message_id
    try:
        message = inflate_object_from_contents(message_id, contents)
    # Flower raises many kinds on objects that do not fit each other.
    except Exception as error:
        raise ValueError(f"its parts do not fit each other ({type(error).__name__})") from error
    if not isinstance(message, Message):
        raise ValueError("it is not a message")
    # The id covers what was sent; whom it was delivered to and for which run is what the SuperLink says.
    message.__dict__["_metadata"] = delivery.message.metadata
    return message


def disassemble(reply: Message) -> tuple["ObjectTree", dict[str, bytes]]:
    """Give a reply the id of its content; return its tree of objects, and each of them by id."""
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )

    with no_object_id_recompute():
        set_message_id(reply, reply.object_id)
        objects = {object_id: part.deflate() for object_id, part in get_all_nested_objects(reply).items()}
        return get_object_tree(reply), objects


FLEET_PATH, MEDIA_TYPE = "/v1/fleet/", b"application/protobuf"
ACTIVATE = "activate-node"
PULL_MESSAGES, PUSH_MESSAGES, CONFIRM = "pull-messages", "push-messages", "confirm-message-received"
PUSH_OBJECT = "push-object"


class IdentityError(Exception):
    """A request does not prove whose it is; `reason` says why in a word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooLargeError(Exception):
    """What a site pushes is more than the coordinator takes."""


@lru_cache(maxsize=4096)
def _public_key(pem: bytes) -> "EllipticCurvePublicKey":
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    return bytes_to_public_key(pem)


def signed_headers(key: "EllipticCurvePrivateKey") -> dict[str, str]:
    """Return the headers by which a request proves to be of a key's owner."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    timestamp = now().isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, timestamp.encode())).decode(),
    }


def proven_key(headers: Mapping[bytes, bytes], now: datetime | None = None) -> bytes:
    """Return the public key, as PEM, whose owner signed a request a short while ago, as Flower's node authentication.

    Raises:
        IdentityError: if nobody did: `unsigned`, `clock` (signed long ago, or in the future) or `forged`.
    """
    from cryptography.exceptions import InvalidSignature
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.date import now as flower_now
    from flwr.supercore.primitives.asymmetric import verify_signature

    try:
        public = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        signature = base64.b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
        timestamp = headers[TIMESTAMP_HEADER.encode()]
        age = ((now or flower_now()) - datetime.fromisoformat(timestamp.decode("ascii"))).total_seconds()
    except (KeyError, ValueError, TypeError, binascii.Error):
        raise IdentityError("unsigned") from None
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        raise IdentityError("clock")
    try:
        genuine = verify_signature(_public_key(public), timestamp, signature)
    except (ValueError, TypeError, AttributeError, InvalidSignature):
        genuine = False
    if not genuine:
        raise IdentityError("forged")
    return public


@cache
def fleet_requests() -> Mapping[str, tuple[type[Any], Callable[[Any, Any], Any]]]:
    """Return the type of each request of the Fleet API that a site with a registered key makes, and its handler."""
    from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
    from flwr.superlink.servicer.fleet import fleet_handlers as handlers

    return {
        ACTIVATE: (fleet_pb2.ActivateNodeRequest, handlers.activate_node),
        "deactivate-node": (fleet_pb2.DeactivateNodeRequest, handlers.deactivate_node),
        "send-node-heartbeat": (heartbeat_pb2.SendNodeHeartbeatRequest, handlers.send_node_heartbeat),
        PULL_MESSAGES: (
            fleet_pb2.PullMessagesRequest,
            lambda request, state: handlers.pull_messages(request, state, state.object_store),
        ),
        PUSH_MESSAGES: (fleet_pb2.PushMessagesRequest, handlers.push_messages),
        "get-run": (run_pb2.GetRunRequest, handlers.get_run),
        "get-fab": (fab_pb2.GetFabRequest, handlers.get_fab),
        PUSH_OBJECT: (message_pb2.PushObjectRequest, handlers.push_object),
        "pull-object": (message_pb2.PullObjectRequest, handlers.pull_object),
        CONFIRM: (
            message_pb2.ConfirmMessageReceivedRequest,
            lambda request, state: handlers.confirm_message_received(request, state, state.object_store),
        ),
    }


@contextmanager
def packing() -> Iterator[None]:
    """Compute the id of each content once, however many messages carry it: within this, contents must not change."""
    from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute

    with no_object_id_recompute():
        yield


@dataclass(frozen=True)
class PackedContent:
    """A message's content as the objects that Flower sends it in: packed once, whoever it goes to."""

    tree: "ObjectTree"
    objects: Mapping[str, bytes]

    @classmethod
    def of(cls, content: RecordDict) -> "PackedContent":
        """Pack a content; within `packing`."""
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

        objects = {object_id: part.deflate() for object_id, part in get_all_nested_objects(content).items()}
        return cls(get_object_tree(content), objects)


@dataclass
class _Sent:
    """An instruction that is not answered yet, and what has come of its reply.

    Attributes:
        bare: the message without its content.
        tree: of the message's objects.
        objects: by id.
        delivered: when the site pulled it, by `time.monotonic`; None before.
        confirmed: whether the site said that all of it arrived.
        missing: the reply's objects that are not here yet; None before it is announced.
        reply_bytes: of the reply's objects that are here.
    """

    bare: Message
    tree: "ObjectTree"
    objects: Mapping[str, bytes]
    delivered: float | None = None
    confirmed: bool = False
    missing: set[str] | None = None
    reply_bytes: int = 0


class SiteLink:
    """Flower's link state, object store and request handlers, for one site alone.

    In a state that sites share, a registered site can forge another's reply, read what is addressed to it and delete
    it (Flower 1.41). Here whatever a site sends can touch nothing but what is its own.

    Methods may be called from any thread.

    Args:
        public_key: the site's, as PEM.
        name: of the site.
        most_reply_bytes: a reply may have, over all its objects.
    """

    def __init__(self, public_key: bytes, name: str, most_reply_bytes: int = 2**29) -> None:
        from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
        from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
        from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
        from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
        from flwr.superlink.federation import NoOpFederationManager

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
        self.replies = 0
        """How many complete replies have come."""
        self._sent: dict[str, _Sent] = {}
        self._lock = threading.RLock()

    def keep_running(self) -> None:
        """Say that the run goes on; Flower ends a run of which it has not heard for a minute."""
        assert self._run.primary_task_id is not None
        self._state.acknowledge_task_heartbeat(self._run.primary_task_id)

    @property
    def online(self) -> bool:
        """Whether the site was heard of within twice its heartbeat interval."""
        return bool(self._state.get_nodes(self._run.run_id))

    @property
    def online_until(self) -> float:
        """When it will be given up unless it is heard of, by `time.time`; 0.0 before it was ever there."""
        (node,) = self._state.get_node_info(node_ids=[self.node_id])
        return float(node.online_until)

    def take_over(self) -> None:
        """Let a process of the site activate its node while an earlier one, perhaps killed, still counts as active."""
        self._state.deactivate_node(self.node_id)

    def answer(self, request_name: str, body: bytes) -> tuple[int, bytes]:
        """Answer a request of the site's, whose identity is proven; return the HTTP status and the body.

        A refusal's body is JSON, of which `detail` is a sentence.
        """
        from flwr.supercore.error import FlowerError
        from flwr.supercore.error.catalog import API_ERROR_MAP
        from google.protobuf.message import DecodeError

        request_type, handler = fleet_requests()[request_name]
        with self._lock:
            try:
                request = request_type.FromString(body)
                self._check(request_name, request)
                response = handler(request, self._state)
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
                return refusal(400, f"The request is not what it should be: {error}.")
            self._note(request_name, request, response)
            return 200, response.SerializeToString()

    def _check(self, request_name: str, request: Any) -> None:
        """Check that a request speaks for this site alone.

        Raises:
            IdentityError: if it names another node.
            ValueError: if what it pushes is not one reply of this site.
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
        if request_name == PUSH_OBJECT:
            held = sum(sent.reply_bytes for sent in self._sent.values())
            if held + len(request.object_content) > self.most_reply_bytes:
                raise TooLargeError(f"Replies of more than {self.most_reply_bytes} bytes are not taken.")

    def _note(self, request_name: str, request: Any, response: Any) -> None:
        """Keep track of what was delivered, and of what has come of replies."""
        if request_name == PULL_MESSAGES:
            for message in response.messages_list:
                self._sent[message.metadata.message_id].delivered = time.monotonic()
        elif request_name == CONFIRM and request.message_object_id in self._sent:
            self._sent[request.message_object_id].confirmed = True
        elif request_name == PUSH_MESSAGES:
            metadata = request.messages_list[0].metadata
            stored = self._state.message_ins_id_to_message_res_id.get(metadata.reply_to_message_id)
            if stored == metadata.message_id and metadata.reply_to_message_id in self._sent:
                missing = self._sent[metadata.reply_to_message_id].missing = set(response.objects_to_push)
                self.replies += not missing
        elif request_name == PUSH_OBJECT and response.stored:
            for sent in self._sent.values():
                if sent.missing and request.object_id in sent.missing:
                    sent.missing.discard(request.object_id)
                    sent.reply_bytes += len(request.object_content)
                    self.replies += not sent.missing

    def send(self, message: Message, content: PackedContent) -> str | None:
        """Hold a message for the site to pull; return its id, or None if the site was never there.

        Call it within `packing`.
        """
        from flwr.app.message import remove_content_from_message
        from flwr.proto.message_pb2 import ObjectTree

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

    def deliver_again(self, unconfirmed_for: float | None = None) -> int:
        """Hold messages once more that the site pulled but has not answered; return how many.

        Args:
            unconfirmed_for: only those of which it has not said, in so many seconds, that all of it arrived.
        """
        again = 0
        with self._lock:
            for message_id, sent in self._sent.items():
                if sent.delivered is None or sent.missing == set():
                    continue
                waited = time.monotonic() - sent.delivered
                if unconfirmed_for is not None and (sent.confirmed or waited < unconfirmed_for):
                    continue
                self._discard(message_id)
                sent.delivered, sent.confirmed, sent.missing, sent.reply_bytes = None, False, None, 0
                sent.bare.metadata.delivered_at = ""
                again += self._store(sent)
        return again

    def take(self, message_id: str) -> Message | None:
        """Return the reply to a message once all of it is here, and forget both.

        What the reply says of itself counts for nothing: it answers what it was stored as the answer to. One that
        cannot be read is returned as an error.
        """
        from flwr.app.message import make_message
        from flwr.common.constant import ErrorCode
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        with self._lock:
            sent = self._sent.get(message_id)
            if sent is None or sent.missing is None or sent.missing:
                return None
            stored = self._state.message_res_store[self._state.message_ins_id_to_message_res_id[message_id]]
            reply_id = stored.metadata.message_id
            tree = self._state.object_store.get_object_tree(reply_id)
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
        """Drop a message, and what has come of its reply."""
        with self._lock:
            if self._sent.pop(message_id, None) is not None:
                self._discard(message_id)

    def _discard(self, message_id: str) -> None:
        reply_id = self._state.message_ins_id_to_message_res_id.get(message_id)
        self._state.delete_messages({message_id})
        for object_id in (message_id, reply_id):
            if object_id is not None:
                self._state.object_store.delete(object_id)


def refusal(status: int, sentence: str) -> tuple[int, bytes]:
    """Return a refusal as the Fleet API words it."""
    return status, json.dumps({"detail": sentence}).encode()
