"""The Fleet API: its paths, the requests that a registered site makes, and Flower's handlers for them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.superlink.servicer.fleet import fleet_handlers as handlers

FLEET_PATH, MEDIA_TYPE = "/v1/fleet/", b"application/protobuf"
ACTIVATE, DEACTIVATE = "activate-node", "deactivate-node"
PULL_MESSAGES, PUSH_MESSAGES, CONFIRM = "pull-messages", "push-messages", "confirm-message-received"
PUSH_OBJECT, PULL_OBJECT = "push-object", "pull-object"

REQUESTS: Mapping[str, tuple[type[Any], Callable[[Any, Any], Any]]] = {
    ACTIVATE: (fleet_pb2.ActivateNodeRequest, handlers.activate_node),
    DEACTIVATE: (fleet_pb2.DeactivateNodeRequest, handlers.deactivate_node),
    "send-node-heartbeat": (heartbeat_pb2.SendNodeHeartbeatRequest, handlers.send_node_heartbeat),
    PULL_MESSAGES: (
        fleet_pb2.PullMessagesRequest,
        lambda request, state: handlers.pull_messages(request, state, state.object_store),
    ),
    PUSH_MESSAGES: (fleet_pb2.PushMessagesRequest, handlers.push_messages),
    "get-run": (run_pb2.GetRunRequest, handlers.get_run),
    "get-fab": (fab_pb2.GetFabRequest, handlers.get_fab),
    PUSH_OBJECT: (message_pb2.PushObjectRequest, handlers.push_object),
    PULL_OBJECT: (message_pb2.PullObjectRequest, handlers.pull_object),
    CONFIRM: (
        message_pb2.ConfirmMessageReceivedRequest,
        lambda request, state: handlers.confirm_message_received(request, state, state.object_store),
    ),
}
"""Type of each request and its handler, by the last part of the path."""


def refusal(status: int, sentence: str) -> tuple[int, bytes]:
    """Return a refusal in the Fleet API's form."""
    return status, json.dumps({"detail": sentence}).encode()
