"""The only file that touches what Flower does not document.

Pinned to flwr 1.41; `tests/common/test_flower.py` fails loudly when a new Flower moves any of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

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
