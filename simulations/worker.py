"""A worker on a Ray cluster: it owns blocks of sites, answers for them as this process would, and extracts features.

Everything here is importable, because code in `__main__` is pickled anew for every call.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord, Context, RecordDict

from fedhead.client.release.guard import Guard
from fedhead.client.release.subgroups import Subgroups
from fedhead.data import IntArray, KeyArray
from fedhead.devices import pick_device
from fedhead.features.store import FeatureStore
from fedhead.protocol.actions import MAP, STANDARDISE
from fedhead.protocol.messages import RECORD, Payload
from fedhead.simulations.grid import replies_of
from fedhead.simulations.sites import SharedData, SimulatedSite
from fedhead.tasks import Targets, make_task

STATE_CHANGES = frozenset({MAP, STANDARDISE})
"""Actions that workers answer and that change what sites know of a run."""

State = Mapping[str, Any]
"""What the sites of a block know of a run: the values of its record in Flower's `Context`; empty for nothing."""


@dataclass(frozen=True)
class Shared:
    """The data that every worker receives once.

    Attributes:
        path: of the feature store.
        digest: of its features.
        labels: of all rows.
        own_labels: the labels in the data, whatever the run's task; None for real targets.
        guard: every site's.
        task: of the run.
        classes: of the run.
        device: as in the settings.
        run_id: of the run.
        subgroups: of all rows; None if the data names none.
    """

    path: str
    digest: str
    labels: Targets
    own_labels: Targets | None
    guard: Guard
    task: str
    classes: Sequence[str]
    device: str
    run_id: int
    subgroups: Subgroups | None = None


@dataclass(frozen=True)
class Block:
    """A block of sites.

    Attributes:
        names: of the sites.
        rows: of all of them, one site after the other.
        ends: `[S]`, where each site's rows end.
    """

    names: Sequence[str]
    rows: IntArray
    ends: IntArray

    @classmethod
    def of(cls, sites: Mapping[str, IntArray]) -> "Block":
        """Return the block of sites with these rows."""
        rows = list(sites.values())
        return cls(list(sites), np.concatenate(rows), np.cumsum([len(own) for own in rows]))

    def sites(self, shared: SharedData) -> list[SimulatedSite]:
        """Return the sites, over shared rows."""
        parts = np.split(self.rows, self.ends[:-1])
        return [SimulatedSite(name, rows, shared) for name, rows in zip(self.names, parts, strict=True)]


@dataclass(frozen=True)
class Replies:
    """A worker's replies to one request.

    Attributes:
        replies: each with the position of the first site it speaks for: a reply, or the reason why there is none.
        state: of the run at the sites, if the request changed it.
    """

    replies: Sequence[tuple[int, Payload | str]]
    state: State | None = None


class Worker:
    """Blocks of sites and their rows, in a process of its own.

    Args:
        shared: a reference to `Shared`.
    """

    def __init__(self, shared: Sequence[Any]) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._shared: Shared = _get(shared[0])
        self._rows: SharedData | None = None
        self._blocks: dict[int, list[SimulatedSite]] = {}
        self._states: dict[Any, State] = {}

    def start(self) -> bool:
        """Map the feature store; return whether this machine sees it."""
        try:
            store = FeatureStore.read(Path(self._shared.path))
        except (OSError, ValueError, KeyError):
            return False
        if store.digest != self._shared.digest:
            return False
        self._take(store)
        return True

    def take(self, features: npt.NDArray[np.float32], keys: KeyArray, contents: KeyArray) -> None:
        """Take the features, on a machine that does not see the store; all its workers share one copy."""
        with warnings.catch_warnings():
            # Ray's copy is read-only, and nothing here writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            values = torch.from_numpy(features)
        self._take(FeatureStore(Path(self._shared.path), values, keys, contents, {}, 0, self._shared.digest))

    def _take(self, store: FeatureStore) -> None:
        told = self._shared
        self._rows = SharedData(
            None,
            store,
            told.labels,
            told.guard,
            make_task(told.task, told.classes),
            own_labels=told.own_labels,
            device=pick_device(told.device),
            subgroups=told.subgroups,
        )

    def answer(
        self,
        number: int,
        block: Sequence[Any],
        state: Sequence[Any],
        action: str,
        positions: Sequence[int] | None,
        payload: Payload,
        merged: bool,
    ) -> Replies:
        """Answer one message to sites of one block.

        Args:
            number: of the block.
            block: a reference to it.
            state: a reference to the state of the run at its sites.
            action: the request.
            positions: the sites asked, by their positions in the block; None for all, in order.
            payload: the message.
            merged: whether one reply is to speak for all.
        """
        assert self._rows is not None
        if number not in self._blocks:
            made: Block = _get(block[0])
            self._blocks[number] = made.sites(self._rows)
        if state[0] not in self._states:
            self._states = {state[0]: _get(state[0])}
        sites = self._blocks[number]
        chosen = sites if positions is None else [sites[position] for position in positions]
        context = Context(self._shared.run_id, 0, {}, RecordDict(), {})
        keep_state(self._states[state[0]], context)
        replies = list(replies_of(action, chosen, payload, context, merged=merged))
        return Replies(replies, state_of(context) if action in STATE_CHANGES else None)


def keep_state(state: State, context: Context) -> None:
    """Keep the state of the run in the context of its sites."""
    if state:
        context.state[RECORD] = ConfigRecord(dict(state))
    else:
        context.state.pop(RECORD, None)


def state_of(context: Context) -> State:
    """Return the state of the run in the context of its sites."""
    record = context.state.get(RECORD)
    return dict(record) if isinstance(record, ConfigRecord) else {}


def _get(reference: Any) -> Any:
    import ray

    return ray.get(reference)
