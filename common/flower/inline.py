"""Objects in the same request or answer as their message, which otherwise each take a request of their own.

A protobuf field that Flower's types do not have carries them. Protobuf ignores unknown fields, so a stock SuperLink
requests these objects again, one by one, and a site requests the objects that a stock SuperLink did not send.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.supercore.inflatable.inflatable_object import get_object_id
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

INLINE_HEADER = "x-fedhead-inline"
"""On a pull: how many bytes of objects its answer may carry. Others ignore it."""
MOST_INLINE_BYTES = 2**19
"""Limit on the objects of one request or answer, which with them stays below 1 MiB."""
_FIELD = 1000
"""Number of the field; Flower's types count from 1."""


def _inline_type() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="fedhead/inline.proto", package="fedhead", syntax="proto3")
    field = file.message_type.add(name="Inline").field.add(name="objects", number=_FIELD)
    field.label, field.type = field.LABEL_REPEATED, field.TYPE_BYTES
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("fedhead.Inline"))


_Inline = _inline_type()


def fitting(objects: Mapping[str, bytes], room: int) -> dict[str, bytes]:
    """Return the objects that fit into so many bytes together, in their order; larger ones are skipped."""
    found = {}
    for object_id, content in objects.items():
        if len(content) <= room:
            found[object_id] = content
            room -= len(content)
    return found


def add_objects(message: Any, objects: Iterable[bytes]) -> None:
    """Add objects to a protobuf message of any type."""
    message.MergeFromString(_Inline(objects=objects).SerializeToString())


def objects_of(body: bytes, most: int) -> dict[str, bytes]:
    """Return the objects within a serialised protobuf message, by their digests, which are their ids.

    Args:
        body: the serialised message; `DecodeError` if it is none.
        most: limit on their number.

    Raises:
        ValueError: if there are more.
    """
    objects = _Inline.FromString(body).objects
    if len(objects) > most:
        raise ValueError(f"it carries {len(objects)} objects")
    return {get_object_id(content): content for content in objects}
