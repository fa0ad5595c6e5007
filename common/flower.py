"""The only file that touches what Flower does not document.

Pinned to flwr 1.41; `tests/common/test_flower.py` fails loudly when a new Flower moves any of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    import httpx
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

COORDINATOR_NODE_ID = 1
"""The node id of a SuperLink, from which instructions come."""


@contextmanager
def in_process_identity(run_id: int) -> Iterator[None]:
    """Let this process create messages of a run that no SuperLink knows."""
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 0, COORDINATOR_NODE_ID
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
    """

    def __init__(
        self, address: str, key: "EllipticCurvePrivateKey", root_certificates: bytes | None, wait: int
    ) -> None:
        import httpx
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        self._public_key = public_key_to_bytes(key.public_key())
        self._wait = wait
        insecure = root_certificates is None
        self._client = FleetHttpClient.from_server_address(
            address, insecure, root_certificates, [NodeAuthHttpInterceptor(key, key.public_key()), self]
        )
        if insecure:
            self._client._client.close()
            self._client._client = httpx.Client(trust_env=False, timeout=30.0)
        self._client._client.follow_redirects = False

    def intercept(self, context: "ProtobufRequestContext", call_next: "ProtobufCall") -> "httpx.Response":
        """Ask for long polling where something is pulled; called by Flower for each request."""
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
