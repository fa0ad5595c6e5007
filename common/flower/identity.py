"""The identity of this process, without which Flower creates no messages."""

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.supercore.task_identity import TaskIdentity

COORDINATOR_NODE_ID = 1
"""Flower's node id of a SuperLink, the sender of all instructions."""


@contextmanager
def in_process_identity(run_id: int) -> Iterator[None]:
    """Let this process create messages of a run that no SuperLink knows."""
    with keep_identity():
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 0, COORDINATOR_NODE_ID
        yield


@contextmanager
def keep_identity() -> Iterator[None]:
    """Restore this process's identity on exit."""
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before
