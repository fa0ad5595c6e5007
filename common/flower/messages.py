"""Messages: their ids, their bytes, and the objects that Flower splits them into."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that a SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


def error_reply(message: Message, message_id: str, code: int, reason: str) -> Message:
    """Return an error that answers the message known as `message_id`."""
    error = Message(Error(code, reason), reply_to=message)
    error.metadata.__dict__["_reply_to_message_id"] = message_id
    return error


def content_to_bytes(content: RecordDict) -> bytes:
    """Serialise a record dictionary for a file."""
    return bytes(recorddict_to_proto(content).SerializeToString(deterministic=True))


def content_from_bytes(blob: bytes) -> RecordDict:
    """Undo `content_to_bytes`.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(blob))
    except DecodeError as error:
        raise ValueError("it is not a serialised record dictionary") from error


@dataclass(frozen=True)
class Delivery:
    """A pulled message, without content yet.

    Attributes:
        message: the message.
        objects: the ids of the objects that make up its content.
        contents: of those objects that came with it, by id.
    """

    message: Message
    objects: tuple[str, ...]
    contents: Mapping[str, bytes] = field(default_factory=dict)


def assemble(delivery: Delivery, contents: dict[str, bytes]) -> Message:
    """Return a delivered message with its content.

    Args:
        delivery: the pulled message.
        contents: all of its objects by id; emptied.

    Raises:
        ValueError: if they do not make a message.
    """
    message_id = delivery.message.metadata.message_id
    try:
        message = inflate_object_from_contents(message_id, contents)
    # Flower raises many kinds on objects that do not fit each other.
    except Exception as error:
        raise ValueError(f"its parts do not fit each other ({type(error).__name__})") from error
    if not isinstance(message, Message):
        raise ValueError("it is not a message")
    # The id covers the sent message; recipient and run are those that the SuperLink names.
    message.__dict__["_metadata"] = delivery.message.metadata
    return message


def disassemble(reply: Message) -> tuple[ObjectTree, dict[str, bytes]]:
    """Give a reply the id of its content; return its tree of objects, and each object by id."""
    with no_object_id_recompute():
        set_message_id(reply, reply.object_id)
        objects = {object_id: part.deflate() for object_id, part in get_all_nested_objects(reply).items()}
        return get_object_tree(reply), objects


@contextmanager
def packing() -> Iterator[None]:
    """Compute the id of each content once, however many messages carry it; contents must not change meanwhile."""
    with no_object_id_recompute():
        yield


@dataclass(frozen=True)
class PackedContent:
    """The objects of a message's content, packed once for all recipients."""

    tree: ObjectTree
    objects: Mapping[str, bytes]

    @classmethod
    def of(cls, content: RecordDict) -> "PackedContent":
        """Pack a content; call it within `packing`."""
        objects = {object_id: part.deflate() for object_id, part in get_all_nested_objects(content).items()}
        return cls(get_object_tree(content), objects)
