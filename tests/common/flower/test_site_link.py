"""A site's requests that no honest site sends: the coordinator reads a reply, or an error, and keeps nothing else."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedhead.flower import in_process_identity
from fedhead.flower.fleet_api import ACTIVATE, CONFIRM, PULL_MESSAGES, PUSH_MESSAGES, PUSH_OBJECT
from fedhead.flower.messages import PackedContent, disassemble, packing
from fedhead.flower.site_link import MOST_OBJECTS, SiteLink


@pytest.fixture(autouse=True)
def in_process() -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


def content(text: bytes) -> RecordDict:
    return RecordDict({"fedhead": ConfigRecord({"payload": text})})


def some_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Site:
    """A site that has pulled one message, and may answer it as it likes."""

    link: SiteLink
    message: Message
    message_id: str
    run_id: int

    @property
    def node(self) -> Node:
        return Node(node_id=self.link.node_id)

    def push(self, reply_id: str, tree: ObjectTree) -> tuple[int, fleet_pb2.PushMessagesResponse]:
        proto = message_to_proto(remove_content_from_message(Message(content(b"yes"), reply_to=self.message)))
        proto.metadata.message_id = reply_id
        request = fleet_pb2.PushMessagesRequest(node=self.node, messages_list=[proto], message_object_trees=[tree])
        status, body = self.link.answer(PUSH_MESSAGES, request.SerializeToString())
        return status, fleet_pb2.PushMessagesResponse.FromString(body if status == 200 else b"")

    def reply(self) -> str:
        """Answer completely, and return the id of the reply."""
        tree, objects = disassemble(Message(content(b"yes"), reply_to=self.message))
        _, response = self.push(tree.object_id, tree)
        for object_id in response.objects_to_push:
            request = message_pb2.PushObjectRequest(
                node=self.node,
                run_id=self.run_id,
                object_id=object_id,
                object_content=objects[object_id],
                session_id=response.session_id,
            )
            self.link.answer(PUSH_OBJECT, request.SerializeToString())
        return tree.object_id

    def confirm(self, object_id: str) -> int:
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self.node, run_id=self.run_id, message_object_id=object_id
        )
        return self.link.answer(CONFIRM, request.SerializeToString())[0]


@pytest.fixture
def site() -> Site:
    key = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    link = SiteLink(key, "a")
    link.answer(ACTIVATE, fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=30.0).SerializeToString())
    asked = content(b"what?")
    message = Message(asked, link.node_id, "query")
    with packing():
        message_id = link.send(message, PackedContent.of(asked))
    assert message_id is not None
    pull = fleet_pb2.PullMessagesRequest(node=Node(node_id=link.node_id))
    status, body = link.answer(PULL_MESSAGES, pull.SerializeToString())
    (pulled,) = fleet_pb2.PullMessagesResponse.FromString(body).messages_list
    assert (status, pulled.metadata.message_id) == (200, message_id)
    return Site(link, message, message_id, pulled.metadata.run_id)


def test_a_site_cannot_delete_a_reply_that_is_complete(site: Site) -> None:
    reply_id = site.reply()
    assert site.confirm(reply_id) == 200
    reply = site.link.take(site.message_id)
    assert reply is not None
    assert reply.content == content(b"yes")


def test_a_reply_whose_objects_are_gone_is_an_error(site: Site) -> None:
    site.link._state.object_store.delete(site.reply())
    reply = site.link.take(site.message_id)
    assert reply is not None
    assert reply.error.reason == "it withdrew its reply"
    assert reply.metadata.reply_to_message_id == site.message_id


def test_shared_too_many_or_invalid_objects_are_refused(site: Site) -> None:
    root, shared = some_id("root"), ObjectTree(object_id=some_id("shared"))
    many = [ObjectTree(object_id=some_id(str(number))) for number in range(MOST_OBJECTS)]
    for children in ([shared, shared], many, [ObjectTree(object_id="none")]):
        assert site.push(root, ObjectTree(object_id=root, children=children))[0] == 400
    instruction = ObjectTree(object_id=site.message_id)
    assert site.push(site.message_id, instruction)[0] == 400
    site.reply()
    assert site.link.take(site.message_id) is not None


def test_objects_that_are_announced_again_and_again_are_not_kept(site: Site) -> None:
    state = site.link._state

    def announce(root: str, child: str) -> int:
        tree = ObjectTree(object_id=some_id(root), children=[ObjectTree(object_id=some_id(child))])
        return site.push(some_id(root), tree)[0]

    assert announce("one", "child") == 200
    assert announce("one", "child") == 200
    assert announce("one", "another child") == 400
    for number in range(10):
        assert announce(f"root {number}", f"child {number}") == 200
    assert len(state._object_push_sessions) == 1
    site.link.forget(site.message_id)
    assert len(state.object_store) == 0
    assert not state._object_push_sessions
