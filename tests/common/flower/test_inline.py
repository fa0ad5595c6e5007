"""Objects that come with their message: both ends know of them, or one is Flower's own or of an earlier version."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from google.protobuf.message import DecodeError

from fedhead.flower import in_process_identity
from fedhead.flower.fleet_api import ACTIVATE, PULL_MESSAGES, PUSH_MESSAGES
from fedhead.flower.fleet_client import MOST_OBJECTS, FleetClient
from fedhead.flower.inline import MOST_INLINE_BYTES, add_objects, fitting, objects_of
from fedhead.flower.messages import PackedContent, assemble, disassemble, packing, set_message_id
from fedhead.flower.site_link import SiteLink


@pytest.fixture(autouse=True)
def in_process() -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


def content(blob: bytes = b"what?") -> RecordDict:
    return RecordDict({"fedhead": ConfigRecord({"payload": blob})})


def digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


# The field.


def test_types_of_flower_ignore_the_objects_and_carry_them_along() -> None:
    request = fleet_pb2.PullMessagesRequest(node=Node(node_id=7))
    add_objects(request, [b"one", b"two"])
    body = request.SerializeToString()
    read = fleet_pb2.PullMessagesRequest.FromString(body)
    assert read.node.node_id == 7
    assert (
        objects_of(body, 2)
        == objects_of(read.SerializeToString(), 2)
        == {digest(b"one"): b"one", digest(b"two"): b"two"}
    )
    with pytest.raises(ValueError, match="carries 2 objects"):
        objects_of(body, 1)
    assert objects_of(fleet_pb2.PullMessagesRequest(node=Node(node_id=7)).SerializeToString(), 2) == {}


def test_a_field_of_another_type_holds_no_objects() -> None:
    number_instead = bytes([0xC0, 0x3E, 0x05])
    assert objects_of(number_instead, 2) == {}
    with pytest.raises(DecodeError):
        objects_of(bytes([0xC2, 0x3E, 0x05]) + b"cut", 2)


def test_objects_that_fit_are_chosen() -> None:
    objects = {"small": bytes(10), "large": bytes(100), "other": bytes(20)}
    assert set(fitting(objects, 30)) == {"small", "other"}
    assert set(fitting(objects, 130)) == set(objects)
    assert fitting(objects, 0) == {}


# A coordinator's end.


class Site:
    """A site that may pull and push as it likes."""

    def __init__(self, most_reply_bytes: int = 2**20) -> None:
        key = public_key_to_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
        self.link = SiteLink(key, "a", most_reply_bytes)
        self.node = Node(node_id=self.link.node_id)
        self.request(ACTIVATE, fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=30.0))

    def request(self, name: str, request: Any, room: int = 0) -> tuple[int, bytes]:
        return self.link.answer(name, request.SerializeToString(), room)

    def ask(self, asked: RecordDict) -> Message:
        """Hold a message for the site; its reply is to it."""
        message = Message(asked, self.link.node_id, "query")
        with packing():
            assert self.link.send(message, PackedContent.of(asked)) is not None
        return message

    def pull(self, room: int) -> tuple[fleet_pb2.PullMessagesResponse, dict[str, bytes]]:
        status, body = self.request(PULL_MESSAGES, fleet_pb2.PullMessagesRequest(node=self.node), room)
        assert status == 200
        return fleet_pb2.PullMessagesResponse.FromString(body), objects_of(body, MOST_OBJECTS)

    def push(self, reply: Message, objects: list[bytes]) -> tuple[int, list[str]]:
        """Push a reply with objects; return the status, and the objects that are asked for yet."""
        tree, _ = disassemble(reply)
        request = fleet_pb2.PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
        )
        add_objects(request, objects)
        status, body = self.request(PUSH_MESSAGES, request)
        wanted = fleet_pb2.PushMessagesResponse.FromString(body).objects_to_push if status == 200 else []
        return status, list(wanted)


def test_a_pull_carries_what_there_is_room_for() -> None:
    site = Site()
    site.ask(content())
    pulled, objects = site.pull(MOST_INLINE_BYTES)
    (tree,) = pulled.message_object_trees
    assert set(objects) == {tree.object_id, *(each.object_id for each in _below(tree))}
    site.link.deliver_again()
    assert site.pull(0)[1] == {}
    site.link.deliver_again()
    few = site.pull(len(min(objects.values(), key=len)))[1]
    assert 0 < len(few) < len(objects)
    assert few.items() <= objects.items()


def _below(tree: ObjectTree) -> Iterator[ObjectTree]:
    for child in tree.children:
        yield child
        yield from _below(child)


def test_a_reply_with_its_objects_is_complete_and_may_come_twice() -> None:
    site = Site()
    message = site.ask(content())
    site.pull(MOST_INLINE_BYTES)
    reply = Message(content(b"yes"), reply_to=message)
    objects = list(disassemble(reply)[1].values())
    assert site.push(reply, objects) == (200, [])
    assert site.push(reply, objects) == (200, [])
    assert site.link.take_completed() == [message.metadata.message_id]
    taken = site.link.take(message.metadata.message_id)
    assert taken is not None
    assert taken.content == content(b"yes")
    assert len(site.link._state.object_store) == 0
    assert not site.link._state._object_push_sessions


def test_objects_that_do_not_belong_to_the_reply_are_not_kept() -> None:
    site = Site()
    message = site.ask(content())
    site.pull(MOST_INLINE_BYTES)
    reply = Message(content(b"yes"), reply_to=message)
    _, objects = disassemble(reply)
    held = len(site.link._state.object_store)
    foreign = list(disassemble(Message(content(b"another"), reply_to=message))[1].values())
    status, wanted = site.push(reply, [b"junk", *foreign])
    assert (status, set(wanted)) == (200, set(objects))
    assert len(site.link._state.object_store) == held + len(objects)
    assert site.link.take(message.metadata.message_id) is None
    # A second announcement may carry the rest, or a part of it.
    some, *rest = objects.values()
    assert set(site.push(reply, [some])[1]) == set(objects) - {digest(some)}
    assert site.push(reply, rest) == (200, [])
    assert site.link.take(message.metadata.message_id) is not None


def test_too_many_or_too_large_objects_are_refused() -> None:
    site = Site(most_reply_bytes=1000)
    message = site.ask(content())
    site.pull(MOST_INLINE_BYTES)
    assert site.push(Message(content(b"yes"), reply_to=message), [bytes([n]) for n in range(101)])[0] == 400
    large = Message(content(bytes(2000)), reply_to=message)
    assert site.push(large, list(disassemble(large)[1].values()))[0] == 413
    assert site.link.take(message.metadata.message_id) is None
    assert sum(len(entry.content) for entry in site.link._state.object_store.store.values()) < 3000


def test_an_object_that_is_none_leaves_its_reply_incomplete() -> None:
    site = Site()
    message = site.ask(content())
    site.pull(MOST_INLINE_BYTES)
    reply = Message(content(b"yes"), reply_to=message)
    junk = b"no object of Flower's"
    request = fleet_pb2.PushMessagesRequest(
        node=site.node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[ObjectTree(object_id=digest(junk))],
    )
    request.messages_list[0].metadata.message_id = digest(junk)
    add_objects(request, [junk])
    status, body = site.request(PUSH_MESSAGES, request)
    assert status in (200, 400)
    assert status == 400 or list(fleet_pb2.PushMessagesResponse.FromString(body).objects_to_push) == [digest(junk)]
    assert site.link.take(message.metadata.message_id) is None


# A stock SuperLink.


@contextmanager
def stock_superlink() -> Iterator[tuple[int, Any]]:
    """Serve Flower's own app, and yield its port and link state."""
    from flwr.superlink.main import create_app

    app = create_app()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1], app.state.linkstate_factory.state()
        server.should_exit = True
        thread.join(30)


def test_a_stock_superlink_is_spoken_to_in_its_own_way() -> None:
    with stock_superlink() as (port, state):
        client = FleetClient(f"127.0.0.1:{port}", ec.generate_private_key(ec.SECP256R1()), None, 0, "a")
        client.register()
        node = client.activate(30.0)
        run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        (info,) = state.get_run_info(run_ids=[run])
        state.claim_task(info.primary_task_id)
        state.activate_task(info.primary_task_id)
        message = Message(content(), node, "query")
        message.metadata.__dict__["_run_id"] = run
        tree, objects = disassemble(message)
        set_message_id(message, tree.object_id)
        session = state.start_session(run)
        stored, missing = state.store_message_and_object_tree(remove_content_from_message(message), tree, session)
        assert stored
        for object_id in missing:
            assert state.store_object(run, session, object_id, objects[object_id])

        delivery = client.pull(node)
        assert delivery is not None
        assert delivery.contents == {}
        parts = {each: client.pull_object(delivery.message, each) or b"" for each in delivery.objects}
        pulled = assemble(delivery, parts)
        client.confirm(pulled)
        assert pulled.content == content()
        reply = Message(content(b"yes"), reply_to=pulled)
        tree, objects = disassemble(reply)
        # As if it had carried objects before: then it asks for them nevertheless.
        client._inlines = True
        session, wanted = client.push(reply, tree, 0.1, objects)
        assert wanted == set(objects)
        for object_id in wanted:
            assert client.push_object(reply, session, object_id, objects[object_id])
        (answer,) = state.get_message_res({pulled.metadata.message_id}, run)
        assert answer.metadata.message_id == tree.object_id
