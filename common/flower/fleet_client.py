"""A site's end of Flower's Fleet API."""

import secrets
import ssl
from collections.abc import Callable, Iterator, Mapping

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedhead.addresses import proxy_of, split_address
from fedhead.errors import UserError
from fedhead.flower.fleet_api import FLEET_PATH, PULL_OBJECT
from fedhead.flower.inline import INLINE_HEADER, MOST_INLINE_BYTES, add_objects, fitting, objects_of
from fedhead.flower.messages import Delivery
from fedhead.flower.signing import signed_headers

WAIT_HEADER = "x-fedhead-wait"
"""On a pull: for how many seconds the coordinator may hold it until there is a message. Others ignore it."""
SITE_HEADER = "x-fedhead-site"
"""The site's own name: with `--insecure` it names the site, otherwise its key must be registered under this name."""
PROCESS_HEADER = "x-fedhead-process"
"""Random id of the site's process; a new process gets the messages that an earlier one left unanswered."""
COUNTS_HEADER = "x-fedhead-counts"
"""Header of answers by a coordinator that counts pulls as heartbeats."""
EXTRACTED_HEADER = "x-fedhead-extracted"
"""While features are extracted: `DONE/ROWS`, for the coordinator's status."""

MOST_OBJECTS = 1000
"""Parts of a message; ours have four."""
MOST_OBJECT_BYTES = 2**29
"""Limit on the answer to a request for an object."""
MOST_RESPONSE_BYTES = 2**22
"""Limit on other answers; a message of many small parts takes more memory than bytes."""
TIMEOUT = httpx.Timeout(30.0, connect=10.0, write=20.0)
"""Short, so that a lost network is noticed soon; every request may be repeated."""
HOLD_MARGIN_SECONDS = 10.0
"""Time to wait for a pull's answer beyond the time for which the coordinator may hold it."""


def tls_context(root_certificates: bytes) -> ssl.SSLContext:
    """Return a context that trusts the authorities in a PEM text and no others.

    Raises:
        UserError: if it holds no certificate, or a damaged one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=root_certificates.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise UserError(f"The certificates of ca.pem and --ca-bundle cannot be used: {error}.") from None
    return context


class BrokenPartError(ValueError):
    """A part of a message is gone or damaged; the message has to be delivered again."""


class FleetClient:
    """A site's end of Flower's Fleet API: a method per request.

    Requests raise `httpx.HTTPStatusError` for a refusal and `httpx.TransportError` where there is no answer; unlike
    Flower's own connection, nothing here ends the process or retries.

    Args:
        address: `host:port` of the SuperLink.
        key: the key that proves the site's identity.
        root_certificates: PEM, for TLS; None is plain HTTP, which then never goes through a proxy.
        wait: seconds to ask the coordinator to hold a pull that finds nothing.
        name: of the site; a coordinator without registered keys knows it by that.
        extraction: gives the rows whose features are extracted and those to extract; None between extractions.

    Attributes:
        proxy: the URL of the proxy that it connects through; empty for none.
        pulls_count: whether the coordinator counts pulls as heartbeats, by the header of its last answer to one.

    Raises:
        UserError: if a certificate or the environment's proxy cannot be used.
    """

    def __init__(
        self,
        address: str,
        key: EllipticCurvePrivateKey,
        root_certificates: bytes | None,
        wait: int,
        name: str = "",
        extraction: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> None:
        self._extraction = extraction
        self._key = key
        self._public_key = public_key_to_bytes(key.public_key())
        self._wait = wait
        self._hold = True
        self._inlines = False
        self.pulls_count = False
        self._headers = {PROCESS_HEADER: secrets.token_hex(16), SITE_HEADER: name, "accept-encoding": "identity"}
        self._client = FleetHttpClient.from_server_address(
            address, root_certificates is None, None, [NodeAuthHttpInterceptor(key, key.public_key()), self]
        )
        self._client._client.close()
        self.proxy = "" if root_certificates is None else proxy_of(*split_address(address))
        self._client._client = httpx.Client(
            verify=True if root_certificates is None else tls_context(root_certificates),
            proxy=self.proxy or None,
            trust_env=False,
            timeout=TIMEOUT,
            follow_redirects=False,
            event_hooks={"response": [_bounded]},
        )

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Name the sender, ask for long polling of pulls, and sign the request; Flower calls it for each request."""
        context.request.headers.update(self._headers)
        if (extracted := self._extraction()) is not None:
            context.request.headers[EXTRACTED_HEADER] = f"{extracted[0]}/{extracted[1]}"
        if context.rpc_method.endswith("/PullMessages"):
            context.request.headers[INLINE_HEADER] = str(MOST_INLINE_BYTES)
            if self._hold:
                context.request.headers[WAIT_HEADER] = str(self._wait)
                context.request.extensions["timeout"]["read"] = self._wait + HOLD_MARGIN_SECONDS
        request = context.request
        path, timestamp = request.url.raw_path.decode(), request.headers[TIMESTAMP_HEADER]
        request.headers.update(signed_headers(self._key, path, request.content, request.headers, timestamp))
        response = call_next(context)
        if context.rpc_method.endswith("/PullMessages"):
            self.pulls_count = COUNTS_HEADER in response.headers
        return response

    def register(self) -> None:
        """Make the key known to a SuperLink that does not authenticate nodes."""
        self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._public_key))

    def activate(self, heartbeat_interval: float) -> int:
        """Return the node id that the SuperLink knows the key by; from now on messages can arrive."""
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=heartbeat_interval)
        return self._client.ActivateNode(request).node_id

    def deactivate(self, node_id: int) -> None:
        """Announce that the site leaves."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        """Say that the site is alive; return whether it is known, and counts as active, under this id."""
        request = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=heartbeat_interval)
        return self._client.SendNodeHeartbeat(request).success

    def pull(self, node_id: int, *, hold: bool = True) -> Delivery | None:
        """Return the next message for the site, if there is one, with those of its objects that came with it.

        Args:
            node_id: the site's.
            hold: whether to wait for one; False only checks that the coordinator answers.
        """
        self._hold = hold
        pulled = self._client.PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))
        if not pulled.messages_list:
            return None
        try:
            objects = {tree.object_id: None for tree in iterate_object_tree(pulled.message_object_trees[0])}
            message = message_from_proto(pulled.messages_list[0])
            contents = objects_of(pulled.SerializeToString(), MOST_OBJECTS)
        # Flower raises many kinds on a message that no honest coordinator sends.
        except Exception as error:
            raise ValueError(f"it holds no message: {type(error).__name__}") from None
        if len(objects) > MOST_OBJECTS:
            raise ValueError(f"its message has {len(objects)} parts")
        self._inlines = bool(contents)
        return Delivery(message, tuple(objects), {each: contents[each] for each in objects if each in contents})

    def pull_object(self, message: Message, object_id: str) -> bytes | None:
        """Return one of a message's objects, or None while it is not there yet.

        Raises:
            BrokenPartError: if it is gone, or does not have the digest that is its id.
        """
        about = message.metadata
        node = Node(node_id=about.dst_node_id)
        pulled = self._client.PullObject(PullObjectRequest(node=node, run_id=about.run_id, object_id=object_id))
        if not pulled.object_found:
            raise BrokenPartError("a part of the message is gone")
        if not pulled.object_available:
            return None
        if get_object_id(pulled.object_content) != object_id:
            raise BrokenPartError("a part of the message does not have its digest")
        return pulled.object_content

    def confirm(self, message: Message) -> None:
        """Say that all of a message has arrived."""
        about = message.metadata
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=about.dst_node_id), run_id=about.run_id, message_object_id=about.message_id
        )
        self._client.ConfirmMessageReceived(request)

    def push(
        self, reply: Message, tree: ObjectTree, seconds: float, objects: Mapping[str, bytes] | None = None
    ) -> tuple[str, frozenset[str]]:
        """Announce a reply, with its objects if the coordinator takes them so and they are small.

        Args:
            reply: the reply.
            tree: of its objects.
            seconds: that it took to make.
            objects: its objects by id; None announces it alone.

        Returns:
            The session, and which objects are still to be pushed.
        """
        bare = remove_content_from_message(reply) if reply.has_content() else reply
        request = PushMessagesRequest(
            node=Node(node_id=reply.metadata.src_node_id),
            messages_list=[message_to_proto(bare)],
            message_object_trees=[tree],
            clientapp_runtime_list=[seconds],
        )
        if objects and self._inlines:
            add_objects(request, fitting(objects, MOST_INLINE_BYTES).values())
        pushed = self._client.PushMessages(request)
        return pushed.session_id, frozenset(pushed.objects_to_push)

    def push_object(self, reply: Message, session: str, object_id: str, content: bytes) -> bool:
        """Push one of a reply's objects; return whether it was stored, else its session is over."""
        request = PushObjectRequest(
            node=Node(node_id=reply.metadata.src_node_id),
            run_id=reply.metadata.run_id,
            session_id=session,
            object_id=object_id,
            object_content=content,
        )
        return bool(self._client.PushObject(request).stored)

    def close(self) -> None:
        """Drop the connections."""
        self._client.close()


class _Bounded(httpx.SyncByteStream):
    """A body that fails once it is too large."""

    def __init__(self, body: httpx.SyncByteStream, most: int) -> None:
        self._body = body
        self._most = most

    def __iter__(self) -> Iterator[bytes]:
        count = 0
        for block in self._body:
            count += len(block)
            if count > self._most:
                raise httpx.RemoteProtocolError("the answer is too large")
            yield block

    def close(self) -> None:
        self._body.close()


def _bounded(response: httpx.Response) -> None:
    """Refuse an answer that is compressed, which may be small and become large, and bound its size."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx.RemoteProtocolError("the answer is compressed")
    assert isinstance(response.stream, httpx.SyncByteStream)
    is_object = response.request.url.path == f"{FLEET_PATH}{PULL_OBJECT}"
    response.stream = _Bounded(response.stream, MOST_OBJECT_BYTES if is_object else MOST_RESPONSE_BYTES)
